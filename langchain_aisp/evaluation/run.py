"""Methods × prompts × seeds: every search is run once, logged with all its samples, and never run again.

All methods answer a prompt before the next one comes, so that a comparison that was stopped early is paired. The
prompt is read before the clock starts, for every method alike: the engine remembers it, and the first method would pay
for all.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from langchain_aisp import __version__
from langchain_aisp.align import Aligned, Budget, Candidate, Iteration, align, iterate
from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.evaluation.datasets import PromptRecord, fingerprint
from langchain_aisp.evaluation.log import RunLog
from langchain_aisp.methods import BestOfN
from langchain_aisp.rewards.foreign import is_of_this_process
from langchain_aisp.types import (
    Chat,
    Engine,
    Response,
    Reward,
    Sampling,
    Wave,
    require,
)

_Said = tuple[str, str]  # what the rewards can tell apart: text and finish reason


@dataclass(frozen=True)
class Sample:
    """One decoded response.

    Attributes:
        iteration: The wave that decoded it.
        row: Its row there.
        tokens: Its token ids, the end token included.
        text: What it says.
        reward: Its score by the reward that was optimised.
        gold: Its score by the held-out reward, None where it was not asked.
        finish_reason: ``stop``, ``length`` or ``timeout``.
        cut: How many of its tokens were kept from earlier ones or set by the method, before it was decoded.
        parent: Iteration and row of the earlier sample that shares most of the kept tokens, of several the one with the
            highest reward; None if none begins the same.
    """

    iteration: int
    row: int
    tokens: tuple[int, ...]
    text: str
    reward: float
    gold: float | None
    finish_reason: str
    cut: int
    parent: tuple[int, int] | None


@dataclass(frozen=True)
class Run:
    """One method's answer to one prompt with one seed, and all that led to it.

    Attributes:
        method: Label of the arm.
        prompt: Id of the prompt.
        seed: Seed of the request.
        messages: What was answered.
        reference: The data set's own answer, if it has one.
        text: The answer.
        reward: Its reward.
        gold: Its held-out reward, if there is one.
        finish_reason: Why the answer ended.
        place: Iteration and row of the sample that is the answer.
        base_logprob: Its log-probability in nats under the model at temperature 1, end token included, if asked for.
        stopped: The limit that ended the search.
        prompt_tokens: Length of the prompt.
        sampled_tokens: Tokens decoded.
        reward_calls: Responses scored, equal ones once; the held-out reward does not count.
        seconds: Wall-clock time of the search.
        reward_seconds: Part of it that was spent on waiting for rewards.
        samples: Every response, in the order of decoding.
        trace: After each iteration its numbers, and the held-out reward of the best response so far as ``gold``.
    """

    method: str
    prompt: str
    seed: int
    messages: tuple[Mapping[str, Any], ...]
    reference: str | None
    text: str
    reward: float
    gold: float | None
    finish_reason: str
    place: tuple[int, int]
    base_logprob: float | None
    stopped: str
    prompt_tokens: int
    sampled_tokens: int
    reward_calls: int
    seconds: float
    reward_seconds: float
    samples: tuple[Sample, ...]
    trace: tuple[Mapping[str, float | None], ...]


@dataclass(frozen=True)
class Progress:
    """News of an evaluation.

    Attributes:
        done: Runs that the file holds.
        total: Runs that it will hold.
        method: Label of the arm that is at work.
        iteration: What its last iteration brought.
        run: The run, once it is done and logged.
    """

    done: int
    total: int
    method: str
    iteration: Iteration | None = None
    run: Run | None = None


@dataclass(frozen=True)
class Evaluation:
    """What is compared, and on what.

    Attributes:
        engine: Decodes for all arms.
        reward: What the arms optimise.
        arms: The rivals.
        prompts: What they answer.
        gold: A held-out reward that no arm sees.
        seeds: Every prompt is answered once per seed.
        budget: What every search may spend, beside what its arm and method say.
        base_logprobs: Also measure how likely the model finds each answer; the time for it does not count.
        gold_of: The held-out reward judges all ``samples``, or only the ``answers``: the best so far at each iteration.
        dataset: Name of the prompts, for people.
    """

    engine: Engine
    reward: Reward
    arms: tuple[Arm, ...]
    prompts: tuple[PromptRecord, ...]
    gold: Reward | None = None
    seeds: tuple[int, ...] = (0,)
    budget: Budget = field(default_factory=Budget)
    base_logprobs: bool = False
    gold_of: Literal["samples", "answers"] = "samples"
    dataset: str = "prompts"

    def __post_init__(self) -> None:
        """Reject what leaves nothing to compare."""
        require(bool(self.arms), "an evaluation needs a method at least")
        require(bool(self.prompts), "an evaluation needs a prompt at least")
        require(bool(self.seeds), "an evaluation needs a seed at least")
        require(len(set(self.seeds)) == len(self.seeds), f"each seed counts once, got {self.seeds}")
        names = [arm.label for arm in self.arms]
        require(len(set(names)) == len(names), f"the methods need different labels, got {names}")

    @property
    def total(self) -> int:
        """Number of runs."""
        return len(self.arms) * len(self.prompts) * len(self.seeds)

    @property
    def config(self) -> dict[str, Any]:
        """What pins the results, as JSON: equal configurations give equal runs, up to their seconds."""
        adapters = dict(getattr(self.engine, "adapters", {}))
        return {
            "version": __version__,
            "model": self.engine.name,
            **({"adapters": adapters} if adapters else {}),
            "chat_template": getattr(self.engine, "chat_template", None),
            "reward": _described(self.reward),
            "gold": None if self.gold is None else _described(self.gold),
            "gold_of": self.gold_of,
            "prompts": {
                "name": self.dataset,
                "count": len(self.prompts),
                "fingerprint": fingerprint(self.prompts),
            },
            "seeds": list(self.seeds),
            "budget": repr(self.budget),
            "base_logprobs": self.base_logprobs,
            "methods": {arm.label: arm.settings for arm in self.arms},
        }


def evaluate(evaluation: Evaluation, path: str | Path) -> Iterator[Progress]:
    """Run what the file does not hold yet, and append each run once it is done.

    Leaving early, by an exception or a signal, loses the run under way only; the same call goes on where it was.

    Args:
        evaluation: What to run.
        path: A file of JSON lines, see ``log``.

    Yields:
        News after each iteration and each run.

    Raises:
        ValueError: The file was begun with another configuration.
    """
    with RunLog(path, evaluation.config) as log:
        if len(log.done) < evaluation.total:
            log.append("session", environment())
        for prompt in evaluation.prompts:
            for seed in evaluation.seeds:
                missing = [arm for arm in evaluation.arms if (arm.label, prompt.id, seed) not in log.done]
                if missing:
                    _warm_up(evaluation, prompt)
                for arm in missing:
                    for step in answer(evaluation, arm, prompt, seed):
                        done, run = (step, None) if isinstance(step, Iteration) else (None, step)
                        if run is not None:
                            log.append("run", asdict(run))
                        yield Progress(len(log.done), evaluation.total, arm.label, done, run)


def answer(evaluation: Evaluation, arm: Arm, prompt: PromptRecord, seed: int) -> Iterator[Iteration | Run]:
    """Answer one prompt by one arm: its iterations and, last, the run."""
    budget = evaluation.budget if arm.samples is None else replace(evaluation.budget, samples=arm.samples)
    settings: Any = {"sampling": arm.sampling, "seed": seed, "budget": budget}
    for step in iterate(evaluation.engine, evaluation.reward, arm.method, prompt.messages, **settings):
        if isinstance(step, Iteration):
            yield step
        else:
            yield _run(evaluation, arm, prompt, seed, step)


def environment() -> dict[str, Any]:
    """The machine and the versions: seconds mean nothing without them."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    """What the processor is sold as, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _described(reward: Reward) -> dict[str, Any]:
    """Name and identity of a reward, and how it reads conversations; an identity of this process pins nothing."""
    known = None if is_of_this_process(reward.fingerprint) else reward.fingerprint
    settings = getattr(reward, "settings", None)  # a reward model's template and its policy for BOS and EOS
    name = Path(reward.name).name if Path(reward.name).is_dir() else reward.name  # where it lies is nobody's concern
    return {"name": name, "fingerprint": known, "settings": None if settings is None else repr(settings)}


