"""What each ingredient of the default AISP is worth: one arm per change, at equal samples, paired with the default.

Why: a method of many parts may owe everything to one of them. An ingredient that is an option of `AISP` is changed by
that option; one that is not is replaced in a small subclass here, which overrides a verb and leaves the rest alone.
All arms decode whole waves, lead no text and cross no parents, so that nothing else differs; the last four show what
rows in the places of others change, a text that is led where the reward understands unfinished ones, crossings, and all
of these, which is how a user gets it. The reward, the gold reward, the log-probability of the answers and the costs
stand beside each other.

A second question needs the same runs: would tuning have paid? The arms that are options of `AISP` are settings that a
user might have tried, and the best of them is known afterwards. What the default is better than a plain sample, as a
share of what that one is, is told of each pair; `--options` asks this question alone. On dev prompts the arms may still
change the method; once it is frozen, `--split test` asks both questions of prompts that nothing was chosen on.

Runs are kept one by one, as in `benchmarks.quality`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import save
from benchmarks.pairs import PAIRS, RUNS, Sources, add_sources, sources_of
from benchmarks.quality import Questions, compare, mean, possible, run_arms, show, traces
from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.methods import AISP, BestOfN, PublishedAISP
from langchain_aisp.methods.aisp import AISPState
from langchain_aisp.methods.branching import Population
from langchain_aisp.methods.misvo import PositionSteering, advantages, slopes_of
from langchain_aisp.methods.weights import complete_first, importance_weights
from langchain_aisp.noise import fold, uniform, wave_keys
from langchain_aisp.types import Info, Method, Problem, Rollouts, Sampling, Wave, require

DEFAULT, USED = "default", "overlap, guidance and crossings"
ALIKE = 1e6  # a reward temperature at which all parents weigh the same
_CUTS, _PARENTS, _SHARES = -1, -2, -3  # folded into keys; negative, since rows fold their own numbers into them

# ---------------------------------------------------------------------------------------------------------------------
# Ingredients that are no options


@dataclass(frozen=True)
class UniformCuts(AISP):
    """Suffix moves: a parent up to a uniform cut, then whatever the model says, as QUEST and QAlign propose.

    What follows the cut is drawn at the request's own temperature, since no branching token brings variety.
    """

    def propose(self, state: AISPState) -> Wave:
        """Plain samples first, then parents with new ends."""
        wave, population = super().propose(state), state.population
        if population is None:
            return wave
        parents = draw_parents(state.weights, _row_keys(state, _PARENTS, len(wave)))
        cut = (uniform(_row_keys(state, _CUTS, len(wave))) * population.lengths[parents]).long()
        kept = torch.arange(wave.prefix.shape[1]) < cut[:, None]
        fresh = wave_keys(wave.prompt.key, state.waves, torch.arange(len(wave)), wave.prefix.shape[1])
        return replace(
            wave,
            prefix=torch.where(kept, population.tokens[parents], 0),
            cut=cut,
            keys=torch.where(kept, population.keys[parents], fresh),
            sampling=state.problem.sampling,
        )


@dataclass(frozen=True)
class UniformPositions(AISP):
    """Branches at uniform positions instead of where the model was undecided; tokens still by its probabilities."""

    def propose(self, state: AISPState) -> Wave:
        """The default's wave from a population whose positions all have the same mass of branches."""
        if state.population is None:
            return super().propose(state)
        return super().propose(replace(state, population=level(state.population), cuts=None, branches=None))


def level(population: Population) -> Population:
    """The population as if the model had never foretold its members' own tokens: all mass is on the branches."""
    own = population.alternatives == population.tokens[..., None]
    return replace(population, logprobs=population.logprobs.masked_fill(own, -torch.inf))


@dataclass(frozen=True)
class WithReplacement(AISP):
    """Branches drawn one by one, each as if none had been drawn before."""

    def propose(self, state: AISPState) -> Wave:
        """As many waves of one branch as the default's wave has rows, side by side."""
        if state.population is None:
            return super().propose(state)
        one, forgetful = sized(self, 1), replace(state, visited=state.visited[:0], branches=None)
        first = -(state.waves * self.samples)  # below all iterations, so that no noise is used twice
        numbers = range(first, first - self.wave_size(state), -1)
        return side_by_side([one.propose(replace(forgetful, waves=number)) for number in numbers])


