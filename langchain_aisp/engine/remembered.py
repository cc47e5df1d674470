"""Prompts that were read: the next turn of a conversation reads only what is new."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from langchain_aisp.engine.cache import Cache
from langchain_aisp.engine.slots import SlotCache

# Tokens. A CPU reads prompts in pieces of so many: fewer save nothing, and 64 of 128 save half the time (measured on
# models of 5 and 70 million weights). A GPU reads so few in the time that a pass takes to start.
_WORTH_REUSING = 64


class RememberedPrompts:
    """Prompts by their token ids. When they take too many bytes, the least recently used leave first."""

    def __init__(self, most_bytes: int) -> None:
        """Remember nothing yet; the newest prompt stays however large it is."""
        self._most_bytes = most_bytes
        self._known: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._sizes: dict[tuple[int, ...], int] = {}

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self._known)

    @property
    def bytes(self) -> int:
        """What all of them take."""
        return sum(self._sizes.values())

    def read(self, cache: Cache, ids: tuple[int, ...]) -> Any:
        """What ``Cache.prefill`` makes of a prompt, from the model only as far as no remembered prompt begins alike."""
        nearest, common = self._nearest(ids, cache.divisible)
        if nearest is not None:
            self._known.move_to_end(nearest)
        if nearest == ids:
            return self._known[ids]
        begun = None if nearest is None else self._known[nearest]
        prompt = cache.prefill(ids, begun, common)
        if common < len(ids):
            self._keep(ids, prompt, cache)
        return prompt

    def read_together(self, cache: SlotCache, prompts: Sequence[tuple[int, ...]]) -> None:
        """Read those of the prompts side by side that begin unlike any other, as far as there is room to remember them.

        What begins alike is sooner read by ``read``, one after the other.
        """
        new: list[tuple[int, ...]] = []
        room = self._most_bytes // 2
        for ids in prompts:
            alike = self._nearest(ids, cache.divisible)[0] is not None or any(
                common_beginning(ids, other) >= min(_WORTH_REUSING, len(ids)) for other in new
            )
            room -= cache.row_bytes(0, len(ids))
            if ids and not alike and room >= 0:
                new.append(ids)
        if len(new) > 1:
            for ids, prompt in zip(new, cache.prefill_together(new), strict=True):
                self._keep(ids, prompt, cache)

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
        self._sizes.clear()

    def _nearest(self, ids: tuple[int, ...], divisible: bool) -> tuple[tuple[int, ...] | None, int]:
        """The remembered prompt that has the longest beginning in common with this one, and that beginning's length."""
        if ids in self._known:
            return ids, len(ids)
        best, most = None, _WORTH_REUSING - 1
        for other in self._known:
            common = common_beginning(ids, other)
            if common > most and (divisible or common == len(other)):
                best, most = other, common
        return (best, most) if best is not None else (None, 0)

    def _keep(self, ids: tuple[int, ...], prompt: Any, cache: Cache) -> None:
        if cache.divisible:  # what is new serves its beginnings, too
            for other in [other for other in self._known if other == ids[: len(other)]]:
                self._drop(other)
        self._known[ids], self._sizes[ids] = prompt, cache.size(prompt)
        while self.bytes > self._most_bytes and len(self._known) > 1:
            self._drop(next(iter(self._known)))

    def _drop(self, ids: tuple[int, ...]) -> None:
        del self._known[ids], self._sizes[ids]


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
