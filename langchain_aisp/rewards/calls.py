"""Rewards of tool calls: is what they pass on said, is what was said passed on, are they complete, or any function."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from asyncio import AbstractEventLoop
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

from torch import Tensor

from langchain_aisp.ahead import waits
from langchain_aisp.futures import gather
from langchain_aisp.rewards.base import RewardError, check_scores
from langchain_aisp.rewards.callable import (
    CallableReward,
    Sees,
    as_reward,
    check_signature,
    is_async,
    name_of,
    scatter,
)
from langchain_aisp.rewards.fingerprint import digest, stable_fingerprint
from langchain_aisp.rewards.foreign import since_last_user, text_of
from langchain_aisp.rewards.said import said_in, spelled_out, values_in
from langchain_aisp.types import Chat, Response, Reward, Ticket, aanswered, answered, require

CallFunction: TypeAlias = Callable[[Any, str, dict[str, Any]], float | Awaitable[float]]
"""``(chat, name, args) -> score``: the conversation as a list of dicts, the tool's name, the parsed arguments."""

Question: TypeAlias = tuple[Chat, str, dict[str, Any]]

_NEUTRAL = 0.5  # between a call of which everything is right, 1, and one of which nothing is, 0


def as_call_reward(
    function: CallFunction,
    *,
    text: float | Any = 0.0,
    invalid: float = 0.0,
    name: str | None = None,
    timeout: float | None = None,
    fingerprint: str | None = None,
) -> CallReward:
    """Make a reward of a function of one tool call; an answer with several calls gets their mean.

    Args:
        function: Called as ``function(chat, name, args)``, sync or async; returns a finite number, higher is better.
        text: What an answer without calls gets. A number is compared with the scores of calls. Or a reward (or a
            function of texts), which has a scale of its own: then the model's own likeliest answer decides whether
            this turn is a call, and the search goes on among answers of that kind.
        invalid: What a call counts that cannot be read, was cut off or breaks its schema: a low score of the function.
        name: For error messages; the function's own name unless given.
        timeout: Most seconds for all calls of one wave; None sets no limit.
        fingerprint: Identity of the function in cache keys; derived from its code unless given, see ``CallableReward``.

    Raises:
        TypeError: If the function cannot be called with three positional arguments.
        ValueError: For a number that is not finite, or values out of range.
    """
    return CallReward(function, text=text, invalid=invalid, name=name, timeout=timeout, fingerprint=fingerprint)


class _CallsOrTexts:
    """One reward of answers that call something and one of those that do not.

    Attributes:
        text: Judges answers without calls.
        compares_kinds: Whether the scores of calls and of texts mean the same: a number for all texts is chosen to.
        sees: What the reward reads; says to the chat model that it judges calls.
    """

    sees: Sees = "response"

    def __init__(self, calls: CallableReward, text: float | Any) -> None:
        """Judge calls by one reward, texts by a number, a reward or a function."""
        self.compares_kinds = isinstance(text, int | float)
        self.text: Reward = _always(text) if isinstance(text, int | float) else as_reward(text)
        self._calls = calls

    @property
    def name(self) -> str:
        """For error messages."""
        return self._calls.name

    @property
    def fingerprint(self) -> str:
        """Of both rewards."""
        return digest("calls", self._calls.fingerprint, self.text.fingerprint)

    @property
    def waits(self) -> bool:
        """Whether both mostly wait for somebody else."""
        return waits(self._calls) and waits(self.text)

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Start scoring, calls by what judges these and texts by ``text``.

        Args:
            pairs: Conversations and candidates; one with calls is judged by these alone, whatever it says besides.
            loop: The caller's running loop, on which an async function runs.

        Returns:
            A ticket for [len(pairs)] float32. Its errors are ``RewardError``.
        """
        calling = [row for row, (_, response) in enumerate(pairs) if _calls_something(response)]
        silent = sorted(set(range(len(pairs))) - set(calling))
        shares = [(rows, judge) for rows, judge in ((calling, self._calls), (silent, self.text)) if rows]
        futures = [judge.submit([pairs[row] for row in rows], loop=loop).future for rows, judge in shares]
        return gather(futures, lambda scores: scatter(scores, [rows for rows, _ in shares], len(pairs)))


class CallReward(_CallsOrTexts):
    """A function of a tool call as a reward of whole responses; made by ``as_call_reward``.

    Attributes:
        function: Scores one call.
        invalid: The score of a call that cannot be read.
        text: Judges answers without calls.
    """

    def __init__(
        self,
        function: CallFunction,
        *,
        text: float | Any = 0.0,
        invalid: float = 0.0,
        name: str | None = None,
        timeout: float | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """See ``as_call_reward``."""
        own_name = name or name_of(function)
        check_signature(function, own_name, ("chat", "name", "args"), "one number")
        require(math.isfinite(invalid), f"invalid must be a finite number, got {invalid}; it is a low score")
        self.function = function
        self.invalid = float(invalid)
        scores = self._scores_async if is_async(function) else self._scores
        identity = fingerprint or stable_fingerprint(function)
        calls = CallableReward(scores, own_name, timeout, "response", identity, waits=is_async(function))
        super().__init__(calls, text)

    @property
    def fingerprint(self) -> str:
        """From the function's, the reward of texts and the score of invalid calls."""
        return digest(super().fingerprint, repr(self.invalid))

    def _scores(self, chat: Chat, responses: Sequence[Response]) -> list[float]:
        return answered(self._scoring(chat, responses), lambda asked: [self._ask(*each) for each in asked])

    async def _scores_async(self, chat: Chat, responses: Sequence[Response]) -> list[float]:
        return await aanswered(self._scoring(chat, responses), self._ask_all)

    def _scoring(
        self, chat: Chat, responses: Sequence[Response]
    ) -> Generator[Sequence[Question], Sequence[Any], list[float]]:
        """Mean scores of the responses, each of which calls something; asks about all calls at once."""
        calls = [(call["name"], dict(call["args"])) for response in responses for call in response.tool_calls]
        answers = yield [(chat, *call) for call in calls]
        scores = iter(check_scores(self.name, answers, [_written(*call) for call in calls]).tolist())
        return [self._mean([next(scores) for _ in response.tool_calls], response) for response in responses]

    def _mean(self, scores: Sequence[float], response: Response) -> float:
        invalid = [self.invalid] * len(response.invalid_tool_calls)
        return (sum(scores) + sum(invalid)) / (len(scores) + len(invalid))

    def _ask(self, chat: Chat, name: str, args: dict[str, Any]) -> Any:
        with self._blaming(name, args):
            return self.function(chat, name, args)

    async def _ask_all(self, asked: Iterable[Question]) -> list[Any]:
        """All calls side by side; the first error ends them all."""
        tasks = [asyncio.ensure_future(self._ask_async(*each)) for each in asked]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _ask_async(self, chat: Chat, name: str, args: dict[str, Any]) -> Any:
        with self._blaming(name, args):
            score = self.function(chat, name, args)
            return await score if inspect.isawaitable(score) else score

    @contextmanager
    def _blaming(self, name: str, args: Mapping[str, Any]) -> Iterator[None]:
        """Tell at which call the function failed."""
        written = _written(name, args)
        try:
            yield
        except RewardError:
            raise
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}"
            remedy = "The traceback above shows where it failed."
            raise RewardError(self.name, problem, remedy, written) from error


