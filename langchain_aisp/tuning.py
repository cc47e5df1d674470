"""A method's hyper-parameters, tuned by optuna at a fixed number of samples.

Every setting answers the same prompts with the same seeds and is judged by its mean gain over the default there, so
that hard prompts weigh on all alike and a bad setting can be stopped after a few of them. The held-out reward is noted,
never optimised. The study lies in a file of sqlite: a killed one goes on with the settings it would have tried anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from langchain_aisp.evaluation.arms import METHODS, Arm, parse_arms
from langchain_aisp.evaluation.datasets import PromptRecord, fingerprint
from langchain_aisp.evaluation.metrics import Estimate, estimate, paired
from langchain_aisp.evaluation.run import Evaluation, Run, answer
from langchain_aisp.noise import request_key
from langchain_aisp.types import Engine, Reward, Sampling, require

_STUDY = "tune"
_STARTUP_TRIALS = 4  # whole ones, the default among them, before a median says anything


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``.

    Attributes:
        low: Least one.
        high: Greatest one; of whole numbers, which count responses or waves, at most the number of samples.
        log: Whether equal ratios, not equal steps, are equally likely.
        whole: Whether only integers will do.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def distribution(self, optuna: Any, samples: int) -> Any:
        """The range in optuna's terms."""
        if self.whole:
            return optuna.distributions.IntDistribution(int(self.low), self._top(samples), log=self.log)
        return optuna.distributions.FloatDistribution(self.low, self.high, log=self.log)

    def find(self, value: Any, samples: int) -> Any:
        """The value if it lies in the range, else None."""
        is_inside = isinstance(value, int | float) and self.low <= value <= self._top(samples)
        return value if is_inside else None

    def written(self, value: Any) -> str:
        """A value as it stands in the options of a method."""
        return str(value) if self.whole else f"{value:.3g}"

    def _top(self, samples: int) -> Any:
        return max(int(self.low), min(int(self.high), samples)) if self.whole else self.high


@dataclass(frozen=True)
class Options:
    """One of a few values, as they are written in the options of a method."""

    values: tuple[str, ...]

    def distribution(self, optuna: Any, samples: int) -> Any:
        """The values in optuna's terms."""
        return optuna.distributions.CategoricalDistribution(self.values)

    def find(self, value: Any, samples: int) -> Any:
        """The value as one of these, else None."""
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return text if text in self.values else None

    def written(self, value: Any) -> str:
        """A value as it stands in the options of a method."""
        return str(value)


Space: TypeAlias = Mapping[str, Range | Options]

_TEMPERATURE = Range(0.3, 1.5)
_WAVES = Range(2, 32, log=True, whole=True)  # at a fixed number of samples they are the size of a wave, too
_REWARD_TEMPERATURE = Range(0.03, 10, log=True)

SPACES: dict[str, Space] = {
    "aisp": {
        "iterations": _WAVES,
        "population": Range(1, 32, log=True, whole=True),
        "cooling": Range(0, 1),
        "control_kl": Options(("0", "0.003", "0.01", "0.03", "0.1")),
        "temperature": _TEMPERATURE,
    },
    "best_of_n": {"temperature": _TEMPERATURE, "top_p": Range(0.5, 1)},
    "published": {
        "iterations": _WAVES,
        "sigma": Range(0.03, 3, log=True),
        "reward_temperature": _REWARD_TEMPERATURE,
        "alpha": Range(0.9, 1),
        "decode": Options(("argmax", "sample")),
    },
    "misvo": {
        "iterations": _WAVES,
        "learning_rate": Range(0.01, 0.3, log=True),
        "kl_penalty": Range(0.1, 3, log=True),
        "temperature": _TEMPERATURE,
    },
    "qalign": {
        "chains": Range(1, 32, log=True, whole=True),
        "reward_temperature": _REWARD_TEMPERATURE,
        "temperature": _TEMPERATURE,
    },
    "args": {"weight": Range(0.03, 30, log=True)},
}
"""What is tuned of each method, and where it is looked for."""


def search_space(method: str, only: str | None = None) -> Space:
    """What is tuned of a method.

    Args:
        method: A name of ``SPACES``, with options or without; a setting that the options fix is not tuned.
        only: Tune these settings alone, as in ``sigma,iterations=4:16``, those with a colon between other bounds.

    Raises:
        ValueError: The method, or a setting of it, cannot be tuned, or bounds are no range.
    """
    name, _, listed = method.partition(":")
    require(name in SPACES, f"the method {name!r} cannot be tuned; choose one of {', '.join(SPACES)}")
    fixed = {option.partition("=")[0].strip() for option in listed.split(",")}
    free = {each: setting for each, setting in SPACES[name].items() if each not in fixed}
    if only is not None:
        free = dict(_narrowed(part.strip(), free, method) for part in only.split(","))
    require(bool(free), f"{method} fixes everything that could be tuned: {', '.join(SPACES[name])}")
    return free


