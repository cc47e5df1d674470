"""Where a model thinks before it speaks, such as ``<think>…</think>``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from langchain_aisp.tools.lark import literal


@dataclass(frozen=True)
class Thoughts:
    """The block of thoughts.

    Attributes:
        begin: Opens it.
        end: Closes it.
        opened: Whether the prompt ends inside the block already, as some chat templates have it.
    """

    begin: str = "<think>"
    end: str = "</think>"
    opened: bool = False

    def split(self, text: str, before: int | None = None) -> tuple[str | None, str]:
        """Part the thoughts from what is said after them; an unclosed block is thoughts to its end.

        Args:
            text: An answer.
            before: Where the first tool call begins. A lone closing mark after it belongs to the call's arguments.

        Returns:
            The thoughts, None for none, and the rest.
        """
        head, closing, rest = text.partition(self.end)
        before_block, opening, inside = head.partition(self.begin)
        if opening and not before_block.strip():
            return inside.strip() or None, rest.lstrip()
        lone = bool(closing) and not opening and (before is None or len(head) <= before)
        return (head.strip() or None, rest.lstrip()) if self.opened or lone else (None, text)

    def rules(self, tokens: Mapping[str, int]) -> str:
        """Lark rules for ``thought``: the block and the line breaks after it, or nothing where it may be left out."""
        block = "musing GAP?" if self.opened else f"({literal(self.begin, tokens)} musing GAP?)?"
        if self.end in tokens:
            musing = f"musing: MUSING? {literal(self.end, tokens)}\nMUSING: /(?s:.+)/"
        else:  # the first closing mark ends it, hence lazy
            musing = f"musing[lazy]: MUSING\nMUSING: /(?s:.*)/ {literal(self.end, {})}"
        return f"thought: {block}\n{musing}\nGAP: /\\n{{1,2}}/"