@dataclass(frozen=True)
class ByParent(AISP):
    """Every parent gets its share of the wave, by weights of a rule of one's own; branches as in the default.

    With the default's rule it shows what drawing parent by parent does; with another one, what the rule does.

    Attributes:
        reward_temperature: λ in units of the reward; None takes it by the effective sample size, as the default does.
    """

    reward_temperature: float | None = None

    def propose(self, state: AISPState) -> Wave:
        """Waves of single parents, side by side."""
        population = state.population
        if population is None:
            return super().propose(state)
        offset = float(uniform(_row_keys(state, _SHARES, 1)))
        counts = shares(state.weights, self.wave_size(state), offset)
        alone = [only(state, population, row) for row in range(len(population))]
        first = -(state.waves * self.population)  # below all iterations, so that no noise is used twice
        return side_by_side(
            [
                sized(self, count).propose(replace(alone[row], waves=first - row))
                for row, count in enumerate(counts)
                if count > 0
            ]
        )

    def _weights(self, population: Population, drawn: int) -> Tensor:
        if self.reward_temperature is None:
            return super()._weights(population, drawn)
        rewards = complete_first(population.rewards, population.complete)
        return importance_weights(rewards, self.reward_temperature)


@dataclass(frozen=True)
class SteadyWeights(AISP):
    """An effective sample size that is the same throughout.

    Attributes:
        effective: Parents that the weights are worth.
    """

    effective: float = 2.0

    def _weights(self, population: Population, drawn: int) -> Tensor:
        return population.weights(self.effective)


@dataclass(frozen=True)
class SizedWave(AISP):
    """A wave of so many rows.

    Attributes:
        rows: How many.
    """

    rows: int = 1

    def wave_size(self, state: AISPState) -> int:
        """As set."""
        return self.rows


def sized(method: AISP, rows: int) -> SizedWave:
    """The default with a method's settings, for waves of so many rows."""
    return SizedWave(**{field.name: getattr(method, field.name) for field in fields(AISP)}, rows=rows)


@dataclass(frozen=True)
class PositionState(AISPState):
    """The default's state, and what the samples so far say about a control for each position.

    Attributes:
        slopes: [L, D], sums of advantage times score at each position.
        metric: [D, D], the sum over all decoded tokens of score times score.
        counts: [L], how many tokens were decoded at each position.
    """

    _: KW_ONLY
    slopes: Tensor
    metric: Tensor
    counts: Tensor

    def controls(self, kl: float) -> Tensor:
        """Controls [L, D] along which rewards rise, on average ``kl`` nats per decoded token long."""
        tokens = self.counts.sum().clamp(min=1)
        fisher = self.metric / tokens
        floored = fisher + 0.1 * fisher.diagonal().mean().clamp(min=1e-12) * torch.eye(len(fisher))
        rise = torch.linalg.solve(floored, (self.slopes / self.counts.clamp(min=1)[:, None]).T).T
        nats = torch.einsum("t,td,de,te->", self.counts / tokens, rise, fisher, rise) / 2
        return rise * (kl / nats.clamp(min=1e-12)).sqrt() if nats > 0 else torch.zeros_like(rise)