def _narrowed(part: str, free: Space, method: str) -> tuple[str, Range | Options]:
    """The setting that a part such as ``sigma=0.1:2`` names."""
    name, _, bounds = part.partition("=")
    require(name in free, f"{name!r} cannot be tuned of {method}; possible are {', '.join(free)}")
    setting = free[name]
    if not bounds:
        return name, setting
    try:
        low, high = map(float, bounds.split(":"))
    except ValueError as error:
        raise ValueError(f"the bounds of {name} must be two numbers such as 0.1:2, got {bounds!r}") from error
    require(isinstance(setting, Range), f"{name} is one of a few values, so it has no bounds")
    assert isinstance(setting, Range)
    require(low < high and (low > 0 or not setting.log), f"the bounds of {name} are no range: {bounds}")
    return name, replace(setting, low=low, high=high)


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and on what.

    Attributes:
        engine: Decodes.
        reward: What is optimised.
        method: Name of the method, with options that stay fixed or without.
        prompts: What every setting answers; those that the result is tested on should not be among them.
        space: What is tuned, see ``search_space``.
        samples: Responses that every search may decode.
        sampling: How tokens are drawn where a setting says nothing else.
        trials: Settings to try, the default not counted.
        gold: A held-out reward, reported only.
        seeds: Every prompt is answered once per seed.
        confirm: Prompts that the default and the best setting answer at the end, and that chose nothing.
        dataset: Name of the prompts, for people.
        seed: Of the settings that are proposed.
    """

    engine: Engine
    reward: Reward
    method: str
    prompts: tuple[PromptRecord, ...]
    space: Space
    samples: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    trials: int = 30
    gold: Reward | None = None
    seeds: tuple[int, ...] = (0,)
    confirm: tuple[PromptRecord, ...] = ()
    dataset: str = "prompts"
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject what cannot be compared."""
        require(self.trials >= 1, f"trials must be at least 1, got {self.trials}")
        require(len(self.prompts) >= 2, f"settings are compared on several prompts, got {len(self.prompts)}")
        self.arm({})

    def arm(self, options: Mapping[str, str]) -> Arm:
        """The method with these options, and never more samples than all others have."""
        listed = ",".join(f"{name}={value}" for name, value in options.items())
        spec = self.method + ("," if ":" in self.method else ":") * bool(listed) + listed
        arms = parse_arms(spec, self.samples, self.sampling)
        require(len(arms) == 1, f"one method is tuned at a time, got {', '.join(arm.label for arm in arms)}")
        _, spend = METHODS[self.method.partition(":")[0]]
        return replace(arms[0], samples=self.samples) if spend(self.samples, {}) else arms[0]

    def evaluation(self, arm: Arm, prompts: tuple[PromptRecord, ...]) -> Evaluation:
        """What one setting is asked."""
        return Evaluation(
            self.engine, self.reward, (arm,), prompts, self.gold, self.seeds, gold_of="answers", dataset=self.dataset
        )

    @property
    def config(self) -> dict[str, Any]:
        """What pins the study, as JSON; more trials may be asked for later."""
        space = {name: repr(setting) for name, setting in self.space.items()}
        pinned = self.evaluation(self.arm({}), self.prompts).config
        return {**pinned, "space": space, "samples": self.samples, "seed": self.seed}


@dataclass(frozen=True)
class Tried:
    """A setting that has answered prompts.

    Attributes:
        arm: The method with the setting.
        rewards: One per prompt, the mean over its seeds.
        golds: The same of the held-out reward; empty without one.
    """

    arm: Arm
    rewards: tuple[float, ...]
    golds: tuple[float, ...] = ()

    def gain(self, default: Tried) -> Estimate:
        """Differences of the rewards from the default's, paired by prompt."""
        return paired(self.rewards, default.rewards)

    def gold_gain(self, default: Tried) -> Estimate | None:
        """Differences of the held-out rewards."""
        return paired(self.golds, default.golds) if self.golds else None


@dataclass(frozen=True)
class News:
    """How far the tuning is.

    Attributes:
        trial: Number of the setting, 0 for the default.
        settings: The method with it.
        answered: Prompts it has answered.
        gain: Its mean gain over the default on them.
        stopped: Whether it is given up.
    """

    trial: int
    settings: str
    answered: int
    gain: float
    stopped: bool = False


