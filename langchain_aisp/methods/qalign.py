"""QAlign: Markov chains over whole responses, which end in samples of the reward-tilted model instead of its maximum.

Sources: "Sample, Don't Search", Faria & Smith 2025, arXiv 2504.03790 (QAlign), and "QUEST: Quality-Aware
Metropolis-Hastings Sampling for Machine Translation", Faria et al. 2024, arXiv 2406.00049 (the proposal).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from langchain_aisp.noise import fold, uniform, wave_keys
from langchain_aisp.types import Info, Problem, Rollouts, Wave, require

_CUTS, _ACCEPTANCES = -1, -2  # folded into the keys of a step; negative, since rows fold their own numbers into them


@dataclass(frozen=True)
class Links:
    """Where the chains are: one response each.

    Attributes:
        tokens: [C, L] int64, -1 after the end.
        keys: [C, L] int64 noise keys.
        lengths: [C] int64.
        rewards: [C] float32.
        complete: [C] bool.
        iterations: [C] int64, the iteration that decoded each.
    """

    tokens: Tensor
    keys: Tensor
    lengths: Tensor
    rewards: Tensor
    complete: Tensor
    iterations: Tensor

    def __len__(self) -> int:
        """Number of chains C."""
        return len(self.rewards)

    def moved(self, proposed: Links, accepted: Tensor) -> Links:
        """These links, or the proposed ones [c ≤ C] where they were accepted [c]; further chains stay."""
        pairs = {name: (getattr(self, name).clone(), getattr(proposed, name)) for name in self.__dataclass_fields__}
        for mine, theirs in pairs.values():
            mine[: len(proposed)][accepted] = theirs[accepted]
        return Links(**{name: mine for name, (mine, _) in pairs.items()})


@dataclass(frozen=True)
class QAlignState:
    """What is being answered, and where the chains are.

    Attributes:
        problem: What to answer.
        iteration: The next iteration.
        drawn: Responses decoded so far.
        links: The chains; None before the first wave.
        last: Whether the chains' last responses are the answers.
    """

    problem: Problem
    iteration: int
    drawn: int
    links: Links | None
    last: bool

    @property
    def answers(self) -> frozenset[tuple[int, int]]:
        """Where the chains stand, if that is wanted; see ``Deciding``."""
        if self.links is None or not self.last:
            return frozenset()
        return frozenset((iteration, row) for row, iteration in enumerate(self.links.iterations.tolist()))

    @property
    def finished(self) -> bool:
        """Never before all samples are drawn."""
        return False


@dataclass(frozen=True)
class QAlign:
    """Metropolis-Hastings over responses, with the model itself as proposal.

    The target is ``p(y) exp(r(y) / β)`` with the model's distribution p and the reward r. A step keeps the n tokens of
    a chain's response up to a uniform cut and redraws the rest; a proposal of n' tokens is accepted with probability
    ``min(1, exp((r' - r) / β) * n / n')``, in which the likelihoods have cancelled out. A wave is a step of all chains;
    its first one is plain samples, those of ``BestOfN`` with the same seed. A step costs one reward call and the tokens
    after the cut, about half a response.

    The method is published for single long chains and leaves β to the task: its values belong to a reward's scale, and
    the default here is ours. So is that a response cut off by a limit never replaces a complete one, which makes the
    target the complete responses.

    By default the best response of all is the answer, as in every search here, which compares the methods as searches
    and makes the answer never worse than that of the first wave. With ``answer="last"`` it is the chains' last state,
    as it is meant by those who want a sample; of several chains it is the best of their last states. N samples of the
    target are N chains.

    At temperature 0 there is one response and nothing to redraw.

    Attributes:
        samples: Responses in all.
        chains: Responses that are decoded together; more chains take fewer steps each.
        reward_temperature: β, in units of the reward.
        answer: ``best`` of all responses, or ``last`` of the chains.
    """

    samples: int = 256
    chains: int = 8
    reward_temperature: float = 1.0
    answer: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        """Reject settings without a step or a target."""
        require(self.samples >= 1, f"samples must be at least 1, got {self.samples}")
        require(
            1 <= self.chains <= self.samples,
            f"chains must be between 1 and samples = {self.samples}, got {self.chains}",
        )
        require(self.reward_temperature > 0, f"reward_temperature must be positive, got {self.reward_temperature}")
        require(self.answer in ("best", "last"), f"answer must be 'best' or 'last', got {self.answer!r}")

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "qalign"

    @property
    def iterations(self) -> int:
        """Steps of the chains, the first samples included."""
        return math.ceil(self.samples / self.chains)

    def init(self, problem: Problem) -> QAlignState:
        """Nothing drawn yet."""
        return QAlignState(problem, 0, 0, None, self.answer == "last")

    def propose(self, state: QAlignState) -> Wave:
        """Plain samples first, then each chain's response with a new end."""
        prompt, sampling = state.problem.prompt, state.problem.sampling
        rows = torch.arange(min(self.chains, self.samples - state.drawn))
        keys = wave_keys(prompt.key, state.iteration, rows, sampling.max_tokens)
        prefix, cut = torch.zeros_like(keys), torch.zeros_like(rows)
        if state.links is not None:
            cut = (self._uniforms(state, len(rows), _CUTS) * state.links.lengths[rows]).long()
            kept = torch.arange(sampling.max_tokens) < cut[:, None]
            keys = torch.where(kept, state.links.keys[rows], keys)
            prefix = torch.where(kept, state.links.tokens[rows], prefix)
        return Wave(prompt, prefix, cut, keys, sampling)

    def update(self, state: QAlignState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[QAlignState, Info]:
        """Accept or reject each chain's proposal."""
        iterations = torch.full_like(wave.cut, state.iteration)
        proposed = Links(rollouts.tokens, wave.keys, rollouts.lengths, rewards, rollouts.complete, iterations)
        links, rate = proposed, 1.0
        if state.links is not None:
            uniforms = self._uniforms(state, len(wave), _ACCEPTANCES)
            accepted = uniforms.log() < self.log_acceptance(state.links, proposed)
            links, rate = state.links.moved(proposed, accepted), float(accepted.float().mean())
        after = replace(state, iteration=state.iteration + 1, drawn=state.drawn + len(wave), links=links)
        return after, {"ess": float(len(wave)), "control_kl": 0.0, "acceptance": rate}

    def log_acceptance(self, links: Links, proposed: Links) -> Tensor:
        """Logarithms of the acceptance ratios [c] of the first c chains' proposals; above 0 is certain."""
        count = len(proposed)
        gains = (proposed.rewards - links.rewards[:count]).double() / self.reward_temperature
        lengths, proposed_lengths = (each.clamp(min=1).double() for each in (links.lengths[:count], proposed.lengths))
        completed = proposed.complete.double() - links.complete[:count].double()
        return torch.where(completed == 0, gains + (lengths / proposed_lengths).log(), completed * torch.inf)

    def _uniforms(self, state: QAlignState, count: int, purpose: int) -> Tensor:
        """One number [count] in (0, 1) per chain for this step."""
        step = fold(fold(state.problem.prompt.key, state.iteration), purpose)
        return uniform(fold(step, torch.arange(count)))
