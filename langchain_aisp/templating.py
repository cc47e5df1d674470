"""What chat templates leave to their callers: texts that forge structure, and ids of calls that are too long.

Knows tokenizers of transformers by their methods only, and imports none.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, partial
from string import ascii_letters, digits
from typing import TYPE_CHECKING, Any

from langchain_aisp.types import Chat, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]

_CONTENT_ONLY = "{{ messages[0].content }}"
_ROUNDS = 8  # splitting one disguised token can at worst reveal another
_DROPPED = re.compile("[\U000f0000\U000f0001]")  # transformers takes these out of texts, which could make marks whole
_MARK = re.compile(r"<\|[^|<>\s]+\|>|</?[a-z]+_[a-z_]+>|\[/?[A-Z]{2}[A-Z_]+\]|<</?[A-Z]+>>")
_OF_CALLS = re.compile(r"call|function|python_tag|\[ARGS\]", re.IGNORECASE)
_ROLE = re.compile(r"[A-Za-z0-9_.-]+")
_SHORT_IDS = "[TOOL_CALLS]"  # Mistral's templates, which raise an error for an id of another length
_SHORT = re.compile(r"[A-Za-z0-9]{9}")
_LETTERS = ascii_letters + digits


class Sanitiser:
    """Keeps what gives a conversation its structure out of what people, tools and language models write.

    Structure is made of two things. **Control tokens**: all added tokens count, special or not, save whitespace;
    ``sanitize_control_tokens`` of transformers then writes those of texts as plain text. Three kinds escape it and are
    split by a space here: tokens that the tokenizer makes of plain text too, disguised ones that become a token only
    after the tokenizer's normaliser (case, Unicode width), and those inside of arguments and descriptions of tools.
    **Spelled marks**, which the template writes though the vocabulary has no token for them, such as ``[INST]`` or
    ``<tool_response>``: they are split as well. A template that parts its turns by plain words, such as ``Human:``,
    cannot be protected.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        """Set the tokenizer's ``chat_control_tokens``, so pass one that is yours.

        Args:
            tokenizer: Makes the ids.
            template: The chat template.
        """
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
        tokenizer.chat_control_tokens = list(added)
        self._tokenizer = tokenizer
        self._ids = set(added.values()) - {tokenizer.unk_token_id}
        self._written = _any_of(added)
        spelled = set(_MARK.findall(template)) - added.keys()
        self._spelled = _any_of(spelled)
        self._spelled_beside_calls = _any_of(mark for mark in spelled if not _OF_CALLS.search(mark))
        self._normalises = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer is not None
        self._can_be_plain = lru_cache(maxsize=None)(partial(_can_be_plain, tokenizer))

    def turn(self, turn: Mapping[str, Any]) -> Turn:
        """A turn with nothing in its texts that ``sanitize_control_tokens`` would let through as structure.

        The texts of the system and the assistant may spell marks of calls: that is how a model is told of tools, and
        how its calls are written, where the template is silent about them.

        Raises:
            ValueError: The role is no word: templates build control tokens of it.
        """
        role = turn.get("role")
        require(
            isinstance(role, str) and _ROLE.fullmatch(role) is not None,
            f"A turn has the role {role!r}, but a role is a word of letters, digits, '_', '-' and '.', such as 'user'",
        )
        speaks = role in {"system", "assistant"}
        spelled = {"content": self._spelled_beside_calls} if speaks else {}
        return {
            key: self._text(value, spelled.get(key, self._spelled)) if isinstance(value, str) else self.data(value)
            for key, value in turn.items()
        }

    def data(self, value: Any) -> Any:
        """Arguments, descriptions of tools, blocks: every control token in them is split, in keys too.

        A template may print them escaped, which the marks do not survive that transformers sets.
        """
        if isinstance(value, str):
            return self._written.sub(_split, self._text(value, self._spelled))
        if isinstance(value, Mapping):
            return {self.data(key): self.data(item) for key, item in value.items()}
        return [self.data(item) for item in value] if isinstance(value, list | tuple) else value

    def _text(self, text: str, spelled: re.Pattern[str]) -> str:
        text = self._written.sub(self._split_if_stubborn, spelled.sub(_split, _DROPPED.sub(" ", text)))
        for _ in range(_ROUNDS):
            spans = self._disguised(text)
            if not spans:
                return text
            for start, end in reversed(spans):
                text = text[:start] + _apart(text[start:end]) + text[end:]
        raise ValueError(f"{text[:60]!r} holds a control token of the tokenizer that cannot be taken apart")

    def _disguised(self, text: str) -> list[tuple[int, int]]:
        """Where the text has control tokens besides those written out, which transformers recognises."""
        if not self._normalises:
            return []
        rest = self._written.sub(lambda found: "\n" * len(found.group()), text)
        encoded = self._tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [(start, end) for index, (start, end) in pairs if index in self._ids and start < end]

    def _split_if_stubborn(self, found: re.Match[str]) -> str:
        return found.group() if self._can_be_plain(found.group()) else _split(found)