@dataclass(frozen=True)
class PositionControl(AISP):
    """A control for each position instead of one that all share; ``control_kl`` nats per token long.

    It always has that length, where the shared one is the shorter the less it foretells.
    """

    control_kl: float = 0.1

    def __post_init__(self) -> None:
        """Reject a control of no length, for which nothing is observed."""
        super().__post_init__()
        require(self.control_kl > 0, f"control_kl must be positive here, got {self.control_kl}")

    def init(self, problem: Problem) -> PositionState:
        """Nothing seen yet."""
        length, width = problem.sampling.max_tokens, problem.head.width
        metric, plain = torch.zeros(width, width), super().init(problem)
        known = {field.name: getattr(plain, field.name) for field in fields(plain)}
        return PositionState(**known, slopes=torch.zeros(length, width), metric=metric, counts=torch.zeros(length))

    def propose(self, state: AISPState) -> Wave:
        """The default's wave under controls of its own."""
        assert isinstance(state, PositionState)
        wave = super().propose(state)
        controls = None if state.population is None else PositionSteering(state.controls(self.control_kl))
        return replace(wave, steering=controls)

    def update(self, state: AISPState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[AISPState, Info]:
        """Also learn from the scores of the decoded tokens."""
        assert isinstance(state, PositionState)
        after, info = super().update(state, wave, rollouts, rewards)
        positions = torch.arange(wave.keys.shape[1])
        decoded = (positions >= wave.cut[:, None]) & (positions < rollouts.lengths[:, None])
        scores = rollouts.observed["scores"].where(decoded[..., None], 0)
        slopes = slopes_of(scores, advantages(rewards, rollouts.complete, decoded)) * len(wave)
        new = scores[decoded]
        learnt: AISPState = replace(
            after,  # type: ignore[arg-type]
            slopes=state.slopes + slopes,
            metric=state.metric + new.T @ new,
            counts=state.counts + decoded.sum(dim=0),
        )
        return learnt, info


def only(state: AISPState, population: Population, row: int) -> AISPState:
    """The state as if one of the members were the only one."""
    cuts = None if state.cuts is None else state.cuts[row : row + 1]
    alone = population.take(torch.tensor([row]))
    return replace(state, population=alone, weights=torch.ones(1), cuts=cuts, branches=None)


def draw_parents(weights: Tensor, keys: Tensor) -> Tensor:
    """Members [n] drawn with replacement by their weights [M], one per key [n]."""
    return torch.searchsorted(weights.double().cumsum(0), uniform(keys).double()).clamp(max=len(weights) - 1)


def shares(weights: Tensor, count: int, offset: float) -> list[int]:
    """How often each of M members is taken, ``count`` in all: systematic resampling with an offset in [0, 1)."""
    ends = (weights.double().cumsum(0) / weights.double().sum() * count + offset).floor().long()
    ends[-1] = count
    return torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)).clamp(min=0).tolist()


def side_by_side(waves: Sequence[Wave]) -> Wave:
    """The rows of waves that differ in nothing else."""
    parts = {name: torch.cat([getattr(wave, name) for wave in waves]) for name in ("prefix", "cut", "keys")}
    return replace(waves[0], **parts)


def _row_keys(state: AISPState, purpose: int, count: int) -> Tensor:
    """One key per row of the state's wave."""
    return fold(fold(fold(state.problem.prompt.key, state.waves), purpose), torch.arange(count))


# ---------------------------------------------------------------------------------------------------------------------
# The arms