@dataclass(frozen=True)
class Tuned:
    """The outcome.

    Attributes:
        default: The method as it is by itself.
        tried: Settings that have answered all prompts, the best first; the default is among them.
        stopped: How many were given up early.
        confirmed: The default and the best setting on the prompts that chose nothing, if there were any.
    """

    default: Tried
    tried: tuple[Tried, ...]
    stopped: int
    confirmed: tuple[Tried, Tried] | None = None

    @property
    def best(self) -> Tried:
        """The setting with the highest mean reward."""
        return self.tried[0]


def tune(tuning: Tuning, path: str | Path) -> Iterator[News | Tuned]:
    """Try settings until there are as many as asked for, those of earlier calls counted.

    Args:
        tuning: What is tuned.
        path: The study, a file of sqlite; the same call goes on with it.

    Yields:
        ``News`` after each prompt and, last, what was found.

    Raises:
        ImportError: There is no package optuna.
        ValueError: The file holds a study of something else.
    """
    optuna = import_optuna()
    study = _open(optuna, tuning, Path(path))
    if not _finished(study):
        yield from _try_default(optuna, study, tuning)
    for number in range(len(_finished(study)), tuning.trials + 1):
        yield from _try_next(optuna, study, tuning, number)
    found = _outcome(study, tuning)
    if tuning.confirm:
        arms = (found.default.arm, found.best.arm)
        old, new = (_tried(arm, list(_answers(tuning, arm, tuning.confirm))) for arm in arms)
        found = replace(found, confirmed=(old, new))
    yield found


def import_optuna() -> Any:
    """The package optuna, or an ImportError that tells how to get it."""
    try:
        import optuna
    except ImportError as missing:
        raise ImportError("tuning needs the package optuna: pip install 'langchain-aisp[tune]'") from missing
    return optuna


def constructor(arm: Arm, model: str) -> str:
    """Python code of a chat model with the setting; what is the default is left out, but for the request's own."""
    method: Any = arm.method
    said = [f"{each.name}={getattr(method, each.name)!r}" for each in fields(method) if _differs(method, each)]
    drawn = [f"{name}={getattr(arm.sampling, name)!r}" for name in ("max_tokens", "temperature", "top_p", "top_k")]
    kind = type(method).__name__
    return f"AISPChatModel(model={model!r}, method={kind}({', '.join(said)}), {', '.join(drawn)})"


def _differs(method: Any, setting: Any) -> bool:
    """Whether a field has another value than the class gives it; how many samples are spent is always told."""
    return bool(setting.name == "samples" or getattr(method, setting.name) != setting.default)


# -- the study --------------------------------------------------------------------------------------------------------


def _open(optuna: Any, tuning: Tuning, path: Path) -> Any:
    """The study of this file; a trial that was running when a process died is given up."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    warm_up = max(2, len(tuning.prompts) // 8)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS, n_warmup_steps=warm_up)
    study = optuna.create_study(
        storage=f"sqlite:///{path}", study_name=_STUDY, direction="maximize", pruner=pruner, load_if_exists=True
    )
    _pin(study, tuning.config, path)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _pin(study: Any, config: Mapping[str, Any], path: Path) -> None:
    found = study.user_attrs.get("config")
    if found is None:
        study.set_user_attr("config", dict(config))
        return
    unlike = [name for name in {**found, **config} if found.get(name) != config.get(name)]
    told = "; ".join(f"{name} was {found.get(name)!r} and is {config.get(name)!r}" for name in unlike)
    require(
        not unlike,
        f"{path} is a study of something else: {told}. Ask for the same again to go on with it, or name another file",
    )


def _finished(study: Any) -> list[Any]:
    """Trials that count, in their order: the default first."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")]


def _try_default(optuna: Any, study: Any, tuning: Tuning) -> Iterator[News]:
    """The default becomes the first trial, by its values where they lie inside the space."""
    arm = tuning.arm({})
    scores: list[tuple[float, float | None]] = []
    for score in _answers(tuning, arm, tuning.prompts):
        scores.append(score)
        yield News(0, arm.label, len(scores), 0.0)
    inside = {
        name: value
        for name, setting in tuning.space.items()
        if (value := setting.find(_own_value(arm, name), tuning.samples)) is not None
    }
    trial = optuna.trial.create_trial(
        value=0.0,
        params=inside,
        distributions={name: tuning.space[name].distribution(optuna, tuning.samples) for name in inside},
        intermediate_values=dict.fromkeys(range(1, len(scores) + 1), 0.0),
        user_attrs=_kept(arm, {}, scores),
    )
    study.add_trial(trial)


def _own_value(arm: Arm, name: str) -> Any:
    """What a setting is by default: the method's own, else the request's."""
    value = getattr(arm.method, name, None)
    return getattr(arm.sampling, name, None) if value is None else value