def _warm_up(evaluation: Evaluation, prompt: PromptRecord) -> None:
    """Read the prompt, and load the reward model before its first call is timed."""
    sampling = Sampling(max_tokens=1)
    align(evaluation.engine, evaluation.reward, BestOfN(samples=1), prompt.messages, sampling=sampling)


def _run(evaluation: Evaluation, arm: Arm, prompt: PromptRecord, seed: int, found: Aligned) -> Run:
    """What is kept of a search."""
    golds = _golds(evaluation, prompt.messages, found)
    best = found.best
    return Run(
        method=arm.label,
        prompt=prompt.id,
        seed=seed,
        messages=prompt.messages,
        reference=prompt.reference,
        text=best.response.text,
        reward=best.reward,
        gold=golds.get(_said(best.response)),
        finish_reason=best.response.finish_reason,
        place=(best.iteration, best.row),
        base_logprob=_base_logprob(evaluation.engine, found) if evaluation.base_logprobs else None,
        stopped=found.stopped,
        prompt_tokens=found.prompt_tokens,
        sampled_tokens=found.sampled_tokens,
        reward_calls=found.reward_calls,
        seconds=found.seconds,
        reward_seconds=found.reward_seconds,
        samples=_samples(found.candidates, golds),
        trace=tuple(_numbers(step, golds) for step in found.trace),
    )