class GroundedCalls(CallReward):
    """Share of a call's values that were said in the conversation: 1 if nothing is invented, 0 if everything is.

    Values are the strings and numbers in the arguments, however deep; truth values, null and blank strings do not
    count, and a call without values has invented nothing. A string was said if it occurs in a message's text as whole
    words, case and spaces aside. A number was said in digits or as an English word up to twelve. Arguments of earlier
    calls are no text, but what the tools answered is. A call that cannot be read gets 0.
    """

    def __init__(self, *, text: float | Any = _NEUTRAL) -> None:
        """Take what an answer without calls gets: a number, 0.5 unless given, or a reward that then judges it."""
        super().__init__(grounded_share, text=text, name="grounded calls", fingerprint="grounded calls")


class CoveringCalls(_CallsOrTexts):
    """Share of what the user spells out that the calls pass on, all calls of an answer together: 1 if nothing is lost.

    What counts in the user's last message are passages in quotes, numbers, and words with a digit or an underscore,
    such as codes, times and names of tools. They are passed on if they occur, as whole words, in the name of a call, in
    its arguments or in the arguments' names. Calls that were made since that message have passed theirs on already.
    Where nothing is spelled out every call gets 1, and an answer with a call that cannot be read gets 0. What was never
    said is passed on freely: ``GroundedCalls`` asks about that.
    """

    def __init__(self, *, text: float | Any = _NEUTRAL) -> None:
        """Take what an answer without calls gets: a number, 0.5 unless given, or a reward that then judges it."""
        name = "covering calls"
        super().__init__(CallableReward(covered_shares, name, None, "response", name), text)


class CompleteCalls(CallReward):
    """Share of the properties of a call's schema that are filled: 1 if all are.

    A property is filled if it is there and neither null, nor blank, nor an empty list or object. A call that leaves a
    required one open gets 0, and so do a call of an unknown tool and one that cannot be read. Only the properties of
    the arguments themselves count, not those inside of them.
    """

    def __init__(self, tools: Iterable[Any], *, text: float | Any = _NEUTRAL) -> None:
        """Know the tools.

        Args:
            tools: LangChain tools, Pydantic classes, functions, or dicts in the form of the OpenAI API.
            text: What an answer without calls gets: a number, or a reward that then judges it.

        Raises:
            ValueError: No tools, two of one name, or something that is none.
        """
        forms = tuple(sorted((_form_of(tool) for tool in tools), key=lambda form: form.name))
        shared = [name for name, count in Counter(form.name for form in forms).items() if count > 1]
        require(len(forms) > 0, "CompleteCalls needs the tools that may be called, such as CompleteCalls([look_up])")
        require(not shared, f"several tools are named {shared}; a call could mean either of them, rename all but one")
        identity = digest("complete calls", repr(forms))
        super().__init__(partial(complete_share, forms), text=text, name="complete calls", fingerprint=identity)


