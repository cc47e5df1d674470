"""Reward models from disk or hub: loaded once per process, refused when part of them would be random."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAFETENSORS = "model.safetensors"
_PICKLE = "pytorch_model.bin"


@dataclass(frozen=True, eq=False)
class LoadedClassifier:
    """A reward model in memory.

    Attributes:
        model: A sequence classifier, or a ``BackboneWithHead``.
        tokenizer: Its own tokenizer.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase


class BackboneWithHead(nn.Module):
    """A backbone and a linear head with one output and no bias: the form of UltraRM and Eurus-RM."""

    def __init__(self, backbone: nn.Module, weight: Tensor) -> None:
        """Take a transformers backbone of width D and the head's weight [1, D]."""
        super().__init__()
        self.base_model, self.config = backbone, backbone.config
        self.score = nn.Linear(weight.shape[1], 1, bias=False)
        self.score.weight = nn.Parameter(weight.float())


@dataclass(frozen=True)
class Checkpoint:
    """Where a reward model comes from and how it is loaded; equal ones share one model per process.

    Attributes:
        path: Folder or hub id.
        revision: Branch, tag or commit of the hub.
        dtype: Name of a torch dtype, ``"auto"`` for the checkpoint's, or None: float32 on a CPU, else ``"auto"``.
        device: Name of a torch device, or ``"auto"`` for the first accelerator, else the CPU.
        trust_remote_code: Whether the checkpoint's own Python code may run.
        scalar_head: Name of a linear head on a plain backbone, or None for a sequence classifier.
        allow_pickle: Whether ``.bin`` files may be read, with ``weights_only=True``, where there are no safetensors.
    """

    path: str
    revision: str | None = None
    dtype: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    scalar_head: str | None = None
    allow_pickle: bool = False

    def load(self) -> LoadedClassifier:
        """The model, from this process's registry if anyone still holds it."""
        with _lock:
            loaded = _registry.get(self)
            if loaded is None:
                loaded = _registry[self] = self._read()
            return loaded

    def stamp(self) -> str:
        """What changes when the files change: sizes and times in a folder, the commit on the hub."""
        folder = Path(self.path)
        if folder.is_dir():
            stats = sorted((file.name, file.stat()) for file in folder.iterdir() if file.is_file())
            return ",".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
        return str(config._commit_hash)

    def _read(self) -> LoadedClassifier:
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

        where = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(self.path, **where)
        model, info = (AutoModel if self.scalar_head else AutoModelForSequenceClassification).from_pretrained(
            self.path,
            dtype=self._dtype(),
            use_safetensors=None if self.allow_pickle else True,
            output_loading_info=True,
            **where,
        )
        self._refuse_random_weights(info)
        if self.scalar_head:
            model = BackboneWithHead(model, self._head_weight(self.scalar_head))
        if isinstance(getattr(model, "score", None), nn.Linear):
            model.score.float()  # bfloat16 has 8 bits: equal scores for unlike candidates
        return LoadedClassifier(model.to(self._device()).eval(), tokenizer)

    def _refuse_random_weights(self, info: dict[str, Any]) -> None:
        """Transformers only warns when it fills a missing head with random numbers."""
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        if missing:
            raise ValueError(
                f"the checkpoint has no trained weights for {', '.join(missing[:5])}, they would be random. "
                "Use a sequence classifier, or pass scalar_head=... with the name of the checkpoint's own head"
            )

    def _head_weight(self, head: str) -> Tensor:
        """The weight [1, D] of the named head."""
        key = f"{head}.weight"
        weight = self._tensor(key)
        if weight is None:
            raise ValueError(f"the checkpoint has no tensor {key!r}. Pass the name of its head as scalar_head")
        if self._tensor(f"{head}.bias") is not None or weight.ndim != 2 or weight.shape[0] != 1:
            raise ValueError(
                f"scalar_head must name a linear layer with one output and no bias, {key!r} has shape "
                f"{tuple(weight.shape)}. Load other heads yourself and pass ClassifierReward(model, tokenizer)"
            )
        return weight

    def _tensor(self, key: str) -> Tensor | None:
        """One tensor of the checkpoint, or None."""
        if (file := self._file_with(key, _SAFETENSORS)) is not None:
            return _from_safetensors(file, key)
        if self.allow_pickle and (file := self._file_with(key, _PICKLE)) is not None:
            return _from_pickle(file, key)
        return None

    def _file_with(self, key: str, name: str) -> str | None:
        """The file of a checkpoint, in one part or several, that may hold the tensor."""
        index = self._file(f"{name}.index.json")
        if index is None:
            return self._file(name)
        shard = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get(key)
        return None if shard is None else self._file(shard)

    def _file(self, name: str) -> str | None:
        from transformers.utils.hub import cached_file

        file: str | None = cached_file(
            self.path, name, revision=self.revision, _raise_exceptions_for_missing_entries=False
        )
        return file

    def _device(self) -> str:
        if self.device != "auto":
            return self.device
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    def _dtype(self) -> str:
        return self.dtype or ("float32" if self._device() == "cpu" else "auto")


_lock = Lock()
_registry: WeakValueDictionary[Checkpoint, LoadedClassifier] = WeakValueDictionary()


def _from_safetensors(file: str, key: str) -> Tensor | None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(key) if key in tensors.keys() else None  # noqa: SIM118 (not a dict)


def _from_pickle(file: str, key: str) -> Tensor | None:
    tensor: Tensor | None = torch.load(file, map_location="cpu", weights_only=True, mmap=True).get(key)
    return tensor


def usable_length(loaded: LoadedClassifier) -> int | None:
    """Most tokens the model can read, None if it knows no limit."""
    positions = getattr(_text_config(loaded.model), "max_position_embeddings", None)
    named = loaded.model.named_modules()
    offset = next((module.padding_idx + 1 for name, module in named if _is_offset(name, module)), 0)
    limits = [positions - offset if positions else None, loaded.tokenizer.model_max_length]
    return min((limit for limit in limits if limit is not None and 0 < limit < 1 << 24), default=None)


def _is_offset(name: str, module: nn.Module) -> bool:
    """RoBERTa counts positions from behind its padding index, and has fewer of them than its config says."""
    return name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None


def _text_config(model: nn.Module) -> Any:
    get: Callable[[], Any] = getattr(model.config, "get_text_config", lambda: model.config)
    return get()
