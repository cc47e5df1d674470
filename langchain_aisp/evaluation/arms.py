"""Methods by name, with options: what stands on a command line becomes an arm of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from langchain_aisp.methods import AISP, ARGS, MISVO, BestOfN, Greedy, PublishedAISP, QAlign, REControl, ValueNetwork
from langchain_aisp.types import Method, Sampling, require

Spend = Callable[[int, Mapping[str, Any]], Mapping[str, Any]]
"""How a method spends so many samples, given the options that were chosen: settings, which the options override."""


@dataclass(frozen=True)
class Arm:
    """One rival of a comparison.

    Attributes:
        label: Its name in logs and tables; no two rivals share one.
        method: The search.
        sampling: How its requests draw tokens.
        samples: Most responses it may decode; None leaves that to the method.
    """

    label: str
    method: Method[Any]
    sampling: Sampling
    samples: int | None = None

    @property
    def settings(self) -> str:
        """All settings as one text; equal texts, equal arms."""
        return f"{self.method!r} with {self.sampling!r}, at most {self.samples} samples"


def _samples_in_all(samples: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"samples": samples}


def in_iterations(samples: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """As many iterations as samples in each, as those do who use the published method (n = κ = 32)."""
    iterations = options.get("iterations", math.ceil(math.sqrt(samples)))
    rows = options.get("samples_per_iteration", math.ceil(samples / iterations))
    return {"samples_per_iteration": rows, "iterations": math.ceil(samples / rows)}


def _one_answer(samples: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def _in_chains(samples: int, options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"samples": samples, "chains": min(QAlign.chains, samples)}


def _recontrol(
    value: str, step_size: float = REControl.step_size, steps: int = REControl.steps, best_of: int = 1
) -> REControl:
    """RE-Control with a value network from a file: one greedy answer, or the best of several samples."""
    inner: Method[Any] = Greedy() if best_of == 1 else BestOfN(samples=best_of)
    return REControl(ValueNetwork.load(value), step_size, steps, inner)


METHODS: dict[str, tuple[Callable[..., Method[Any]], Spend]] = {
    "greedy": (Greedy, _one_answer),
    "best_of_n": (BestOfN, _samples_in_all),
    "aisp": (AISP, _samples_in_all),
    "published": (PublishedAISP, in_iterations),
    "misvo": (MISVO, in_iterations),
    "qalign": (QAlign, _in_chains),
    "args": (ARGS, _one_answer),
    "recontrol": (_recontrol, _one_answer),
}
"""Methods that have a name: what makes one of its settings, and how it spends a number of samples."""


def parse_arms(text: str, samples: int, sampling: Sampling) -> tuple[Arm, ...]:
    """The arms that a text such as ``best_of_n,aisp:population=4,temperature=0.4,published`` names.

    A comma before ``name=value`` goes on with the options of the method before it; any other comma begins a method.

    Args:
        text: Names from ``METHODS``, each with options or without: settings of the method, or else of its sampling.
        samples: Responses that every method may decode, unless its options say otherwise.
        sampling: How tokens are drawn, unless the options say otherwise.

    Raises:
        ValueError: An unknown method or option, a value of the wrong kind, or the same arm twice.
    """
    arms = tuple(_arm(spec, samples, sampling) for spec in _specs(text))
    labels = [arm.label for arm in arms]
    repeated = {label for label in labels if labels.count(label) > 1}
    require(bool(arms), f"no method is named; choose some of {', '.join(METHODS)}")
    require(not repeated, f"{', '.join(repeated)} is named twice; name each method once, or with other options")
    return arms


def _specs(text: str) -> Iterator[str]:
    """The parts of the text that name one method each."""
    spec = ""
    for part in filter(None, map(str.strip, text.split(","))):
        if spec and "=" in part and ":" not in part.partition("=")[0]:
            spec += f",{part}"
        else:
            yield from filter(None, [spec])
            spec = part
    yield from filter(None, [spec])


def _arm(spec: str, samples: int, sampling: Sampling) -> Arm:
    name, _, listed = spec.partition(":")
    require(name in METHODS, f"the method {name!r} is not known; choose some of {', '.join(METHODS)}")
    kind, spend = METHODS[name]
    own, drawing = _options(spec, listed.split(",") if listed else [], kind)
    needed = [each.name for each in signature(kind).parameters.values() if each.default is each.empty]
    missing = ", ".join(f"{each}=…" for each in needed if each not in own)
    require(not missing, f"{spec}: the method needs {missing}; write {name}:{missing}")
    shares = spend(own.get("samples", samples), own)
    limit = samples if shares and not shares.keys() & own.keys() else None  # rounding up must not spend more
    return Arm(spec, kind(**{**shares, **own}), replace(sampling, **drawing), limit)


def _options(spec: str, parts: Iterable[str], kind: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are the method's own, and those of its sampling."""
    own, drawing = _settings(kind), _settings(Sampling)
    chosen: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for part in parts:
        name, _, value = part.partition("=")
        home = own if name in own else drawing
        possible = ", ".join({**own, **drawing})
        require(name in home, f"{spec}: the option {name!r} is not known; possible are {possible}")
        chosen[home is drawing][name] = _read(value, home[name], f"{spec}: {name}")
    return chosen


def _settings(kind: Callable[..., Any]) -> dict[str, Any]:
    """Names and types of the settings of a dataclass or function that can be written as a text."""
    hints = get_type_hints(kind)
    return {name: hints[name] for name in signature(kind).parameters if _is_plain(hints[name])}


def _is_plain(hint: Any) -> bool:
    """Whether values of the type are numbers, words or None; others are for Python code to set."""
    parts = getattr(hint, "__args__", (hint,))
    return all(part in (int, float, bool, str, type(None)) or isinstance(part, str) for part in parts)


def _read(value: str, hint: Any, where: str) -> Any:
    """The value of an option."""
    optional = type(None) in getattr(hint, "__args__", ())
    if optional and value.lower() == "none":
        return None
    try:
        return TypeAdapter(hint).validate_strings(value)
    except ValidationError as error:
        raise ValueError(f"{where} cannot be {value!r}: {error.errors()[0]['msg']}") from error