def arms(samples: int, sampling: Sampling) -> list[Arm]:
    """The default first, then one arm per change, named by what it changes."""
    waves = AISP(samples).iterations
    wave, size = max(1, samples // waves), {"samples": samples, "overlap": 1, "guidance": 0.0, "crossings": 0.0}
    others = [number for number in (2, 4, 8, 16, 32) if number != waves and number <= samples]
    methods: dict[str, Method[Any]] = {
        DEFAULT: AISP(**size),
        "branching: no token ahead": AISP(**size, lookahead=0),
        "branching: none, plain samples": BestOfN(samples, samples_per_wave=wave),
        "branching: uniform cuts": UniformCuts(**size),
        "branching: uniform positions": UniformPositions(**size),
        "replacement: with": WithReplacement(**size),
        **{f"population: {count}": AISP(**size, population=count) for count in (1, 2, 4, 8)},
        "lambda: same size throughout": SteadyWeights(**size),
        "lambda: by parent, by sample size": ByParent(**size),
        **{f"lambda: by parent, {each:g}": ByParent(**size, reward_temperature=each) for each in (0.1, 1.0)},
        "lambda: by parent, all alike": ByParent(**size, reward_temperature=ALIKE),
        **{f"control: shared, {kl:g} nats": AISP(**size, control_kl=kl) for kl in (0.1, 0.3, 1.0)},
        **{f"control: per position, {kl:g} nats": PositionControl(**size, control_kl=kl) for kl in (0.1, 0.3)},
        **{f"waves: {number}": AISP(**{**size, "iterations": number}) for number in others},
        **{f"decode: cooling {each:g}": AISP(**size, cooling=each) for each in (0.0, 0.5, 1.0)},
        "published: argmax": PublishedAISP(wave, waves),
        "published: sample": PublishedAISP(wave, waves, decode="sample"),
        "overlap: with": AISP(samples, guidance=0.0, crossings=0.0),
        "guidance: with": AISP(samples, overlap=1, crossings=0.0),
        "crossings: with": AISP(samples, overlap=1, guidance=0.0),
        USED: AISP(samples),
    }
    return [Arm(label, method, sampling, samples) for label, method in methods.items()]


def is_option(arm: Arm) -> bool:
    """Whether a user might have tried it: the default with other options, and no other method."""
    return type(arm.method) is AISP


def arm_at(number: int, samples: int, sampling: Sampling) -> Arm:
    """One of the arms, for the process that runs it."""
    return arms(samples, sampling)[number]


@dataclass(frozen=True)
class Plan:
    """Sizes of the ablations, and where runs are kept.

    Attributes:
        samples: Responses that a search may decode.
        prompts: Prompts of each pair.
        split: Of which split.
        temperature: Of the requests; 1 is how a user gets it.
        options: Whether only options of ``AISP`` are tried.
        workers: Processes.
        folder: Where single runs are kept.
    """

    samples: int = 128
    prompts: int = 30
    split: str = "dev"
    temperature: float = 1.0
    options: bool = False
    workers: int = 2
    folder: Path = RUNS / "ablations"


def ablate(pair: str, sources: Sources, plan: Plan) -> dict[str, Any]:
    """Run the arms on prompts of a pair and compare."""
    sampling = Sampling(max_tokens=PAIRS[pair].max_tokens, temperature=plan.temperature)
    everything = arms(plan.samples, sampling)
    numbers = [number for number, arm in enumerate(everything) if is_option(arm) or not plan.options]
    makers = [partial(arm_at, number, plan.samples, sampling) for number in numbers]
    asked = Questions(pair, sources, plan.split, plan.prompts)
    paths = run_arms(asked, makers, plan.folder, plan.workers)
    told = compare(paths, DEFAULT)
    show(f"{pair} at {plan.samples} samples", told, DEFAULT)
    plain = mean([trace[0]["mean"] for trace in traces(paths[USED], told["prompt_ids"])])
    rewards = {arm.label: told["arms"][arm.label]["reward"]["mean"] for arm in everything if is_option(arm)}
    found = closeness(rewards, plain)
    print(f"{pair}: the default earns {found['share']:.3f} of what {found['best']} earns beyond a plain sample")
    return {**told, "tuning": found}


def closeness(rewards: Mapping[str, float], plain: float) -> dict[str, Any]:
    """How near the default as a user gets it comes to the best of some settings.

    Args:
        rewards: Mean rewards of the settings, with ``USED`` among them.
        plain: That of a plain sample; a reward's zero means nothing.
    """
    best = max(rewards, key=lambda name: rewards[name])
    share = (rewards[USED] - plain) / max(rewards[best] - plain, 1e-9)
    return {"plain": plain, "default": rewards[USED], "best": best, "tuned": rewards[best], "share": share}


def main() -> None:
    """Ablate on two pairs, or others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=["demo", "similarity"])
    add_sources(parser)
    parser.add_argument("--samples", type=int, default=Plan.samples)
    parser.add_argument("--prompts", type=int, default=Plan.prompts, help="prompts of each pair")
    parser.add_argument("--split", choices=("dev", "test"), default=Plan.split)
    parser.add_argument("--temperature", type=float, default=Plan.temperature)
    parser.add_argument("--options", action="store_true", help="only what a user might have tried: options of AISP")
    parser.add_argument("--workers", type=int, default=Plan.workers, help="processes of one thread each")
    parser.add_argument("--runs", type=Path, default=Plan.folder, help="where single runs are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan(args.samples, args.prompts, args.split, args.temperature, args.options, args.workers, args.runs)
    sources = sources_of(args)
    settings = {"samples": plan.samples, "split": plan.split, "temperature": plan.temperature, "options": plan.options}
    for pair in possible(args.pairs, sources):
        save(f"ablations-{pair}", {**settings, **ablate(pair, sources, plan)})


if __name__ == "__main__":
    main()
