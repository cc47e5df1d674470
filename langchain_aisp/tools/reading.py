"""Readers: what a model has written, taken apart into thoughts, text and tool calls; they never raise."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from langchain_aisp.tools.spec import ToolSpec
from langchain_aisp.tools.thoughts import Thoughts
from langchain_aisp.types import FinishReason, Response

if TYPE_CHECKING:
    from langchain_aisp.tools.formats import ToolFormat


@dataclass(frozen=True)
class TextReader:
    """Reads answers that are text or, by a schema, JSON.

    Attributes:
        thoughts: Where the model thinks before it speaks.
    """

    thoughts: Thoughts | None = None

    def read(self, text: str, finish_reason: FinishReason) -> Response:
        """Part the thoughts from the text."""
        reasoning, said = self.thoughts.split(text) if self.thoughts else (None, text)
        return Response(said, finish_reason, reasoning)


@dataclass(frozen=True)
class ToolReader:
    """Reads answers that may call tools.

    Attributes:
        format: How the model writes calls.
        tools: The tools it may call; a call of another one is invalid. Without tools, nothing is a call.
    """

    format: ToolFormat
    tools: tuple[ToolSpec, ...]

    def read(self, text: str, finish_reason: FinishReason) -> Response:
        """Part thoughts, text and calls; what was meant as a call and is none becomes an invalid one."""
        thoughts = self.format.thoughts
        if not self.tools:
            return TextReader(thoughts).read(text, finish_reason)
        first = self.format.start.search(text)
        reasoning, said = thoughts.split(text, first and first.start()) if thoughts else (None, text)
        spoken, claims = self._take_apart(said)
        calls = tuple({"name": each.name, "args": each.arguments} for each in claims if not each.error)
        invalid = tuple(each.as_invalid(finish_reason) for each in claims if each.error)
        return Response(spoken, finish_reason, reasoning, calls, invalid)

    def _take_apart(self, text: str) -> tuple[str, list[_Claim]]:
        """The text around the calls, and what is claimed to be calls."""
        spoken: list[str] = []
        claims: list[_Claim] = []
        rest = text
        while start := self.format.start.search(rest):
            found, after = self._take(rest[start.end() :])
            spoken.append(rest[: start.start()])
            claims += found
            rest = after
        if not spoken:
            return text, claims
        return "\n".join(part.strip() for part in [*spoken, rest] if part.strip()), claims

    def _take(self, text: str) -> tuple[list[_Claim], str]:
        """What is claimed to be called right after a marker, and the text after it."""
        name, body = self._part_name(text)
        try:
            value, length = _JSON.raw_decode(body)
            claims = self._claims(value if name is None else {"name": name, "arguments": value})
        except (ValueError, RecursionError) as error:  # JSON that is nested too deeply cannot be read either
            raw, rest = self._until_end(body)
            return [_Claim(name or _name_in(raw), raw, f"This is not valid JSON: {error}.")], rest
        if not self.format.closing:
            return claims, body[length:].lstrip().removeprefix(self.format.gap)
        surplus, rest = self._until_end(body[length:])
        if surplus.strip():
            raw = body[:length] + surplus
            return [_Claim(name or _name_in(raw), raw, "This is not valid JSON: more follows after its end.")], rest
        return claims, rest

    def _part_name(self, text: str) -> tuple[str | None, str]:
        """The name that stands before the arguments, None in formats where it stands inside the JSON."""
        name, inset, body = text.partition(self.format.inset) if self.format.inset else ("", "", "")
        is_name = inset and self.format.marker not in name
        return (name.strip(), body.lstrip()) if is_name else (None, text.lstrip())

    def _until_end(self, text: str) -> tuple[str, str]:
        """The text up to the end of the call, as far as that can be seen, and what follows."""
        marks = "|".join(re.escape(mark) for mark in (self.format.closing, self.format.marker) if mark)
        end = re.search(marks, text) if marks else None
        if end is None:
            return text, ""
        return text[: end.start()], text[end.end() if end[0] == self.format.closing else end.start() :]

    def _claims(self, value: Any) -> list[_Claim]:
        """One call or a list of calls."""
        return [self._claim(each) for each in (value if isinstance(value, list) else [value])]

    def _claim(self, value: Any) -> _Claim:
        if not isinstance(value, dict):
            return _Claim(None, value, f"A call is an object with a name and arguments, not {_kind(value)}.")
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        return _Claim(name if isinstance(name, str) else None, arguments, self._error(name, arguments))

    def _error(self, name: Any, arguments: Any) -> str:
        """What is wrong with a call, empty if nothing is."""
        tool = next((tool for tool in self.tools if tool.name == name), None)
        if tool is None:
            return f"There is no tool {name!r}; possible are {[tool.name for tool in self.tools]}."
        if not isinstance(arguments, dict):
            return f"The arguments of {name} must be an object, not {_kind(arguments)}."
        missing = [key for key in tool.parameters.get("required", ()) if key not in arguments]
        return f"The call of {name} lacks the required arguments {missing}." if missing else ""


@dataclass(frozen=True)
class _Claim:
    """What stands where a call should; its arguments are raw text if they could not be read."""

    name: str | None
    arguments: Any
    error: str

    def as_invalid(self, finish_reason: FinishReason) -> dict[str, Any]:
        """The claim as an invalid call."""
        raw = self.arguments
        cut = "" if finish_reason == "stop" else f" The answer was cut off ({finish_reason})."
        text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False)
        return {"name": self.name, "args": text, "error": self.error + cut}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


_JSON = json.JSONDecoder(parse_constant=_refuse)  # Python would read NaN and Infinity, which the standard lacks
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]*)"')


def _name_in(raw: str) -> str | None:
    """The name in a call that could not be read."""
    found = _NAME.search(raw)
    return found[1] if found else None


def _kind(value: Any) -> str:
    """A JSON value's type, in words."""
    kinds = {list: "a list", str: "a string", bool: "a truth value", type(None): "null", dict: "an object"}
    return kinds.get(type(value), "a number")
