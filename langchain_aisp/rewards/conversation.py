"""Conversations as the token ids a reward model reads: its template, its BOS and EOS, its length; no forged tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_aisp.templating import Sanitiser, with_fitting_ids
from langchain_aisp.tools.formats import GENERIC
from langchain_aisp.types import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


class ConversationEncoder:
    """Renders a conversation and a candidate with the reward model's own template and makes token ids of it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None,
        add_bos: bool | None,
        add_eos: bool | None,
        max_length: int | None,
    ) -> None:
        """Keep a copy of the tokenizer: its settings are changed here, and a shared one cannot be used in two threads.

        Raises:
            ValueError: Without a chat template, or for a BOS or EOS policy about a token that does not exist.
        """
        self._tokenizer = copy.deepcopy(tokenizer)
        self._template = chat_template or tokenizer.chat_template
        if self._template is None:
            raise ValueError(
                "its tokenizer has no chat template. Pass chat_template=..., the one the reward model was trained with"
            )
        self._max_length = max_length
        self._add_bos, self._add_eos = add_bos, add_eos
        self._bos = _either(tokenizer.bos_token_id, tokenizer.cls_token_id)
        self._eos = _either(tokenizer.eos_token_id, tokenizer.sep_token_id)
        if (add_bos and self._bos is None) or (add_eos and self._eos is None):
            raise ValueError("its tokenizer lacks the BOS or EOS that is to be added. Leave add_bos and add_eos out")
        self._sanitiser = Sanitiser(self._tokenizer, str(self._template))

    def encode(self, chat: Chat, response: str) -> list[int]:
        """Token ids of the conversation with the candidate as its last answer.

        A conversation that is too long loses its earliest turns, then the earliest tokens of its last turn.

        Raises:
            ValueError: If the candidate alone is longer than ``max_length``: it is never cut.
        """
        fitting = with_fitting_ids(self._readable(chat), str(self._template))
        messages = [self._sanitiser.turn(turn) for turn in with_answer(fitting, response)]
        ids = self._render(messages)
        while self._too_long(ids) and (shorter := _without_first_turn(messages)) is not None:
            messages, ids = shorter, self._render(shorter)
        return self._cut(ids, messages) if self._too_long(ids) else ids

    def _readable(self, chat: Chat) -> Chat:
        """The conversation, with calls and results of tools as plain turns where the template is silent about tools."""
        about_tools = any(turn.get("role") == "tool" or turn.get("tool_calls") for turn in chat)
        return GENERIC.instructed(chat, ()) if about_tools and "tool" not in str(self._template) else chat

    def _render(self, messages: Messages) -> list[int]:
        """Token ids of the template, with the BOS and EOS that the policy asks for."""
        ids: list[int] = self._tokenizer.apply_chat_template(  # type: ignore[assignment]
            messages, chat_template=self._template, tokenize=True, return_dict=False, sanitize_control_tokens=True
        )
        if self._add_bos is not None and self._bos is not None:
            ids = _with_edge(ids, self._bos, self._add_bos)
        if self._add_eos is not None and self._eos is not None:
            ids = _with_edge(ids[::-1], self._eos, self._add_eos)[::-1]
        return ids

    def _too_long(self, ids: Sequence[int]) -> bool:
        return self._max_length is not None and len(ids) > self._max_length

    def _cut(self, ids: list[int], messages: Messages) -> list[int]:
        """The first token, where it is the BOS, and the last ones, all of the answer among them."""
        assert self._max_length is not None
        head = ids[:1] if ids[0] == self._bos else []
        kept = self._max_length - len(head)
        without_answer = self._render([*messages[:-1], {**messages[-1], "content": ""}])
        answer = len(ids) - _shared_start(ids, without_answer)
        if answer > kept:
            raise ValueError(
                f"the response takes {answer} of the reward's tokens, max_length is {self._max_length}. "
                "Raise max_length if the reward model allows it, or lower max_tokens of the search"
            )
        return head + ids[-kept:]


def with_answer(chat: Chat, response: str) -> Messages:
    """The conversation and the answer; an answer that had been begun is continued."""
    messages = [dict(message) for message in chat]
    if messages and messages[-1].get("role") == "assistant":
        begun = messages.pop()
        content = begun.get("content") or ""
        blocks = [*content, {"type": "text", "text": response}] if isinstance(content, list) else content + response
        return [*messages, {**begun, "content": blocks}]
    return [*messages, {"role": "assistant", "content": response}]


def _without_first_turn(messages: Messages) -> Messages | None:
    """All but the earliest turn; system messages in front stay. None if only the last turn is left."""
    turns = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    if len(turns) < 2:
        return None
    return [message for message in messages[: turns[0]] if message.get("role") == "system"] + messages[turns[1] :]


def _with_edge(ids: list[int], token: int, wanted: bool) -> list[int]:
    """The ids with exactly one such token in front, or none."""
    first = next((index for index, each in enumerate(ids) if each != token), len(ids))
    return [token] * wanted + ids[first:]


def _shared_start(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of leading ids that two sequences share."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _either(first: int | None, second: int | None) -> int | None:
    return second if first is None else first
