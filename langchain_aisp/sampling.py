"""From logits to tokens: temperature, top-k, top-p and the draw by inverse CDF, one row independent of the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 64  # tokens
_LIKELIEST = 256  # tokens, which most nuclei lie within


def draw(logits: Tensor, uniforms: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Draw one token per row.

    Args:
        logits: [r, V] float32; forbidden tokens are ``-inf``.
        uniforms: [r] in (0, 1); ignored where the temperature is 0.
        temperature: [r] float32; 0 takes the likeliest token.
        top_p: [r] float32 in (0, 1].
        top_k: [r] int64; 0 keeps all.

    Returns:
        [r] int64 token ids.
    """
    greedy = temperature == 0
    if bool(greedy.all()):
        return logits.argmax(dim=-1)
    scaled = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    narrowed = (top_p < 1) | (top_k > 0)
    if bool(narrowed.any()):
        scaled[narrowed] = restrict(scaled[narrowed], top_p[narrowed], top_k[narrowed])
    tokens = inverse_cdf(scaled.softmax(dim=-1), uniforms)
    return torch.where(greedy, logits.argmax(dim=-1), tokens) if bool(greedy.any()) else tokens


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulated probability [r, V] passes the uniform [r]; never one of probability 0.

    The sums of blocks of tokens lead to a block, and its own tokens to one of them: a running sum over a vocabulary
    would be one long chain of additions.

    Returns:
        [r] int64; V or more where the probabilities are not numbers.
    """
    missing = -probabilities.shape[1] % _BLOCK
    blocks = (pad(probabilities, (0, missing)) if missing else probabilities).unflatten(1, (-1, _BLOCK))
    sums = blocks.sum(dim=-1)
    block, before = _passes(sums, uniforms * sums.sum(dim=-1))
    block = block.clamp(max=blocks.shape[1] - 1)  # where NaN was passed nowhere
    rows = torch.arange(len(blocks), device=blocks.device)
    token, _ = _passes(blocks[rows, block], before)
    return block * _BLOCK + token


def _passes(weights: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of weights [r, n] passes the threshold [r], and what is left of it before that weight."""
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1]
    threshold = torch.minimum(threshold, total.nextafter(torch.zeros_like(total)))  # rounding must not reach it
    index = torch.searchsorted(cdf, threshold.unsqueeze(1), right=True).squeeze(1)
    before = pad(cdf, (1, 0)).gather(1, index.unsqueeze(1)).squeeze(1)
    return index, threshold - before


def restrict(logits: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Set to ``-inf`` what lies outside each row's top-k and then outside its nucleus.

    To sort a vocabulary takes longer than all else of a draw, so the likeliest tokens are sorted first, and all of them
    only where these do not reach far enough.
    """
    size = logits.shape[1]
    allowed = torch.where(top_k > 0, top_k, size).clamp(max=size)
    mass_of_all = logits.logsumexp(dim=-1)
    for looked_at in sorted({min(_LIKELIEST, size), size}):
        values, order = largest(logits, looked_at) if looked_at < size else logits.sort(dim=-1, descending=True)
        ranks = torch.arange(looked_at, device=logits.device)
        values = values.masked_fill(ranks >= allowed.unsqueeze(1), -torch.inf)
        whole = torch.where(allowed <= looked_at, values.logsumexp(dim=-1), mass_of_all).unsqueeze(1)
        probabilities = (values - whole).exp()
        reached = probabilities.cumsum(dim=-1)
        if bool(((allowed <= looked_at) | (top_k == 0) & (reached[:, -1] > top_p)).all()):
            break
    values = values.masked_fill(reached - probabilities >= top_p.unsqueeze(1), -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(1, order, values)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores of each row [r, V], falling, and where they are, both [r, count]: ``topk`` sooner.

    With a row laid out as a table, each of them stands in one of the ``count`` columns that have the largest maxima, so
    ``topk`` has to look at the maxima and at these columns only.
    """
    size = scores.shape[1]
    height = math.isqrt(size // count)  # as many maxima as scores in the columns
    if height < 2:
        values, places = scores.topk(count)
        return values, places
    width = size // height
    covered = height * width
    maxima = scores[:, :covered].unflatten(1, (height, width)).amax(dim=1)
    columns = maxima.topk(count, sorted=False).indices
    down = torch.arange(0, covered, width, device=scores.device)[:, None]
    beyond = torch.arange(covered, size, device=scores.device).expand(len(scores), -1)
    looked_at = torch.cat([(columns[:, None] + down).flatten(1), beyond], dim=1)
    values, found = scores.gather(1, looked_at).topk(count)
    return values, looked_at.gather(1, found)
