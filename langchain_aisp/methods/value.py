"""A value network on pre-logits: what reward a response will get, foretold at every token; how it is fitted and kept.

Source: RE-Control, arXiv 2406.05954. Knows tensors only; ``langchain_aisp.fitting`` collects what it is fitted on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from langchain_aisp.noise import fold, normal, uniform
from langchain_aisp.types import require

_LEAST_RESPONSES = 4


@dataclass(frozen=True, eq=False, repr=False)
class ValueNetwork:
    """``V(h) = out · relu(W₂ relu(W₁ h + b₁) + b₂) + b``, the reward that is to be expected after the pre-logit h.

    Two networks with the same weights are equal, and a network's ``repr`` names its weights by a hash, so that cache
    keys tell one network from another.

    Attributes:
        weight_1: W₁ [H, D] float32.
        bias_1: b₁ [H].
        weight_2: W₂ [H, H].
        bias_2: b₂ [H].
        weight_out: [H].
        bias_out: [].
    """

    weight_1: Tensor
    bias_1: Tensor
    weight_2: Tensor
    bias_2: Tensor
    weight_out: Tensor
    bias_out: Tensor

    @property
    def width(self) -> int:
        """D, the width of the pre-logits it reads."""
        return self.weight_1.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights."""
        digest = hashlib.sha256()
        for weight in self.weights.values():
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __eq__(self, other: object) -> bool:
        """Whether the weights are the same."""
        return isinstance(other, ValueNetwork) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        """By the weights."""
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        """Sizes and fingerprint."""
        return f"ValueNetwork(width={self.width}, hidden={len(self.bias_1)}, fingerprint={self.fingerprint!r})"

    def __call__(self, prelogits: Tensor) -> Tensor:
        """Foretold rewards [...] of pre-logits [..., D]."""
        first = prelogits @ self.weight_1.T + self.bias_1
        second = first.relu() @ self.weight_2.T + self.bias_2
        return second.relu() @ self.weight_out + self.bias_out

    def gradient(self, prelogits: Tensor) -> Tensor:
        """Gradients [..., D] of the foretold rewards by the pre-logits [..., D].

        Written out, since engines decode where autograd is off.
        """
        first = prelogits @ self.weight_1.T + self.bias_1
        second = first.relu() @ self.weight_2.T + self.bias_2
        by_second = self.weight_out * (second > 0)
        by_first = (by_second @ self.weight_2) * (first > 0)
        return by_first @ self.weight_1

    def save(self, path: str | Path) -> None:
        """Keep the weights in a file of safetensors."""
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> ValueNetwork:
        """The network that ``save`` kept.

        Raises:
            ValueError: There is no such file, or it holds something else.
        """
        names = [field.name for field in fields(cls)]
        require(Path(path).is_file(), f"there is no value network at {path}; langchain-aisp fit-value makes one")
        try:
            with safe_open(path, framework="pt") as kept:
                found = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is no file of safetensors, and no other is read: {error}") from error
        require(
            sorted(found) == sorted(names),
            f"{path} is no value network: it holds {', '.join(sorted(found)[:6])}, not {', '.join(names)}",
        )
        return cls(**found)


@dataclass(frozen=True)
class Epoch:
    """How a fit stands.

    Attributes:
        loss: Mean over the tokens of the squared errors that are descended, in units of the rewards' variance.
        explained: Share of the held-out rewards' variance that the values at all tokens explain; below 0 they are worse
            than the mean reward.
    """

    loss: float
    explained: float


@dataclass(frozen=True)
class Fit:
    """A fitted network and how it came about.

    Attributes:
        network: The network of the epoch that explains most.
        trace: One record per epoch.
    """

    network: ValueNetwork
    trace: tuple[Epoch, ...]

    @property
    def explained(self) -> float:
        """Share of the held-out rewards' variance that the network explains."""
        return max(epoch.explained for epoch in self.trace)


@dataclass(frozen=True)
class _Walks:
    """Some responses as one sequence of tokens.

    Attributes:
        prelogits: [n, D] float32, of all tokens.
        rewards: [n] float32, of the response that each token is part of.
        following: [n] int64, the token after each; of a response's last one, itself.
        last: [n] bool.
    """

    prelogits: Tensor
    rewards: Tensor
    following: Tensor
    last: Tensor

    @classmethod
    def of(cls, prelogits: Sequence[Tensor], rewards: Tensor) -> _Walks:
        lengths = torch.tensor([len(each) for each in prelogits])
        ends = lengths.cumsum(0) - 1
        last = torch.zeros(int(lengths.sum()), dtype=torch.bool)
        last[ends] = True
        following = torch.where(last, torch.arange(len(last)), torch.arange(len(last)) + 1)
        return cls(torch.cat(list(prelogits)).float(), rewards.float().repeat_interleave(lengths), following, last)


