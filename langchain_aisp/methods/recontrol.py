"""RE-Control: every pre-logit climbs the value that a network foretells, before the model's head sees it.

Source: "Aligning Large Language Models with Representation Editing: A Control Perspective", Kong et al., NeurIPS 2024,
arXiv 2406.05954.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from langchain_aisp.methods.greedy import Greedy
from langchain_aisp.methods.value import ValueNetwork
from langchain_aisp.types import Info, Method, Problem, Rollouts, Steering, Wave, require


@dataclass(frozen=True)
class ValueSteering:
    """Moves each pre-logit uphill: ``h ← h + step_size * ∇V(h)``, ``steps`` times.

    Attributes:
        value: V.
        step_size: In units of pre-logits squared per unit of reward.
        steps: How often.
    """

    value: ValueNetwork
    step_size: float
    steps: int

    @property
    def open_loop(self) -> bool:
        """The offset depends on the model's pre-logits."""
        return False

    def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        """How far the pre-logits [r, D] of some rows move; see ``Steering``."""
        assert hidden is not None, "a closed-loop steering is shown the pre-logits"
        value = _beside(self.value, hidden.device)
        moved = hidden
        for _ in range(self.steps):
            moved = moved + self.step_size * value.gradient(moved)
        return moved - hidden


@dataclass(frozen=True)
class SumSteering:
    """Adds up the offsets of other steerings, each of which is shown the model's own pre-logits.

    Attributes:
        parts: The steerings.
    """

    parts: tuple[Steering, ...]

    @property
    def open_loop(self) -> bool:
        """Whether no part looks at the pre-logits."""
        return all(part.open_loop for part in self.parts)

    def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        """The sum [r, D] of the parts' offsets; see ``Steering``."""
        offsets = [part.offset(rows, positions, keys, None if part.open_loop else hidden) for part in self.parts]
        return torch.stack(offsets).sum(dim=0)


@dataclass(frozen=True)
class REControl:
    """Another search, by default the one greedy answer, whose every wave is steered by a value network.

    The network is fitted once for a model and a reward (``langchain_aisp.fitting.fit_value``, or ``langchain-aisp
    fit-value``), on answers of the model itself; at decoding the reward is asked for the finished answers only.
    Published settings: greedy decoding, step size 1.0, 30 steps, inner layers as wide as the pre-logits (4096), 128
    tokens. A step size means something only beside the scale of a model's pre-logits and of a reward: choose it on
    prompts that are not tested on.

    ``REControl(value)`` is the published method, one answer for one reward call. ``REControl(value,
    method=BestOfN(samples=64))`` is its best of 64 samples, and any other search can be steered like that: controls of
    ``AISP`` and the value's are added up. Costs and budget are those of the inner method; one that promises never to be
    worse than plain samples does so no more, since its plain samples are steered too.

    Published code and paper disagree in places (depth of the network, the token that gets the reward); this is the
    method: three layers, the reward at the last token, the next token's value held fixed.

    Attributes:
        value: V, from ``ValueNetwork.load`` or a fit.
        step_size: Of each step uphill.
        steps: Steps per token.
        method: Whose waves are steered.
    """

    value: ValueNetwork
    step_size: float = 1.0
    steps: int = 30
    method: Method[Any] = field(default_factory=Greedy)

    def __post_init__(self) -> None:
        """Reject settings that steer nowhere."""
        require(
            isinstance(self.value, ValueNetwork),
            f"value must be a ValueNetwork, got {self.value!r}; ValueNetwork.load(path) reads one",
        )
        require(self.step_size > 0, f"step_size must be positive, got {self.step_size}")
        require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "re_control" if isinstance(self.method, Greedy) else f"re_control+{self.method.name}"

    @property
    def iterations(self) -> int:
        """The inner method's."""
        return self.method.iterations

    def init(self, problem: Problem) -> Any:
        """The inner method's.

        Raises:
            ValueError: The network was fitted on another model.
        """
        width = problem.head.width
        require(
            self.value.width == width,
            f"the value network reads pre-logits of width {self.value.width}, this model has {width}: fit it on this "
            "model, with langchain_aisp.fitting.fit_value or langchain-aisp fit-value",
        )
        return self.method.init(problem)

    def propose(self, state: Any) -> Wave:
        """The inner method's wave, steered."""
        wave = self.method.propose(state)
        steering: Steering = ValueSteering(self.value, self.step_size, self.steps)
        if wave.steering is not None:
            steering = SumSteering((wave.steering, steering))
        return replace(wave, steering=steering)

    def update(self, state: Any, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[Any, Info]:
        """The inner method's, which knows its own steering only."""
        return self.method.update(state, wave, rollouts, rewards)


@lru_cache(maxsize=8)
def _beside(value: ValueNetwork, device: torch.device) -> ValueNetwork:
    """The network on a device; moved once, not at every token."""
    return replace(value, **{name: weight.to(device) for name, weight in value.weights.items()})
