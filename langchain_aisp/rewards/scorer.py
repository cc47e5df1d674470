"""From token ids to scores: padding that moves no score, the right token of a decoder, the label that counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from langchain_aisp.rewards.checkpoint import BackboneWithHead, LoadedClassifier, usable_length
from langchain_aisp.rewards.conversation import ConversationEncoder
from langchain_aisp.types import require

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
        backbone: Any = self._model.base_model
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        scored: Tensor = head(last.to(next(head.parameters()).dtype))
        return scored

    def _rewards(self, logits: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            return logits[:, 0]
        if getattr(self._model.config, "problem_type", None) == "multi_label_classification":
            return nn.functional.logsigmoid(logits)[:, self._label]
        return logits.log_softmax(dim=-1)[:, self._label]


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
