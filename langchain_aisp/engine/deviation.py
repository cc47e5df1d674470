"""How far steered tokens may part from the model: KL divergences of logits, and the way back to the unsteered ones."""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 16  # of the scale: where the budget ends, at most a 65536th of the offset is given away
_NOTHING = 1e-6  # nats: what float32 cannot tell from a budget that is spent


def within(steered: Tensor, base: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Logits no further from the unsteered ones than the rows may still spend; rows are independent.

    A row that would go further moves back along the line of logits ``base + s * (steered - base)``, ``0 <= s <= 1``.
    For a linear head these are the logits of the offset scaled by s; for one that caps its logits they are a mixture of
    the two. Along it the divergence rises with s, so bisection finds the largest s that the budget allows.

    Args:
        steered: [r, V] float32; forbidden tokens are ``-inf``, in both.
        base: [r, V] float32, of the model by itself.
        budget: [r] float32, nats.

    Returns:
        Logits [r, V], the steered ones bit for bit where they are near enough, and ``KL(logits ‖ base)`` [r], at most
        the budget.
    """
    pull = (steered - base).masked_fill(base.isneginf(), 0)
    natural = base.log_softmax(dim=-1)
    kl = _divergence(steered, natural)
    over = (kl > budget) | (budget <= _NOTHING)
    if not bool(over.any()):
        return steered, kl
    scale, spent = _largest(base[over], pull[over], natural[over], budget[over])
    logits = steered.clone()
    logits[over] = base[over] + scale[:, None] * pull[over]
    return logits, kl.masked_scatter(over, spent)


def _largest(base: Tensor, pull: Tensor, natural: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """The largest scales [r] of the pull [r, V] that stay within the budget [r], and what they spend of it [r]."""
    low, high = torch.zeros_like(budget), torch.ones_like(budget)
    spent = torch.zeros_like(budget)
    if bool((budget <= _NOTHING).all()):
        return low, spent
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kl = _divergence(base + middle[:, None] * pull, natural)
        fits = (kl <= budget) & (budget > _NOTHING)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        spent = torch.where(fits, kl, spent)
    return low, spent


def _divergence(logits: Tensor, natural: Tensor) -> Tensor:
    """``KL(softmax(logits) ‖ base)`` [r] in nats, from logits [r, V] and the base's log-probabilities [r, V].

    The last cumulated sum instead of ``sum``, which splits a single wide row among threads: other bits than in a batch.
    """
    logprobs = logits.log_softmax(dim=-1)
    terms = logprobs.exp() * (logprobs - natural).masked_fill(natural.isneginf(), 0)
    return terms.cumsum(dim=-1)[:, -1].clamp(min=0)
