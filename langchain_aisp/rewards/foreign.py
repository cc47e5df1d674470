"""What rewards need to know of things that other libraries made: their texts, their identity, their control tokens."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from langchain_aisp.rewards.fingerprint import digest
from langchain_aisp.types import Chat

# Tokens that give the common chat templates their structure: ChatML, Llama, Qwen, DeepSeek, Mistral, Gemma, BERT.
_CONTROL_TOKEN = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|<\uff5c[^<>\uff5c\n]{1,40}\uff5c>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|\[(?:CLS|SEP|PAD|UNK|MASK)\]",
    re.IGNORECASE,
)


def text_of(message: Any) -> str:
    """The text of a message, or of a message's content: a string, or blocks, of which those with text count."""
    content = message.get("content") if isinstance(message, Mapping) else getattr(message, "content", message)
    if isinstance(content, str):
        return content
    blocks = [{"type": "text", "text": block} if isinstance(block, str) else block for block in content or ()]
    return "".join(block["text"] for block in blocks if block.get("type") == "text")


def last_user_text(chat: Chat) -> str:
    """What the user asked last: the reference of a reward that measures how close an answer stays to the question.

    Raises:
        ValueError: For a conversation without a message of the user.
    """
    for message in reversed(chat):
        if message.get("role") == "user":
            return text_of(message)
    raise ValueError("the conversation has no message with the role 'user'; pass a function that finds what you need")


def since_last_user(chat: Chat) -> list[Mapping[str, Any]]:
    """The messages that follow the user's last one, the latest first; all of them if there is none of the user's."""
    return list(takewhile(lambda message: message["role"] != "user", reversed(chat)))


def without_control_tokens(text: str) -> str:
    """The text with a space inside whatever a server's tokenizer could take for the structure of its template."""
    return _CONTROL_TOKEN.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def identity_of(thing: Any) -> str | None:
    """A text that two models share only if they are set up alike, in any process; None where nothing promises it.

    It is the object's ``fingerprint``, or, where LangChain can write the object down (``to_json``), a hash of that:
    class and arguments, keys and other secrets left out.
    """
    own = getattr(thing, "fingerprint", None)
    if isinstance(own, str):
        return own
    written = thing.to_json() if callable(getattr(thing, "to_json", None)) else {}
    if not isinstance(written, Mapping) or written.get("type") != "constructor":
        return None
    try:
        return digest(json.dumps(written, sort_keys=True))
    except TypeError:
        return None  # it holds an object that only this process knows


def settled_fingerprint(kind: str, *parts: str | None) -> str:
    """A hash of the parts; one of this process alone if one of them has no stable description."""
    known = [part for part in parts if part is not None]
    return digest(kind, *known) if len(known) == len(parts) else f"{_OF_THIS_PROCESS}{uuid.uuid4().hex}"


def is_of_this_process(fingerprint: str) -> bool:
    """Whether a fingerprint came from ``settled_fingerprint`` and means nothing elsewhere."""
    return fingerprint.startswith(_OF_THIS_PROCESS)


_OF_THIS_PROCESS = "process-"
