"""Crossings: a branch whose token another parent says after the same token goes on as that parent did.

Nothing is decoded for such a text, so it costs no more than its reward. Parents of equal merit often differ in where
they are good; a branch alone keeps what is good before it, a crossing also what is good behind it. The token before the
crossing is the same in both parents and the one after it is likely there by the model, so the text reads on.

Source: crossing over is as old as evolutionary search (Holland, Adaptation in Natural and Artificial Systems, 1975); to
cross where tokens meet, at the weight of a branch, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from langchain_aisp.methods.branching import Population, moved, new_nodes, path_nodes
from langchain_aisp.methods.weights import drawn_without_replacement
from langchain_aisp.noise import fold

_Numbers: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


@dataclass(frozen=True)
class Crossings:
    """C whole texts: each keeps one parent up to a place and then says what another one does from some place on.

    Attributes:
        parents: M possible parents.
        first: [C] int64, the parents that are left.
        begun: [C] int64, where they are.
        second: [C] int64, the parents that are entered.
        at: [C] int64, where they are, at least 1.
        key: Of the prompt.
    """

    parents: Population
    first: Tensor
    begun: Tensor
    second: Tensor
    at: Tensor
    key: int

    def __len__(self) -> int:
        """Number of texts C."""
        return len(self.first)

    def where(self, rows: Tensor) -> Crossings:
        """Those with these indices [r], or where [C] bool is true; ``take`` makes a population of them."""
        return Crossings(self.parents, self.first[rows], self.begun[rows], self.second[rows], self.at[rows], self.key)

    @cached_property
    def lengths(self) -> Tensor:
        """[C] int64, of the whole texts."""
        return self.begun + self.parents.lengths[self.second] - self.at

    @cached_property
    def tokens(self) -> Tensor:
        """[C, L] int64, -1 after the ends."""
        return self._joined(self.parents.tokens, -1)

    @cached_property
    def nodes(self) -> Tensor:
        """[C, L] int64, hashes of the texts up to each position."""
        return path_nodes(self.tokens, self.key)

    @cached_property
    def keys(self) -> Tensor:
        """[C, L] int64 noise keys: where the first parents are kept theirs, then the nodes, since nothing is drawn."""
        return torch.where(self._positions < self.begun[:, None], self.parents.keys[self.first], self.nodes)

    @property
    def ends(self) -> Tensor:
        """[C] int64, the last of the nodes, without the texts' being written out."""
        nodes, last = self.parents.nodes, self.parents.lengths - 1
        added = nodes[self.second, last[self.second]] - nodes[self.second, self.at - 1]
        return nodes[self.first, self.begun - 1] + added * moved(self.begun - self.at)

    def take(self, rows: Tensor) -> Population:
        """Those with these indices [r], with rewards of 0.

        What the model thought of the second parents' tokens comes along, though it thought so after other words.
        """
        chosen, parents = self.where(rows), self.parents
        return Population(
            self.tokens[rows],
            self.keys[rows],
            chosen.lengths,
            self.nodes[rows],
            torch.zeros(len(chosen)),
            parents.complete[chosen.second],
            chosen._joined(parents.alternatives, 0),
            chosen._joined(parents.logprobs, 0.0),
            parents.checked[chosen.first],
            chosen._joined(parents.scores, 0.0),
        )

    @property
    def _positions(self) -> Tensor:
        return torch.arange(self.parents.tokens.shape[1])

    @cached_property
    def _sources(self) -> tuple[Tensor, Tensor]:
        """Which of all positions of all parents, laid side by side, each token comes from; what is after the ends."""
        positions, length = self._positions, len(self._positions)
        shifted = (positions - (self.begun - self.at)[:, None]).clamp(0, length - 1)
        ahead, behind = self.first[:, None] * length + positions, self.second[:, None] * length + shifted
        return torch.where(positions < self.begun[:, None], ahead, behind), positions >= self.lengths[:, None]

    def _joined(self, values: Tensor, nothing: float) -> Tensor:
        sources, outside = self._sources
        found = values.flatten(0, 1).index_select(0, sources.flatten()).view(*sources.shape, *values.shape[2:])
        return found.masked_fill_(outside[(..., *(None,) * (values.dim() - 2))], nothing)


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
    places = _meetings(population)
    first, begun, second, at = places
    same = population.alternatives.numpy()[first, begun] == population.tokens.int().numpy()[second, at, None]
    rank = same.argmax(axis=1)  # of the token among the likely ones, 0 if it is none of them
    weight = branches.numpy()[first, begun, rank]
    likely = same[np.arange(len(rank)), rank] & np.isfinite(weight)
    if count < 1 or not likely.any():
        return None
    rows = torch.from_numpy(places[:, likely])
    found = Crossings(population, rows[0], rows[1], rows[2], rows[3], key)
    ends, log_weights = found.ends, torch.from_numpy(weight[likely]).double() + weights[found.second].double().log()
    log_weights = new_nodes(ends, log_weights, visited)
    found = found.where(drawn_without_replacement(log_weights, fold(fold(key, wave), ends), count))
    return found if len(found) else None


def _meetings(population: Population) -> _Numbers:
    """First parents, where they are left, second parents, and where they are entered: [4, P] for so many places.

    The tokens before both are the same and the tokens there are not; the text has room. In numpy, as ``noise.fold``.
    """
    lengths, complete, tokens = population.lengths.numpy(), population.complete.numpy(), population.tokens.numpy()
    length = tokens.shape[1]
    written = np.arange(length) < lengths[:, None]
    written[:, 0] = False
    leaves, enters = np.flatnonzero(written), np.flatnonzero(written & complete[:, None])
    said = tokens.ravel()
    one, other = _equal(said[leaves - 1], said[enters - 1])
    leaves, enters = leaves[one], enters[other]
    places = np.stack([leaves // length, leaves % length, enters // length, enters % length])
    first, begun, second, at = places
    fits = (first != second) & (said[leaves] != said[enters]) & (begun + lengths[second] - at <= length)
    return places[:, fits]


def _equal(one: _Numbers, other: _Numbers) -> tuple[_Numbers, _Numbers]:
    """Indices [P] into both of all equal values of one [A] and other [B]."""
    order = other.argsort(kind="stable")
    ordered = other[order]
    begin, end = ordered.searchsorted(one), ordered.searchsorted(one, side="right")
    count = end - begin
    left = np.arange(len(one)).repeat(count)
    within = np.arange(len(left)) - (count.cumsum() - count)[left]
    return left, order[begin[left] + within]
