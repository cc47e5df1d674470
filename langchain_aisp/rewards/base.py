"""What all rewards share: the error a user sees, and the check of what a reward answered."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

_SHOWN_CHARACTERS = 120


class RewardError(RuntimeError):
    """A reward gave no usable score.

    Attributes:
        reward: Name of the reward.
        problem: What happened.
        remedy: What to do about it.
        response: The response that was being scored, where one is to blame.
    """

    def __init__(self, reward: str, problem: str, remedy: str, response: str | None = None) -> None:
        """Keep the parts; the message is put together from them."""
        super().__init__(reward, problem, remedy, response)
        self.reward, self.problem, self.remedy, self.response = reward, problem, remedy, response

    def __str__(self) -> str:
        """The whole story in one line."""
        about = "" if self.response is None else f" Response: {shorten(self.response)!r}."
        return f"Reward {self.reward!r} {self.problem}.{about} {self.remedy}"


def shorten(text: str) -> str:
    """The text, or its two ends when it is long."""
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def check_scores(reward: str, scores: object, responses: Sequence[str]) -> Tensor:
    """Turn what a reward answered into scores, or say what is wrong with it.

    Args:
        reward: Name of the reward, for the message.
        scores: One real number per response: list, tuple, array, tensor or any other ordered iterable.
        responses: [n] the texts that were scored.

    Returns:
        [n] float32 on the CPU, all finite.

    Raises:
        RewardError: For another type, another length, or a score that is not a finite float32.
    """
    values = _listed(reward, scores)
    if len(values) != len(responses):
        problem = f"answered {len(values)} scores for {len(responses)} responses"
        raise RewardError(reward, problem, "Return exactly one number per response, in their order.")
    numbers_ = [_number(reward, value, response) for value, response in zip(values, responses, strict=True)]
    checked = torch.tensor(numbers_, dtype=torch.float64).to(torch.float32)
    for index in torch.nonzero(~checked.isfinite()).flatten().tolist()[:1]:
        problem = f"answered {numbers_[index]}, which is not a finite 32-bit number"
        remedy = "Return a finite score for every response; a low one, such as -100, for those to be avoided."
        raise RewardError(reward, problem, remedy, responses[index])
    return checked


def _listed(reward: str, scores: object) -> list[Any]:
    """The scores as a list of Python values."""
    if isinstance(scores, Tensor):
        scores = scores.detach().cpu()
    if getattr(scores, "ndim", None) in (0, 2, 3):
        problem = f"answered an array of shape {tuple(scores.shape)}"  # type: ignore[attr-defined]
        raise RewardError(reward, problem, "Return a flat array with one number per response; squeeze(-1) may help.")
    if isinstance(scores, str | bytes | Mapping | Set) or not isinstance(scores, Iterable):
        problem = f"answered {type(scores).__name__} ({shorten(repr(scores))})"
        raise RewardError(reward, problem, "Return a list with one number per response, also for a single response.")
    return scores.tolist() if hasattr(scores, "tolist") else list(scores)


def _number(reward: str, value: Any, response: str) -> float:
    """One score as a Python float; what is too large becomes infinite and is caught with the others."""
    plain = value.item() if callable(getattr(value, "item", None)) and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(plain, numbers.Real):
        problem = f"answered {type(plain).__name__} ({shorten(repr(plain))}) where a number was expected"
        raise RewardError(reward, problem, "Return a real number for every response.", response)
    try:
        return float(plain)
    except OverflowError:
        return math.inf
