"""Crossings: a branch whose token another parent says after the same token goes on as that parent did.

Nothing is decoded for such a text, so it costs no more than its reward. Parents of equal merit often differ in where
they are good; a branch alone keeps what is good before it, a crossing also what is good behind it. The token before the
crossing is the same in both parents and the one after it is likely there by the model, so the text reads on.

Source: crossing over is as old as evolutionary search (Holland, Adaptation in Natural and Artificial Systems, 1975); to
cross where tokens meet, at the weight of a branch, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from langchain_aisp.methods.branching import Population, new_nodes, path_nodes, token_nodes
from langchain_aisp.methods.weights import drawn_without_replacement
from langchain_aisp.noise import fold, wave_keys


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
    join = _Join(population, first[found], place[found], second[other], at[other])
    join = join.take((join.first != join.second) & (join.lengths <= len(positions)))
    same = population.alternatives[join.first, join.place] == population.tokens[join.second, join.at, None]
    weight = branches[join.first, join.place].masked_fill(~same, -torch.inf).amax(dim=1)
    likely = weight.isfinite()
    join, weight = join.take(likely), weight[likely].double()
    if count < 1 or not len(weight):
        return None
    ends = join.ends(key)
    weight = new_nodes(ends, weight + weights[join.second].double().log(), visited)
    join = join.take(drawn_without_replacement(weight, fold(fold(key, wave), ends), count))
    return Crossings(join.texts(key, wave), join.place) if len(join.place) else None


def _equal(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [P] into both of all equal values of one [A] and other [B]."""
    ordered, order = other.sort()
    begin, end = torch.searchsorted(ordered, one), torch.searchsorted(ordered, one, right=True)
    count = end - begin
    left = torch.arange(len(one)).repeat_interleave(count)
    within = torch.arange(len(left)) - (count.cumsum(0) - count)[left]
    return left, order[begin[left] + within]


@dataclass(frozen=True)
class _Join:
    """The first parents up to a place and the second ones from theirs on.

    Attributes:
        population: M possible parents.
        first: [C] int64 parents.
        place: [C] int64, where these are left.
        second: [C] int64 parents.
        at: [C] int64, where these are entered.
    """

    population: Population
    first: Tensor
    place: Tensor
    second: Tensor
    at: Tensor

    def take(self, rows: Tensor) -> _Join:
        """Those with these indices [r], or where [C] bool is true."""
        return _Join(self.population, self.first[rows], self.place[rows], self.second[rows], self.at[rows])

    @property
    def lengths(self) -> Tensor:
        """[C] int64, of the whole texts."""
        return self.place + self.population.lengths[self.second] - self.at

    def ends(self, key: int) -> Tensor:
        """Nodes [C] of the whole texts, without their being written out: a parent's end adds what it adds elsewhere."""
        length = len(self._positions)
        moves, move = (self.second * 2 * length + self.place - self.at + length).unique(return_inverse=True)
        parent, by = moves // (2 * length), moves % (2 * length) - length
        index = self._positions - by[:, None]
        inside = (index >= 0) & (index < self.population.lengths[parent][:, None])
        tokens = self.population.tokens[parent].gather(1, index.clamp(0, length - 1))
        added = token_nodes(tokens, key).masked_fill(~inside, 0).cumsum(dim=1)
        return self.population.nodes[self.first, self.place - 1] + added[move, -1] - added[move, self.place - 1]

    def texts(self, key: int, wave: int) -> Population:
        """The texts, with rewards of 0.

        What the model thought of the second ones' tokens comes along, though it thought so after other words; their
        keys do not, since here the tokens are chosen and not drawn.
        """
        parents, positions = self.population, self._positions
        tokens = self._joined(parents.tokens, -1)
        fresh = wave_keys(key, wave, torch.arange(len(self.first)), len(positions))
        return replace(
            parents.take(self.first),
            tokens=tokens,
            keys=torch.where(positions < self.place[:, None], parents.keys[self.first], fresh),
            lengths=self.lengths,
            nodes=path_nodes(tokens, key),
            rewards=torch.zeros(len(self.first)),
            alternatives=self._joined(parents.alternatives, 0),
            logprobs=self._joined(parents.logprobs, 0.0),
            scores=self._joined(parents.scores, 0.0),
        )

    @property
    def _positions(self) -> Tensor:
        return torch.arange(self.population.tokens.shape[1])

    @cached_property
    def _sources(self) -> Tensor:
        """[C, L] int64, which of all positions of all parents, laid side by side, each token comes from."""
        positions, length = self._positions, len(self._positions)
        shifted = (positions - (self.place - self.at)[:, None]).clamp(0, length - 1)
        ahead, behind = self.first[:, None] * length + positions, self.second[:, None] * length + shifted
        return torch.where(positions < self.place[:, None], ahead, behind)

    def _joined(self, values: Tensor, nothing: float) -> Tensor:
        found = values.flatten(0, 1).index_select(0, self._sources.flatten())
        found = found.view(*self._sources.shape, *values.shape[2:])
        outside = self._positions >= self.lengths[:, None]
        return found.masked_fill_(outside[(..., *(None,) * (values.dim() - 2))], nothing)