def with_fitting_ids(chat: Chat, template: str) -> Chat:
    """The conversation with ids of calls that its template takes.

    Mistral's templates demand nine letters and digits. What does not fit is hashed, so an id stays the same while the
    conversation grows; a call and its result keep sharing theirs, ids that fit are kept, and no two become one. A
    result without an id gets that of the first call before it that has no result.
    """
    if _SHORT_IDS not in template:
        return chat
    turns = list(_with_ids(chat))
    ids = dict.fromkeys(each for turn in turns for each in _ids_of(turn))
    short = {each: each for each in ids if _SHORT.fullmatch(each)}
    for each in ids:
        if each not in short:
            taken = set(short.values())
            short[each] = next(made for made in _hashes(each) if made not in taken)
    return [_renamed(turn, short) for turn in turns]


def _with_ids(chat: Chat) -> Iterator[Turn]:
    """The turns, an id on every call and every result."""
    waiting: deque[str] = deque()
    for place, given in enumerate(chat):
        turn = dict(given)
        if turn.get("tool_calls"):
            calls = enumerate(turn["tool_calls"])
            turn["tool_calls"] = [{**call, "id": call.get("id") or f"{place}/{index}"} for index, call in calls]
            waiting.extend(_ids_of(turn))
        if turn.get("role") == "tool":
            turn["tool_call_id"] = turn.get("tool_call_id") or (waiting[0] if waiting else str(place))
            if turn["tool_call_id"] in waiting:
                waiting.remove(turn["tool_call_id"])
        yield turn


def _ids_of(turn: Turn) -> list[str]:
    called = [call["id"] for call in turn.get("tool_calls") or ()]
    return [*called, turn["tool_call_id"]] if turn.get("tool_call_id") else called


def _renamed(turn: Turn, short: Mapping[str, str]) -> Turn:
    calls = [{**call, "id": short[call["id"]]} for call in turn.get("tool_calls") or ()]
    result = {"tool_call_id": short[turn["tool_call_id"]]} if turn.get("tool_call_id") else {}
    return {**turn, **({"tool_calls": calls} if calls else {}), **result}


def _hashes(text: str) -> Iterator[str]:
    """Nine letters and digits that stand for a text, and others in case these are taken."""
    while True:
        digest = hashlib.sha256(text.encode()).digest()
        yield "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest[:9])
        text = digest.hex()


def _can_be_plain(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether transformers can write a control token as plain text; the plain text may be the very token."""
    probe = [{"role": "user", "content": token}]
    try:
        tokenizer.apply_chat_template(probe, chat_template=_CONTENT_ONLY, sanitize_control_tokens=True)
    except ValueError:
        return False
    return True


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of some texts, longer ones first; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _split(found: re.Match[str]) -> str:
    return _apart(found.group())


def _apart(token: str) -> str:
    """The token with a space inside, which is no token any more."""
    return f"{token[0]} {token[1:]}" if len(token) > 1 else " "