def _try_next(optuna: Any, study: Any, tuning: Tuning, number: int) -> Iterator[News]:
    """Propose a setting and let it answer the prompts, until it falls behind the median of those that answered all."""
    study.sampler = optuna.samplers.TPESampler(seed=_proposal_seed(tuning.seed, number))
    space = {name: setting.distribution(optuna, tuning.samples) for name, setting in tuning.space.items()}
    trial = study.ask(space)
    options = {name: tuning.space[name].written(value) for name, value in trial.params.items()}
    arm = tuning.arm(options)
    default: Sequence[float] = _finished(study)[0].user_attrs["rewards"]
    scores: list[tuple[float, float | None]] = []
    stopped, gain = False, 0.0
    for score in _answers(tuning, arm, tuning.prompts):
        scores.append(score)
        gain = _mean([reward for reward, _ in scores]) - _mean(default[: len(scores)])
        trial.report(gain, len(scores))
        stopped = len(scores) < len(tuning.prompts) and trial.should_prune()
        yield News(number, arm.label, len(scores), gain, stopped)
        if stopped:
            break
    for name, value in _kept(arm, options, scores).items():
        trial.set_user_attr(name, value)
    if stopped:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, gain)


def _proposal_seed(seed: int, number: int) -> int:
    """A seed per trial: what is proposed depends on the finished trials alone, not on when the process began."""
    return request_key(seed, (number,)) % 2**32


def _answers(tuning: Tuning, arm: Arm, prompts: tuple[PromptRecord, ...]) -> Iterator[tuple[float, float | None]]:
    """Reward and held-out reward of the answers to each prompt, means over the seeds."""
    asked = tuning.evaluation(arm, prompts)
    for prompt in prompts:
        steps = (step for seed in tuning.seeds for step in answer(asked, arm, prompt, seed))
        runs = [step for step in steps if isinstance(step, Run)]
        golds = [run.gold for run in runs if run.gold is not None]
        yield _mean([run.reward for run in runs]), _mean(golds) if golds else None


def _kept(arm: Arm, options: Mapping[str, str], scores: Sequence[tuple[float, float | None]]) -> dict[str, Any]:
    """What a trial remembers."""
    tried = _tried(arm, scores)
    return {"options": dict(options), "rewards": list(tried.rewards), "golds": list(tried.golds)}


def _tried(arm: Arm, scores: Sequence[tuple[float, float | None]]) -> Tried:
    golds = tuple(gold for _, gold in scores if gold is not None)
    return Tried(arm, tuple(reward for reward, _ in scores), golds)


def _outcome(study: Any, tuning: Tuning) -> Tuned:
    """All whole trials, the best first; of equal ones the earlier."""
    finished = _finished(study)
    whole = [
        Tried(
            tuning.arm(trial.user_attrs["options"]),
            tuple(trial.user_attrs["rewards"]),
            tuple(trial.user_attrs["golds"]),
        )
        for trial in finished
        if trial.state.name == "COMPLETE"
    ]
    ranked = sorted(whole, key=lambda tried: -_mean(tried.rewards))
    return Tuned(whole[0], tuple(ranked), len(finished) - len(whole))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def summary(found: Tuned, tuning: Tuning) -> dict[str, Any]:
    """The outcome as JSON: what was asked, every whole setting with its differences, and the code of the best."""
    confirmed = None
    if found.confirmed is not None:
        default, best = found.confirmed
        confirmed = {
            "prompts": {"count": len(tuning.confirm), "fingerprint": fingerprint(tuning.confirm)},
            "default": _numbers(default, default, tuning),
            "best": _numbers(best, default, tuning),
        }
    return {
        "config": tuning.config,
        "best": _numbers(found.best, found.default, tuning),
        "default": _numbers(found.default, found.default, tuning),
        "confirmed": confirmed,
        "tried": [_numbers(each, found.default, tuning) for each in found.tried],
        "stopped_early": found.stopped,
    }


def _numbers(tried: Tried, default: Tried, tuning: Tuning) -> dict[str, Any]:
    gold_gain = tried.gold_gain(default)
    return {
        "method": tried.arm.label,
        "code": constructor(tried.arm, tuning.engine.name),
        "reward": _as_json(estimate(tried.rewards)),
        "gain": _as_json(tried.gain(default)),
        "gold": _as_json(estimate(tried.golds)) if tried.golds else None,
        "gold_gain": None if gold_gain is None else _as_json(gold_gain),
    }


def _as_json(number: Estimate) -> dict[str, float]:
    return {"mean": number.mean, "standard_error": number.standard_error, "low": number.low, "high": number.high}
