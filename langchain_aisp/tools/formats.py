"""How families of models write tool calls; a family is data, and one grammar and one reader serve them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_aisp.tools.grounding import grounded_arguments, grounded_text
from langchain_aisp.tools.lark import LINE, PAGE, check, json_of, literal
from langchain_aisp.tools.reading import ToolReader
from langchain_aisp.tools.spec import ToolSpec
from langchain_aisp.tools.thoughts import Thoughts
from langchain_aisp.types import Chat, Grammar, require

MOST_CALLS = 8
"""Most calls of one answer: without an end, a small model would call until its tokens run out."""

_OBJECT = '{"name": "$name", "arguments": $arguments}'
_RESULT, _END_OF_RESULT = "[result of ", "[/result]"  # around a tool's result in a user's turn


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes tool calls: ``marker begin call separator call … end``.

    Attributes:
        name: The family.
        marker: Tells calls from text. Where it is empty, an answer that begins with a brace is a call.
        call: One call, with ``$name`` and ``$arguments`` in it.
        begin: Between the marker and the first call.
        separator: Between two calls.
        end: After the last call.
        prelude: A control token that may come before an unmarked call.
        thoughts: Where the model thinks before it speaks; None if it does not.
        tokens: The control tokens of the vocabulary that occur above, with their ids: all of them, as llguidance would
            otherwise offer the control token where it wants its letters. What is no token is spelled out.
        instructs: Whether the chat template is silent about tools, so that ``instructed`` has to tell of them.
    """

    name: str
    marker: str
    call: str = _OBJECT
    begin: str = ""
    separator: str = ""
    end: str = ""
    prelude: str = ""
    thoughts: Thoughts | None = None
    tokens: tuple[tuple[str, int], ...] = ()
    instructs: bool = False

    @property
    def ids(self) -> dict[str, int]:
        """The control tokens as a mapping."""
        return dict(self.tokens)

    @property
    def start(self) -> re.Pattern[str]:
        """Matches where a call begins."""
        if self.marker:
            return re.compile(re.escape(self.marker))
        brace = r"(?=\{)"
        return re.compile(rf"^\s*(?:{re.escape(self.prelude)}|{brace})" if self.prelude else rf"^\s*{brace}")

    @property
    def inset(self) -> str:
        """What parts a name from arguments that are all of the JSON; empty where the JSON holds the name too."""
        before, between, _ = self._around()
        return "" if before else between

    @property
    def closing(self) -> str:
        """The mark that ends calls; empty where the JSON's own end does."""
        return "" if self.begin.strip() else self.end.strip()

    @property
    def gap(self) -> str:
        """What parts unmarked calls."""
        return "" if self.marker else self.separator.strip()

    def after(self, prompt: str) -> ToolFormat:
        """The format after a rendered prompt, which may have opened the block of thoughts."""
        if self.thoughts is None:
            return self
        return replace(self, thoughts=replace(self.thoughts, opened=prompt.rstrip().endswith(self.thoughts.begin)))

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls, at least one, as the model writes them: names and arguments."""
        return self.marker + self.begin + self.separator.join(self._write(*call) for call in calls) + self.end

    def reader(self, tools: Sequence[ToolSpec], *, choice: str = "auto") -> ToolReader:
        """Reads the answers that ``grammar`` allows; without tools, and with choice "none", nothing is a call."""
        return ToolReader(self, tuple(_chosen(tools, choice)))

    def grammar(
        self,
        tools: Sequence[ToolSpec],
        *,
        choice: str = "auto",
        parallel: bool = True,
        grounds: Sequence[str] | None = None,
        text_grounds: Sequence[str] | None = None,
        text: Mapping[str, Any] | None = None,
    ) -> Grammar:
        """What an answer may be; thoughts may come first, and after calls it ends.

        Args:
            tools: The tools at hand.
            choice: "auto" for text or calls or both, "none" for text, "required" or "any" for calls, or a tool's name.
            parallel: Whether an answer may hold several calls, up to ``MOST_CALLS``.
            grounds: Texts of the conversation; if given, the arguments are taken from them, see
                ``grounding.grounded_arguments``.
            text_grounds: Texts of the conversation; if given, names and numbers in the text of an answer are taken from
                them, see ``grounding.grounded_text``.
            text: JSON schema of an answer that is no call; then there is no text beside a call.

        Raises:
            ValueError: There is no such choice, or a tool's schema cannot be enforced while decoding.
        """
        callable_ = _chosen(tools, choice)
        free = text is None
        said = self._text(bool(callable_), text_grounds) if text is None else _json_rule(text)
        rules = [self._answer(choice if callable_ else "none", "TEXT" if free else "json"), said]
        if callable_:
            kind = choice if free else "required"
            rules += [self._opening(kind, text_grounds is not None), self._calls(callable_, parallel)]
            rules += self._arguments(callable_, grounds)
        return Grammar("\n".join([*rules, *([self.thoughts.rules(self.ids)] if self.thoughts else [])]) + "\n")

    def instructed(self, chat: Chat, tools: Sequence[ToolSpec]) -> Chat:
        """The conversation for a template that is silent about tools.

        The system prompt tells of the tools, calls stand in the answers' texts, results of tools in the user's turns.
        What users, tools and answers write cannot pass for a call or a result: a space stands inside such marks of
        theirs. Hand no tools to such a template.
        """
        turns = _merged(self._plain(turn) for turn in chat)
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
        content = "\n\n".join(part for part in (system, self._instruction(tools)) if part)
        return [{"role": "system", "content": content}, *turns] if content else turns

    def _write(self, name: str, arguments: Mapping[str, Any]) -> str:
        before, between, after = self._around()
        written = self._forged.sub(_escaped, json.dumps(arguments, ensure_ascii=False))
        return before + self._forged.sub(_escaped, _inside(name)) + between + written + after

    @property
    def _forged(self) -> re.Pattern[str]:
        """Matches what would be a mark of a call or of a result if it stood outside of a string."""
        marks = (self.marker, self.inset, self.closing, self.prelude, _RESULT, _END_OF_RESULT)
        return re.compile("|".join(re.escape(mark) for mark in marks if mark))

    def _around(self) -> tuple[str, str, str]:
        """What stands before the name of a call, between name and arguments, and after these."""
        before, rest = self.call.split("$name")
        between, after = rest.split("$arguments")
        return before, between, after

    def _answer(self, choice: str, said: str) -> str:
        thought = "thought " if self.thoughts else ""
        answer = {"none": said, "auto": f"{said} | opening calls"}.get(choice, "opening calls")
        return f"start: {thought}answer\nanswer: {answer}"

    def _text(self, beside_calls: bool, grounds: Sequence[str] | None) -> str:
        """The terminal for text. Whatever the reader would take for a mark is no text, even spelled out."""
        marks = [self.marker, self.prelude, *((self.thoughts.begin, self.thoughts.end) if self.thoughts else ())]
        some = r"/\s*[^\s{](?s:.*)/" if beside_calls and not self.marker else "/(?s:.+)/"
        without = " | ".join(literal(mark, {}) for mark in marks if mark)
        unmarked = f"{some} & ~(/(?s:.*)/ ({without}) /(?s:.*)/)" if without else some
        return (
            f"TEXT: {unmarked}"
            if grounds is None
            else f"TEXT: GROUNDED & {unmarked}\n{grounded_text('GROUNDED', grounds)}"
        )

    def _opening(self, choice: str, grounded: bool) -> str:
        """The rule for all that comes before the first call, up to the marker."""
        ids = self.ids
        if not self.marker:
            return f"opening: {literal(self.prelude, ids)}?" if self.prelude in ids else 'opening: ""'
        if choice != "auto" or self.marker in ids:
            return f"opening: {'TEXT? ' if choice == 'auto' else ''}{literal(self.marker, ids)}"
        begin = f"& ~({literal(self.thoughts.begin, {})} /(?s:.*)/)" if self.thoughts else ""
        said = "GROUNDED?" if grounded else "/(?s:.*)/"
        return f"opening[lazy]: OPENING\nOPENING: ({said} {literal(self.marker, {})}) {begin}"

    def _calls(self, tools: Sequence[ToolSpec], parallel: bool) -> str:
        begin, separator, end = (literal(text, self.ids) for text in (self.begin, self.separator, self.end))
        more = f"({separator} call){{0,{MOST_CALLS - 1}}}" if parallel else ""
        choices = " | ".join(f"call_{index}" for index in range(len(tools)))
        return f"calls: {begin} call {more} {end}\ncall: {choices}"

    def _arguments(self, tools: Sequence[ToolSpec], grounds: Sequence[str] | None) -> list[str]:
        """Rules ``call_0`` … and their arguments."""
        before, between, after = self._around()
        rules = []
        for index, tool in enumerate(tools):
            check(Grammar(f"start: {json_of(tool.parameters, LINE)}"), f"The schema of the tool {tool.name!r}")
            head = literal(before + _inside(tool.name) + between, self.ids)
            rules.append(f"call_{index}: {head} arguments_{index} {literal(after, self.ids)}")
        if grounds is not None:
            return [*rules, grounded_arguments({f"arguments_{i}": tool for i, tool in enumerate(tools)}, grounds)]
        return [*rules, *(f"arguments_{i}: {json_of(tool.parameters, LINE)}" for i, tool in enumerate(tools))]

    def _plain(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """A turn with tools in its text only."""
        said = turn["content"] if turn["role"] == "system" else self._forged.sub(_apart, turn["content"])
        if turn["role"] == "tool":
            name = self._forged.sub(_apart, turn.get("name") or "the tool")
            return {"role": "user", "content": f"{_RESULT}{name}]\n{said}\n{_END_OF_RESULT}"}
        functions = [call["function"] for call in turn.get("tool_calls") or ()]
        calls = self.write([(each["name"], each["arguments"]) for each in functions]) if functions else ""
        content = "\n".join(part for part in (said, calls) if part)
        return {**{key: value for key, value in turn.items() if key != "tool_calls"}, "content": content}

    def _instruction(self, tools: Sequence[ToolSpec]) -> str:
        """What the system prompt says of the tools."""
        if not tools:
            return ""
        listed = "\n".join(json.dumps(tool.to_openai()["function"], ensure_ascii=False) for tool in tools)
        described = self._forged.sub(_escaped, listed)
        example = self.marker + self.begin + self.call + self.end
        shape = example.replace("$name", "NAME").replace("$arguments", "{ARGUMENTS}")
        return f"You can call these tools:\n{described}\nTo call one, write its name and arguments as JSON:\n{shape}"


DEMO = ToolFormat("demo", "<|tool_call|>", separator="<|/tool_call|><|tool_call|>", end="<|/tool_call|>")
HERMES = ToolFormat(  # Hermes, Qwen 2.5 and 3
    "hermes", "<tool_call>", begin="\n", separator="\n</tool_call>\n<tool_call>\n", end="\n</tool_call>"
)
LLAMA = ToolFormat(  # Llama 3.1 to 3.3
    "llama", "", call='{"name": "$name", "parameters": $arguments}', separator="; ", prelude="<|python_tag|>"
)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", begin="[", separator=", ", end="]")
MISTRAL_NAMED = ToolFormat("mistral-named", "[TOOL_CALLS]", call="$name[ARGS]$arguments", separator="[TOOL_CALLS]")
GENERIC = replace(HERMES, name="generic", instructs=True)
FAMILIES = (DEMO, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, GENERIC)

_SIGNS: tuple[tuple[ToolFormat, tuple[str, ...], tuple[str, ...]], ...] = (
    # the first family whose signs all stand in the template, and none of what speaks against it
    (MISTRAL_NAMED, ("[TOOL_CALLS]", "[ARGS]"), ()),
    (MISTRAL, ("[TOOL_CALLS]",), ()),
    (DEMO, ("<|tool_call|>", "<|/tool_call|>"), ()),
    (HERMES, ("<tool_call>", "arguments"), ("<function=", "<arg_key>")),  # these two write XML into the same marks
    (LLAMA, ("<|start_header_id|>", '"parameters": '), ()),
)
_THOUGHTS = (Thoughts(), Thoughts("[THINK]", "[/THINK]"))


def format_for(chat_template: str | None, tokens: Mapping[str, int]) -> ToolFormat:
    """Recognise how a model writes tool calls and thoughts.

    Args:
        chat_template: The tokenizer's template; None if it has none.
        tokens: The tokenizer's added tokens and their ids (``get_added_vocab()``).

    Returns:
        The family's format with the ids of its control tokens; ``GENERIC`` if the template is of no known family.
    """
    template = chat_template or ""
    family = next((family for family, *signs in _SIGNS if _shows(template, *signs)), GENERIC)
    thoughts = next((each for each in _THOUGHTS if each.end in template or each.end in tokens), None)
    texts = [family.marker, family.call, family.separator, family.end, family.prelude]
    written = "\n".join(texts + ([thoughts.begin, thoughts.end] if thoughts else []))
    known = tuple(sorted((token, index) for token, index in tokens.items() if token.strip() and token in written))
    return replace(family, thoughts=thoughts, tokens=known, instructs=family.instructs or "tools" not in template)


def _merged(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns, the user's neighbouring ones as one: templates want roles to take turns."""
    merged: list[dict[str, Any]] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"] == "user":
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n\n{turn['content']}"}
        else:
            merged.append(turn)
    return merged


