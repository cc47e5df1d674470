"""Crossings: a branch whose token another parent says after the same token goes on as that parent did.

Nothing is decoded for such a text, so it costs no more than its reward. Parents of equal merit often differ in where
they are good; a branch alone keeps what is good before it, a crossing also what is good behind it. The token before the
crossing is the same in both parents and the one after it is likely there by the model, so the text reads on.

Source: crossing over is as old as evolutionary search (Holland, Adaptation in Natural and Artificial Systems, 1975); to
cross where tokens meet, at the weight of a branch, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from langchain_aisp.methods.branching import Population, first_new, path_nodes
from langchain_aisp.methods.weights import drawn_without_replacement
from langchain_aisp.noise import fold, wave_keys

_SPARE = 3  # times as many are drawn as are wanted, since some are known already


@dataclass(frozen=True)
class Crossings:
    """Whole texts.

    Attributes:
        texts: C of them, with rewards of 0.
        begun: [C] int64, where they leave the first parent.
    """

    texts: Population
    begun: Tensor

    def __len__(self) -> int:
        """Number of texts C."""
        return len(self.texts)


def crossings(
    population: Population, branches: Tensor, weights: Tensor, visited: Tensor, key: int, wave: int, count: int
) -> Crossings | None:
    """At most so many crossings of the parents that no response has said yet, drawn without replacement.

    Args:
        population: M parents; the second one of a crossing is complete.
        branches: [M, L', K] log-weights of branches of the parents, see ``branch_log_weights``; L' may be shorter.
        weights: [M] of the parents.
        visited: [S] int64, nodes that a response has gone through, sorted.
        key: Of the prompt.
        wave: Number of the wave, which tells the noise of one draw from that of another.
        count: How many at most.

    Returns:
        None where there are none.
    """
    before = population.tokens.roll(1, dims=1)
    positions = torch.arange(population.tokens.shape[1])
    written = (positions > 0) & (positions < population.lengths[:, None])
    first, place = written.nonzero(as_tuple=True)
    second, at = (written & population.complete[:, None]).nonzero(as_tuple=True)
    found, other = _equal(before[first, place], before[second, at])
    first, place, second, at = first[found], place[found], second[other], at[other]
    fits = (first != second) & (place + population.lengths[second] - at <= len(positions))
    first, place, second, at = (each[fits] for each in (first, place, second, at))
    same = population.alternatives[first, place] == population.tokens[second, at, None]
    weight = branches[first, place].masked_fill(~same, -torch.inf).amax(dim=1)
    likely = weight.isfinite()
    first, place, second, at, weight = (each[likely] for each in (first, place, second, at, weight))
    if count < 1 or not len(first):
        return None
    weight = weight.double() + weights[second].double().log()
    noise = fold(fold(fold(key, wave), population.nodes[first, place]), population.nodes[second, at])
    chosen = drawn_without_replacement(weight, noise, _SPARE * count)
    first, place, second, at = (each[chosen] for each in (first, place, second, at))
    texts = _texts(population, first, place, second, at, key, wave)
    ends = texts.nodes.gather(1, texts.lengths[:, None] - 1).squeeze(1)
    kept = first_new(ends, visited).nonzero().squeeze(1)[:count]
    return Crossings(texts.take(kept), place[kept]) if len(kept) else None


def _equal(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [P] into both of all equal values of one [A] and other [B]."""
    ordered, order = other.sort()
    begin, end = torch.searchsorted(ordered, one), torch.searchsorted(ordered, one, right=True)
    count = end - begin
    left = torch.arange(len(one)).repeat_interleave(count)
    within = torch.arange(len(left)) - (count.cumsum(0) - count)[left]
    return left, order[begin[left] + within]


def _texts(
    population: Population, first: Tensor, place: Tensor, second: Tensor, at: Tensor, key: int, wave: int
) -> Population:
    """The first parents up to a place and the second ones from theirs on.

    What the model thought of the second ones' tokens comes along, though it thought so after other words; their keys do
    not, since here the tokens are chosen and not drawn.
    """
    positions = torch.arange(population.tokens.shape[1])
    before = positions < place[:, None]
    shifted = (positions - (place - at)[:, None]).clamp(0, len(positions) - 1)
    lengths = place + population.lengths[second] - at
    inside = positions < lengths[:, None]

    def joined(values: Tensor, nothing: float) -> Tensor:
        ahead, behind = values[first], values[second[:, None], shifted]
        wide = (..., *(None,) * (values.dim() - 2))
        found: Tensor = torch.where(before[wide], ahead, behind)
        return found.masked_fill(~inside[wide], nothing)

    tokens = joined(population.tokens, -1)
    return replace(
        population.take(first),
        tokens=tokens,
        keys=torch.where(
            before, population.keys[first], wave_keys(key, wave, torch.arange(len(first)), len(positions))
        ),
        lengths=lengths,
        nodes=path_nodes(tokens, key),
        rewards=torch.zeros(len(first)),
        alternatives=joined(population.alternatives, 0),
        logprobs=joined(population.logprobs, 0.0),
        scores=joined(population.scores, 0.0),
    )