def fit(
    prelogits: Sequence[Tensor],
    rewards: Tensor,
    *,
    hidden: int | None = None,
    epochs: int = 100,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    held_out: float = 0.1,
    seed: int = 0,
) -> Fit:
    """Fit a value network to responses of the model itself, by temporal differences.

    What is descended is, per response, ``Σ_t (V(h_t) - V(h_{t+1}))²`` with the second value held fixed, plus
    ``(V(h_last) - r)²``. The last responses are held out, and the epoch whose values explain their rewards best is
    kept: so give responses to one prompt side by side, and none of the held-out prompts is trained on.

    The network computes with centred pre-logits and rewards of unit scale; these scales are folded into its weights, so
    that it reads the model's own pre-logits and foretells rewards in the reward's own unit.

    Args:
        prelogits: S responses, [tokens, D] each: the pre-logits that their tokens were drawn from.
        rewards: [S], their rewards.
        hidden: H, width of the two inner layers; D unless given, as published.
        epochs: Most passes over the responses.
        learning_rate: Of Adam.
        batch_size: Responses per step.
        held_out: Share of the responses that only choose the epoch.
        seed: Fixes first weights and order.

    Raises:
        ValueError: There is nothing to learn from.
    """
    kept = [row for row, walk in enumerate(prelogits) if len(walk) > 0]
    walks, rewards = [prelogits[row] for row in kept], rewards.float()[kept]
    require(
        len(walks) >= _LEAST_RESPONSES,
        f"a value network needs {_LEAST_RESPONSES} responses or more, got {len(walks)}",
    )
    require(0 < held_out < 1, f"held_out must be a share between 0 and 1, got {held_out}")
    require(epochs >= 1, f"epochs must be at least 1, got {epochs}")
    aside = min(len(walks) - 1, max(1, round(held_out * len(walks))))
    trained, others = slice(None, -aside), slice(-aside, None)
    scales = _Scales.of(walks[trained], rewards[trained])
    scaled = [scales.prelogits(walk) for walk in walks]
    targets = scales.rewards(rewards)
    unseen = _Walks.of(scaled[others], targets[others])
    weights = _first_weights(scaled[0].shape[1], hidden or scaled[0].shape[1], seed)
    descent = torch.optim.Adam(weights.values(), lr=learning_rate)
    trace, best = list[Epoch](), (-float("inf"), dict[str, Tensor]())
    for epoch in range(epochs):
        order = uniform(fold(fold(seed, epoch), torch.arange(len(walks) - aside))).argsort()
        losses = [
            _descend(weights, descent, _Walks.of([scaled[row] for row in rows.tolist()], targets[rows]))
            for rows in order.split(batch_size)
        ]
        now = Epoch(sum(losses) / len(losses), _explained(ValueNetwork(**weights), unseen))
        trace.append(now)
        if now.explained > best[0]:
            best = now.explained, {name: weight.detach().clone() for name, weight in weights.items()}
    require(bool(best[1]), "the fit came to nothing: its values are no numbers; try a smaller learning_rate")
    return Fit(scales.undone(ValueNetwork(**best[1])), tuple(trace))


@dataclass(frozen=True)
class _Scales:
    """Units in which a network learns easily: one scale for all directions, so that steps along gradients stay true."""

    centre: Tensor  # [D]
    spread: Tensor  # []
    mean: Tensor  # []
    deviation: Tensor  # []

    @classmethod
    def of(cls, walks: Sequence[Tensor], rewards: Tensor) -> _Scales:
        tokens = torch.cat(list(walks)).float()
        deviation = rewards.std(correction=0)
        require(float(deviation) > 0, f"all {len(rewards)} rewards are {float(rewards[0])}: there is nothing to learn")
        centre = tokens.mean(dim=0)
        return cls(centre, (tokens - centre).square().mean().sqrt().clamp(min=1e-12), rewards.mean(), deviation)

    def prelogits(self, walk: Tensor) -> Tensor:
        return (walk.float() - self.centre) / self.spread

    def rewards(self, rewards: Tensor) -> Tensor:
        return (rewards - self.mean) / self.deviation

    def undone(self, network: ValueNetwork) -> ValueNetwork:
        """The network that reads and foretells in the original units."""
        weight_1 = network.weight_1 / self.spread
        return replace(
            network,
            weight_1=weight_1,
            bias_1=network.bias_1 - weight_1 @ self.centre,
            weight_out=network.weight_out * self.deviation,
            bias_out=network.bias_out * self.deviation + self.mean,
        )


def _first_weights(width: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """Weights that keep the scale of what passes through, and values of zero."""
    rows = torch.arange(hidden)
    weights = {
        "weight_1": normal(fold(fold(seed, -1), rows), width) * (2 / width) ** 0.5,
        "bias_1": torch.zeros(hidden),
        "weight_2": normal(fold(fold(seed, -2), rows), hidden) * (2 / hidden) ** 0.5,
        "bias_2": torch.zeros(hidden),
        "weight_out": torch.zeros(hidden),
        "bias_out": torch.zeros(()),
    }
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def _descend(weights: dict[str, Tensor], descent: torch.optim.Optimizer, walks: _Walks) -> float:
    """One step; the loss before it."""
    values = ValueNetwork(**weights)(walks.prelogits)
    following = torch.where(walks.last, walks.rewards, values.detach()[walks.following])
    loss = (values - following).square().mean()
    descent.zero_grad()
    loss.backward()
    descent.step()
    return float(loss.detach())


@torch.no_grad()
def _explained(network: ValueNetwork, walks: _Walks) -> float:
    """Share of the rewards' squared distance from zero, their mean, that the values explain, over all tokens."""
    left = (network(walks.prelogits) - walks.rewards).square().sum()
    return float(1 - left / walks.rewards.square().sum().clamp(min=1e-12))