def _golds(evaluation: Evaluation, chat: Chat, found: Aligned) -> dict[_Said, float]:
    """Held-out rewards of what was said; empty without a held-out reward."""
    if evaluation.gold is None:
        return {}
    everything = [candidate.response for candidate in found.candidates]
    responses = everything if evaluation.gold_of == "samples" else [step.response for step in found.trace]
    distinct = {_said(response): response for response in responses}
    scores = evaluation.gold.submit([(chat, response) for response in distinct.values()]).future.result()
    return dict(zip(distinct, scores.tolist(), strict=True))


def _said(response: Response) -> _Said:
    return response.text, response.finish_reason


def _samples(candidates: Sequence[Candidate], golds: Mapping[_Said, float]) -> tuple[Sample, ...]:
    """Every candidate in the order of ends, with what it was made from."""
    ordered = sorted(candidates, key=lambda each: (each.iteration, each.row))
    tree, parents, added = _Beginnings(), {}, 0
    for each in sorted(ordered, key=lambda each: each.known):
        for known in ordered[added : each.known]:
            tree.add(known)
        added = each.known
        parents[each.iteration, each.row] = tree.parent(each.tokens[: each.cut])
    return tuple(
        Sample(
            iteration=each.iteration,
            row=each.row,
            tokens=each.tokens,
            text=each.response.text,
            reward=each.reward,
            gold=golds.get(_said(each.response)),
            finish_reason=each.response.finish_reason,
            cut=each.cut,
            parent=parents[each.iteration, each.row],
        )
        for each in ordered
    )


class _Beginnings:
    """The tree of all samples so far: every beginning, and the best sample that begins so."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], int] = {}  # number of a beginning and a token -> number of the longer one
        self._best: dict[int, Candidate] = {}

    def add(self, sample: Candidate) -> None:
        node = 0
        for token in sample.tokens:
            node = self._after.setdefault((node, token), len(self._after) + 1)
            self._best[node] = min(self._best.get(node, sample), sample, key=lambda each: each.rank)

    def parent(self, kept: Sequence[int]) -> tuple[int, int] | None:
        """Iteration and row of the best of the samples that share most of the kept tokens."""
        node = 0
        for token in kept:
            if (node, token) not in self._after:
                break
            node = self._after[node, token]
        found = self._best.get(node)
        return None if found is None else (found.iteration, found.row)


def _base_logprob(engine: Engine, found: Aligned) -> float:
    """The answer's log-probability under the model; it is said again, so the search pays nothing."""
    tokens = found.best.tokens
    if not tokens:
        return 0.0
    wave = Wave.saying(found.prompt, [tokens], Sampling(min_tokens=0), {"base_logprobs"})
    rollouts = engine.submit(wave).future.result()
    return float(rollouts.observed["base_logprobs"][wave.said].sum())


def _numbers(step: Iteration, golds: Mapping[_Said, float]) -> dict[str, float | None]:
    """An iteration's numbers as JSON, which knows no infinity."""
    finite = {name: value if math.isfinite(value) else None for name, value in step.numbers.items()}
    return {**finite, "gold": golds.get(_said(step.response))}
