"""Conversations as the token ids a language model reads; whatever their texts spell, the turns are the template's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from langchain_aisp.templating import Sanitiser, with_fitting_ids
from langchain_aisp.types import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptEncoder:
    """Renders conversations with a chat template and makes token ids of them; any thread may call it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
        """Keep a copy of the tokenizer: its settings are changed here, and by every encoding.

        Args:
            tokenizer: Makes the ids.
            template: A Jinja chat template.
            name: The model's, for error messages.
        """
        self._tokenizer = copy.deepcopy(tokenizer)
        self._template = template
        self._name = name
        self._sanitiser = Sanitiser(self._tokenizer, template)
        self._lock = Lock()  # for one piece of a prompt control tokens are letters, for the next they are not

    def encode(self, chat: Chat, tools: Sequence[Mapping[str, Any]], continue_last: bool) -> list[int]:
        """Token ids of a conversation, however long; see ``TransformersEngine.encode``.

        Raises:
            ValueError: The chat template refuses the conversation.
        """
        from jinja2 import TemplateError

        with self._lock:
            messages = [self._sanitiser.turn(turn) for turn in with_fitting_ids(chat, self._template)]
            try:
                ids = self._tokenizer.apply_chat_template(
                    messages,
                    tools=[self._sanitiser.data(tool) for tool in tools] or None,
                    chat_template=self._template,
                    add_generation_prompt=not continue_last,
                    continue_final_message=continue_last,
                    tokenize=True,
                    return_dict=False,
                    sanitize_control_tokens=True,
                )
            except TemplateError as error:
                roles = [message.get("role") for message in chat]
                message = f"the chat template of {self._name} refuses the conversation with the roles {roles}: {error}"
                raise ValueError(message) from error
        return list(ids)
