"""From token ids to scores: padding that moves no score, the right token of a decoder, the label that counts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from langchain_aisp.rewards.checkpoint import BackboneWithHead, LoadedClassifier, usable_length
from langchain_aisp.rewards.conversation import ConversationEncoder
from langchain_aisp.types import require

logger = logging.getLogger(__name__)

_WORTH_SHARING = 64  # tokens that need not be read again, below which a pass of its own for the beginning costs more
_POOLS_BEFORE_PADDING = ("xlnet", "ctrl")  # they read a padded row's score at the wrong token


@dataclass(frozen=True)
class Settings:
    """How a loaded reward model is used.

    Attributes:
        chat_template: Jinja template of the reward model; the tokenizer's own unless given.
        add_bos: True: exactly one BOS in front; False: none; None: what the template writes.
        add_eos: True: exactly one EOS at the end; False: none; None: what the template writes.
        batch_size: Most texts per forward pass; no score depends on it.
        max_length: Most tokens per text; the model's own limit unless given.
        label: Of several labels, the one whose log-probability is the reward, by name or index.
    """

    chat_template: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    batch_size: int = 32
    max_length: int | None = None
    label: str | int | None = None

    def __post_init__(self) -> None:
        """Reject what no model can follow."""
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(self.max_length is None or self.max_length >= 1, f"max_length must be positive, got {self.max_length}")


class Scorer:
    """A loaded model, its encoder, and the step from token ids to scores."""

    def __init__(self, loaded: LoadedClassifier, settings: Settings) -> None:
        """Check that model and settings fit.

        Raises:
            ValueError: For a label, length, template or token policy that the model cannot follow.
        """
        self._loaded = loaded  # the process's registry lets go of what nobody holds
        self._model = loaded.model
        self._settings = settings
        self._label = _label_index(loaded.model, settings.label)
        self._pad: int = loaded.tokenizer.pad_token_id or 0  # masked; RoBERTa's positions need the real one
        self._reads_last = _reads_last_token(loaded.model)
        self.can_share = self._reads_beginnings_once()
        self._pads = self._reads_last or _ignores_padding(loaded.model)
        self.encoder = ConversationEncoder(
            loaded.tokenizer,
            chat_template=settings.chat_template,
            add_bos=settings.add_bos,
            add_eos=settings.add_eos,
            max_length=_length(usable_length(loaded), settings.max_length),
        )

    def batch_size(self, lengths: Sequence[int]) -> int:
        """How many of the texts, sorted by length, go into the next batch; equal ones only where padding matters."""
        size = min(self._settings.batch_size, len(lengths))
        if self._pads:
            return size
        return next((n for n in range(1, size) if lengths[n] != lengths[0]), size)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[list[int]]) -> list[float]:
        """Scores of one batch of token ids."""
        lengths = torch.tensor([len(ids) for ids in texts])
        width = int(lengths.max())
        ids = torch.tensor([[*each, *[self._pad] * (width - len(each))] for each in texts])
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        device = next(self._model.parameters()).device
        logits = self._logits(ids.to(device), mask.to(device), lengths.to(device)).float()
        scores: list[float] = self._rewards(logits).tolist()
        return scores

    def _logits(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        """Logits [n, labels]; a decoder is read at each row's last token, whatever its padding token is."""
        if not self._reads_last:
            logits: Tensor = self._model(input_ids=ids, attention_mask=mask).logits
            return logits
        head: Any = self._model.score
        shared = _shared_beginning(ids, lengths) if self.can_share else 0
        worth = shared * (len(ids) - 1) >= _WORTH_SHARING
        last = self._last_hidden(ids, mask, lengths, shared if worth else 0)
        scored: Tensor = head(last.to(next(head.parameters()).dtype))
        return scored

    def _last_hidden(self, ids: Tensor, mask: Tensor, lengths: Tensor, shared: int) -> Tensor:
        """Hidden states [n, D] of the rows' last tokens; their first ``shared`` tokens are equal and read once."""
        backbone: Any = self._model.base_model
        cache = None
        if shared:
            cache = self._new_cache()
            backbone(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(ids))
        hidden: Tensor = backbone(
            input_ids=ids[:, shared:], attention_mask=mask, past_key_values=cache, use_cache=bool(shared)
        ).last_hidden_state
        return hidden[torch.arange(len(ids), device=ids.device), lengths - 1 - shared]

    def _new_cache(self) -> DynamicCache:
        config: Any = self._model.config
        return DynamicCache(config=config)

    @torch.inference_mode()
    def _reads_beginnings_once(self) -> bool:
        """Whether the model, tried out, gives rows with a shared beginning the states that they have alone."""
        if not self._reads_last:
            return False
        try:
            layers = self._new_cache().layers
            if not all(type(layer) is DynamicLayer for layer in layers):
                return False  # sliding windows forget, and a short trial would not show it
            weight = next(self._model.parameters())
            ids = torch.tensor([[3, 5, 4, 6, 7, 2, 8], [3, 5, 4, 6, 9, 1, 0]], device=weight.device)
            lengths = torch.tensor([7, 6], device=weight.device)
            mask = (torch.arange(7, device=weight.device) < lengths.unsqueeze(1)).long()
            whole, parts = (self._last_hidden(ids, mask, lengths, shared).float() for shared in (0, 4))
            error = float((parts - whole).abs().max() / whole.std())
        except Exception as reason:  # an architecture may fail in any way here; it then reads every text as a whole
            logger.info("%s reads no shared beginning: %s", type(self._model).__name__, reason)
            return False
        return error <= (1e-3 if weight.dtype == torch.float32 else 0.15)

    def _rewards(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            return logits[:, 0]
        if getattr(self._model.config, "problem_type", None) == "multi_label_classification":
            return nn.functional.logsigmoid(logits)[:, self._label]
        return logits.log_softmax(dim=-1)[:, self._label]


def _shared_beginning(ids: Tensor, lengths: Tensor) -> int:
    """Number of tokens with which all rows begin, short of every row's last one."""
    shortest = int(lengths.min()) - 1
    differs = (ids[:, :shortest] != ids[:1, :shortest]).any(dim=0)
    return int(differs.long().argmax()) if bool(differs.any()) else shortest


def _reads_last_token(model: nn.Module) -> bool:
    """Whether this is a decoder whose head ``score`` reads one hidden state of its backbone."""
    known = isinstance(getattr(model, "score", None), nn.Module) and hasattr(model, "base_model")
    return known and not getattr(model.config, "is_encoder_decoder", False)


def _ignores_padding(model: nn.Module) -> bool:
    """Whether the class's own forward gives a padded row the score it has alone; unknown code is not trusted."""
    own = type(model).__module__.startswith("transformers.models.")
    return own and getattr(model.config, "model_type", "") not in _POOLS_BEFORE_PADDING


def _label_index(model: nn.Module, label: str | int | None) -> int:
    """Index of the label that counts."""
    config: Any = model.config
    scalar = isinstance(model, BackboneWithHead)
    names = [] if scalar else [str(config.id2label[index]) for index in range(config.num_labels)]
    if len(names) <= 1:
        require(label is None, f"the model has one output and takes no label, got {label!r}. Leave label out")
        return 0
    possible = f"The model has {len(names)} labels: {', '.join(names)}. Pass label=... with a name or an index"
    require(label is not None, possible)
    if isinstance(label, str):
        require(label in names, f"label {label!r} is unknown. {possible}")
        return names.index(label)
    require(label in range(len(names)), f"label {label!r} is out of range. {possible}")
    return int(label or 0)


def _length(limit: int | None, wanted: int | None) -> int | None:
    """Most tokens per text."""
    if wanted is not None and limit is not None:
        require(wanted <= limit, f"max_length {wanted} is more than the {limit} tokens that the model can read")
    return limit if wanted is None else wanted
