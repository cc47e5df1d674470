"""LangChain messages as the conversation dicts that chat templates take; knows no model, no template and no tokenizer.

Chat templates are stricter than LangChain: one system prompt, at the start, and no role twice in a row. So system
messages are gathered at the front, and neighbours of one role become one turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import groupby
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_aisp.types import Chat, require

Turn = dict[str, Any]

_CALL_BLOCKS = {"tool_use", "tool_call"}
_REASONING_BLOCKS = {"thinking", "reasoning"}
_READ_ELSEWHERE = {  # parts of an answer that are not its text
    *_CALL_BLOCKS,
    *_REASONING_BLOCKS,
    "redacted_thinking",  # encrypted for its own provider
    "function_call",  # these three repeat what stands in `tool_calls` and `invalid_tool_calls`
    "invalid_tool_call",
    "tool_call_chunk",
}


def to_chat(messages: Sequence[BaseMessage]) -> Chat:
    """Turn messages into a conversation.

    System messages move to the front (a template that takes them elsewhere is the exception), adjacent turns of one
    role are joined by an empty line, results of tools stay apart. An empty answer at the end says nothing and goes.

    Args:
        messages: At least one message.

    Returns:
        Turns with ``role`` and ``content``, and where the message has them ``name``, ``reasoning_content``,
        ``tool_calls`` (their arguments as dicts) and ``tool_call_id``.

    Raises:
        ValueError: There is nothing to answer, or a message holds something else than text.
        TypeError: A message is of a kind that no template knows.
    """
    names = {call["id"]: call["name"] for message in messages for call in _calls(message)}
    turns = [_turn(message, names) for message in messages]
    chat = list(_merged(sorted(turns, key=lambda turn: turn["role"] != "system")))  # the sort is stable
    if chat and _says_nothing(chat[-1]):
        chat.pop()
    require(bool(chat), "There is nothing to answer: the list of messages is empty. Pass at least one message.")
    return tuple(chat)


def continues_last(chat: Chat) -> bool:
    """Whether the model is to go on with the last turn, because that is already the assistant's.

    Raises:
        ValueError: The last turn calls tools, which can be answered but not continued.
    """
    if chat[-1]["role"] != "assistant":
        return False
    calls = [call["function"]["name"] for call in chat[-1].get("tool_calls", ())]
    require(not calls, f"The last message calls the tools {calls}. Append a ToolMessage with the result of each call.")
    return True


def _turn(message: BaseMessage, names: Mapping[str | None, str]) -> Turn:
    match message:
        case SystemMessage():
            return {"role": "system", "content": _text(message)}
        case HumanMessage():
            return _filled({"role": "user", "content": _text(message), "name": message.name})
        case AIMessage():
            return _answer(message)
        case ToolMessage():
            return _result(message, message.name or names.get(message.tool_call_id))
        case FunctionMessage():
            return {"role": "tool", "content": _text(message), "name": message.name}
        case ChatMessage():
            return {"role": message.role, "content": _text(message)}
        case _:
            raise TypeError(
                f"A {type(message).__name__} cannot be rendered. Possible are SystemMessage, HumanMessage, AIMessage, "
                "ToolMessage, FunctionMessage and ChatMessage."
            )


def _answer(message: AIMessage) -> Turn:
    functions = [(call["id"], {"name": call["name"], "arguments": call["arguments"]}) for call in _calls(message)]
    return _filled(
        {
            "role": "assistant",
            "content": _text(message),
            "reasoning_content": _reasoning(message),
            "tool_calls": [{"type": "function", "id": id_, "function": function} for id_, function in functions],
        }
    )


def _result(message: ToolMessage, name: str | None) -> Turn:
    text = _text(message)
    if message.status == "error" and not text.lower().startswith("error"):
        text = f"Error: {text}"  # templates have no field for the status
    return _filled({"role": "tool", "content": text, "name": name, "tool_call_id": message.tool_call_id})


def _calls(message: BaseMessage) -> list[dict[str, Any]]:
    """The tool calls of an answer as ``id``, ``name`` and ``arguments``, wherever the provider has put them."""
    if not isinstance(message, AIMessage):
        return []
    calls = [_call(call["id"], call["name"], call["args"]) for call in message.tool_calls]
    calls += [_call(call["id"], call["name"], call["args"]) for call in message.invalid_tool_calls]
    known = {call["id"] for call in calls}
    blocks = [block for block in _blocks(message) if block.get("type") in _CALL_BLOCKS and block.get("id") not in known]
    return calls + [
        _call(block.get("id"), block.get("name"), block.get("input", block.get("args"))) for block in blocks
    ]


def _call(id_: str | None, name: str | None, arguments: Any) -> dict[str, Any]:
    """One call; templates walk through the arguments, so what could not be parsed stands in a dict too."""
    parsed = dict(arguments) if isinstance(arguments, Mapping) else {"invalid_json": arguments or ""}
    return {"id": id_, "name": name or "", "arguments": parsed}


def _reasoning(message: AIMessage) -> str:
    blocks = [block for block in _blocks(message) if block.get("type") in _REASONING_BLOCKS]
    texts = [str(block.get("thinking") or block.get("reasoning") or "") for block in blocks]
    return "".join(texts) or str(message.additional_kwargs.get("reasoning_content") or "")


def _text(message: BaseMessage) -> str:
    """The text of a message; parts of an answer follow each other, parts of other messages stand on lines."""
    if isinstance(message.content, str):
        return message.content
    is_answer = isinstance(message, AIMessage)
    blocks = [block for block in _blocks(message) if not (is_answer and block.get("type") in _READ_ELSEWHERE)]
    return ("" if is_answer else "\n").join(_text_of_block(block, message.type) for block in blocks)


def _text_of_block(block: Mapping[str, Any], kind: str) -> str:
    type_ = block.get("type", "text")
    require(
        type_ in {"text", "text-plain"} and isinstance(block.get("text"), str),
        f"A content block of type {type_!r} came in a message of type {kind!r}, but the model reads text only. "
        "Possible are strings and blocks {'type': 'text', 'text': '…'}; results of tools go into a ToolMessage, "
        "and images, audio and files have to be described in words.",
    )
    return str(block["text"])


def _blocks(message: BaseMessage) -> list[dict[str, Any]]:
    """The content as a list of blocks."""
    parts = [message.content] if isinstance(message.content, str) else message.content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def _merged(turns: Iterable[Turn]) -> Iterator[Turn]:
    for role, neighbours in groupby(turns, key=lambda turn: turn["role"]):
        if role == "tool":  # each result answers its own call
            yield from neighbours
        else:
            yield reduce(_joined, neighbours)


def _joined(first: Turn, second: Turn) -> Turn:
    """Two turns of one role as one; a name survives when both have it."""
    texts = {
        key: "\n\n".join(turn[key] for turn in (first, second) if turn.get(key))
        for key in ("content", "reasoning_content")
    }
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    name = first.get("name") if first.get("name") == second.get("name") else None
    return _filled({"role": first["role"], **texts, "tool_calls": calls, "name": name})


def _filled(turn: Turn) -> Turn:
    """The turn without empty fields, which templates would test for; the content may be empty."""
    return {key: value for key, value in turn.items() if value or key == "content"}


def _says_nothing(turn: Turn) -> bool:
    return turn["role"] == "assistant" and not turn["content"] and "tool_calls" not in turn