def grounded_share(chat: Chat, name: str, args: Mapping[str, Any]) -> float:
    """Share of the strings and numbers in ``args`` that occur in the conversation, see ``GroundedCalls``."""
    said = said_in(tuple(text_of(message) for message in chat))
    values = list(values_in(args))
    return sum(map(said.holds, values)) / len(values) if values else 1.0


def covered_shares(chat: Chat, responses: Sequence[Response]) -> list[float]:
    """Share of what the user's last message spells out that each response's calls pass on, see ``CoveringCalls``."""
    turns = since_last_user(chat)
    spelled = spelled_out(text_of(chat[-len(turns) - 1])) if len(turns) < len(chat) else ()
    earlier = [call["function"] for turn in turns for call in turn.get("tool_calls") or ()]
    before = [word for call in earlier for word in _words_of(call["name"], call["arguments"])]
    shares = []
    for response in responses:
        words = [word for call in response.tool_calls for word in _words_of(call["name"], call["args"])]
        said = said_in((*before, *words))
        share = sum(map(said.holds, spelled)) / len(spelled) if spelled else 1.0
        shares.append(0.0 if response.invalid_tool_calls else share)
    return shares


def complete_share(forms: Sequence[_Form], chat: Chat, name: str, args: Mapping[str, Any]) -> float:
    """Share of the properties that are filled, see ``CompleteCalls``."""
    form = next((form for form in forms if form.name == name), None)
    if form is None or not all(_is_filled(args.get(key)) for key in form.required):
        return 0.0
    filled = [_is_filled(args.get(key)) for key in form.properties]
    return sum(filled) / len(filled) if filled else 1.0


@dataclass(frozen=True)
class _Form:
    """What may stand in a call.

    Attributes:
        name: Of the tool.
        properties: Of its arguments.
        required: Those of them that must be there.
    """

    name: str
    properties: tuple[str, ...]
    required: tuple[str, ...]


def _is_filled(value: Any) -> bool:
    """Whether a value says something; 0 and False do."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {})


def _form_of(tool: Any) -> _Form:
    """A tool in one of the forms that ``bind_tools`` takes, read without LangChain."""
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)  # of the OpenAI API; others are of Anthropic's, or a JSON schema
        schema = function.get("parameters", function.get("input_schema", function))
        name = function.get("name", function.get("title"))
    elif hasattr(tool, "tool_call_schema"):
        name, schema = tool.name, _schema_of(tool.tool_call_schema)
    else:
        schema = _schema_of(tool)
        name = schema.get("title", tool.__name__)
    require(isinstance(name, str), f"a tool needs a name, and {tool!r} has none")
    properties, required = schema.get("properties", {}), schema.get("required", ())
    return _Form(name, tuple(sorted(properties)), tuple(sorted(required)))


def _schema_of(arguments: Any) -> Mapping[str, Any]:
    """JSON schema of arguments: such a schema, a Pydantic class of version 2 or 1, or a function."""
    if isinstance(arguments, Mapping):
        return arguments
    make = getattr(arguments, "model_json_schema", getattr(arguments, "schema", None))
    if callable(make):
        return cast(Mapping[str, Any], make())
    require(
        inspect.isfunction(arguments),
        f"{arguments!r} is no tool that can be read. Possible are LangChain tools, Pydantic classes, functions, and "
        "what convert_to_openai_tool of langchain_core.utils.function_calling makes of others",
    )
    parameters = inspect.signature(arguments).parameters
    required = [name for name, each in parameters.items() if each.default is inspect.Parameter.empty]
    return {"properties": dict.fromkeys(parameters), "required": required}


def _words_of(name: str, args: Any) -> Iterator[str]:
    """What a call says: its name, the names of its arguments, and their values."""
    yield name
    yield from args if isinstance(args, Mapping) else ()
    yield from map(str, values_in(args))


def _calls_something(response: Response) -> bool:
    return bool(response.tool_calls or response.invalid_tool_calls)


def _written(name: str, args: Mapping[str, Any]) -> str:
    """A call as people write it, for messages."""
    return f"{name}({json.dumps(args, ensure_ascii=False, default=repr)})"


def _always(score: float) -> Reward:
    """The same score for every text."""
    require(math.isfinite(score), f"text must be a finite number or a reward, got {score}")
    identity = f"always {float(score)!r}"
    return CallableReward(partial(_equally, float(score)), f"{score:g}", explicit_fingerprint=identity, waits=True)


def _equally(score: float, chat: Chat, texts: Sequence[str]) -> list[float]:
    return [score] * len(texts)
