"""Which cache a model can use: the first that, tried out, gives the logits of the whole text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from langchain_aisp.engine.cache import Cache, ExpandedCache, NoCache, Runner, Unsuited
from langchain_aisp.engine.fused import FusedDecoder
from langchain_aisp.engine.slots import SlotCache

logger = logging.getLogger(__name__)


def choose_cache(model: PreTrainedModel) -> Cache:
    """The first cache that gives the same logits as no cache at all; the log says why others were passed over."""
    name = type(model).__name__
    for kind, make in _KINDS.items():
        try:
            cache = make(model)
            _try_out(cache, model)
        except Exception as error:  # an architecture may fail in any way here, and the next cache then serves it
            logger.info("%s cannot use %s: %s", name, kind, str(error) or type(error).__name__)
        else:
            return cache
    logger.warning("%s decodes without a cache, which is slow", name)
    return NoCache(model)


_KINDS: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "slots past its modules": lambda model: SlotCache(model, FusedDecoder(model)),
    "slots": SlotCache,
    "a copied cache": ExpandedCache,
    "a copied cache that reads one token at a time": partial(ExpandedCache, most=1),
}


@dataclass(frozen=True)
class _Trial:
    """Rows that every cache has to decode as the model itself does; small token ids, which any vocabulary has."""

    prompt: tuple[int, ...]
    chains: tuple[tuple[int, ...], ...]
    parents: tuple[int, ...]
    kept: tuple[int, ...]
    fed: tuple[tuple[int, ...], ...]  # per row, the tokens of three steps; the first row leaves before the last

    def text(self, row: int) -> tuple[int, ...]:
        """All tokens of a row."""
        return (*self.prompt, *self.chains[self.parents[row]][: self.kept[row]], *self.fed[row])

    def steps(self, step: int) -> list[tuple[int, int]]:
        """The rows that take part in a step and the position of the token that each is fed."""
        return [(row, len(self.text(row)) - 3 + step) for row in range(int(step == 2), len(self.parents))]


_TRIALS = (
    _Trial((3, 5, 4, 6), ((7, 2), (8, 5)), (1, 0, 1, 0), (2, 2, 2, 2), ((4, 9, 3), (5, 8, 4), (2, 2, 3), (4, 9, 7))),
    _Trial((9, 3), ((4, 6, 7),), (0, 0), (3, 3), ((2, 6, 8), (5, 6, 3))),
)
_RAGGED_TRIALS = (replace(_TRIALS[0], kept=(2, 1, 2, 0)), _TRIALS[1])


def _try_out(cache: Cache, model: PreTrainedModel) -> None:
    """Raise ``Unsuited`` when two parts that decode by turns get other logits than their whole texts at once."""
    trials = _RAGGED_TRIALS if cache.ragged else _TRIALS
    expected, got = _read_whole(Runner(model), trials, cache.device), _decode_trials(cache, trials)
    error = float((got - expected).abs().max() / expected.std().clamp(min=1e-6))
    if not error <= (1e-3 if _computes_finely(model) else 0.15):  # a NaN is no agreement either
        raise Unsuited(f"its logits are off by {error:.2g} standard deviations")


def _computes_finely(model: PreTrainedModel) -> bool:
    """Whether equal texts give all but equal logits; quantized layers round their inputs, batch by batch."""
    return model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None


@torch.inference_mode()
def _read_whole(run: Runner, trials: Sequence[_Trial], device: torch.device) -> Tensor:
    texts = [trial.text(row) for trial in trials for row in range(len(trial.parents))]
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    logits: Tensor = run(ids, torch.arange(longest, device=device).expand_as(ids), logits=0).logits.float()
    firsts = [sum(len(trial.parents) for trial in trials[:i]) for i in range(len(trials))]
    places = [
        (first + row, at)
        for step in range(3)
        for first, trial in zip(firsts, trials, strict=True)
        for row, at in trial.steps(step)
    ]
    return torch.stack([logits[row, at] for row, at in places])


@torch.inference_mode()
def _decode_trials(cache: Cache, trials: Sequence[_Trial]) -> Tensor:
    tensor = partial(torch.tensor, device=cache.device)
    stores = [cache.open(cache.prefill(t.prompt), t.chains, tensor(t.parents), tensor(t.kept)) for t in trials]
    logits = []
    for step in range(3):
        batch = []
        for store, trial in zip(stores, trials, strict=True):
            if step == 2:
                store.select(tensor(range(1, len(trial.parents))))
            rows, places = zip(*trial.steps(step), strict=True)
            batch.append((store, tensor([trial.fed[row][step] for row in rows]), tensor(places)))
        for together in [batch] if cache.ragged else [[one] for one in batch]:
            logits.append(cache.step(together, 0).float())
    return torch.cat(logits)
