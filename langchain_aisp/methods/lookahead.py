"""One token ahead: of many branches, those whose token earns more than the one that the parent has there.

A reward that understands unfinished texts can judge a branch before anything of it is decoded, by the text up to the
branching token. What counts is the difference from the parent's own beginning of the same length: late cuts have earned
more by then than early ones, whatever token comes next.

Source: judging tokens by the reward of the text that they make is ARGS, arXiv 2402.01694, which does so at every token
of every text. Judging branches of a search, against the parent, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from langchain_aisp.methods.branching import Population
from langchain_aisp.methods.credit import spelled
from langchain_aisp.methods.weights import drawn_without_replacement, temperature_for_ess
from langchain_aisp.types import Problem, Wave

_SHARE = 0.3  # of the branches that are looked at: the effective number of those that stay in play


@dataclass(frozen=True)
class Branches:
    """Texts that keep a parent's beginning and go on with another token.

    Attributes:
        parents: [B] int64, members of the population.
        positions: [B] int64, of the other tokens.
        tokens: [B] int64, the other tokens.
        nodes: [B] int64, hashes of the texts that they begin with.
    """

    parents: Tensor
    positions: Tensor
    tokens: Tensor
    nodes: Tensor

    def __len__(self) -> int:
        """Number of branches B."""
        return len(self.tokens)

    def take(self, rows: Tensor | slice) -> Branches:
        """The branches with these indices."""
        return Branches(self.parents[rows], self.positions[rows], self.tokens[rows], self.nodes[rows])

    def join(self, others: Branches) -> Branches:
        """These, and then the others."""
        fields = self.__dataclass_fields__
        return Branches(*(torch.cat([getattr(self, name), getattr(others, name)]) for name in fields))


def looks(population: Population, branches: Branches, problem: Problem) -> Wave:
    """The branches up to their tokens, and below them the parents up to theirs, in a wave that decodes nothing."""
    parents, positions, _ = _own(branches, population)
    tokens = population.tokens[torch.cat([branches.parents, parents])]
    kept = torch.cat([branches.positions, positions]) + 1
    tokens[torch.arange(len(branches)), branches.positions] = branches.tokens
    return spelled(tokens, kept, problem)


def gains(population: Population, branches: Branches, rewards: Tensor) -> Tensor:
    """How much more the branches [B] earn by their tokens than their parents did, from the rewards of ``looks``."""
    _, _, own = _own(branches, population)
    return rewards[: len(branches)] - rewards[len(branches) :][own]


def best_looking(branches: Branches, gains: Tensor, keys: Tensor, count: int) -> Branches:
    """So many of the branches at most, drawn without replacement by what they gain; their scale does not matter.

    Args:
        branches: B of them.
        gains: [B] float32.
        keys: [B] int64 noise keys.
        count: How many at most.
    """
    temperature = temperature_for_ess(gains, max(1.0, _SHARE * len(gains)))
    return branches.take(drawn_without_replacement((gains - gains.max()).double() / temperature, keys, count))


def _own(branches: Branches, population: Population) -> tuple[Tensor, Tensor, Tensor]:
    """Parents [O] and positions [O] at which branches leave them, and for each branch [B] which of these is its own."""
    length = population.tokens.shape[1]
    places, own = (branches.parents * length + branches.positions).unique(return_inverse=True)
    return places // length, places % length, own