def _shows(template: str, signs: Sequence[str], against: Sequence[str]) -> bool:
    """Quotes inside a template's own strings are escaped, which makes no difference here."""
    text = template.replace('\\"', '"')
    return all(sign in text for sign in signs) and not any(sign in text for sign in against)


def _json_rule(schema: Mapping[str, Any]) -> str:
    """The rule for an answer that is JSON."""
    answer = json_of(schema, PAGE)
    check(Grammar(f"start: {answer}"), "The schema")
    return f"json: {answer}"


def _chosen(tools: Sequence[ToolSpec], choice: str) -> list[ToolSpec]:
    """The tools that may be called."""
    if choice in {"auto", "none"}:
        return list(tools) if choice == "auto" else []
    named = [tool for tool in tools if choice in {"required", "any", tool.name}]
    possible = ["auto", "none", "required", "any", *(tool.name for tool in tools)]
    require(bool(named), f"tool_choice {choice!r} leaves no tool to call; possible are {possible}")
    return named


def _apart(mark: re.Match[str]) -> str:
    """The mark with a space inside."""
    return f"{mark[0][0]} {mark[0][1:]}"


def _escaped(mark: re.Match[str]) -> str:
    """The mark as it may stand inside a string of JSON, where it means the same."""
    return f"\\u{ord(mark[0][0]):04x}{mark[0][1:]}"


def _inside(name: str) -> str:
    """A name as it stands inside the quotes of JSON."""
    return json.dumps(name, ensure_ascii=False)[1:-1]
