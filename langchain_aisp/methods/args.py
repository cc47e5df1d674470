"""ARGS: at every token the reward of the text so far has its say; one answer is written, token by token.

Source: "ARGS: Alignment as Reward-Guided Search", Khanov, Burapacheep & Li, ICLR 2024, arXiv 2402.01694.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from langchain_aisp.noise import fold, gumbel, wave_keys
from langchain_aisp.types import Info, Observable, Problem, Rollouts, Wave, require


@dataclass(frozen=True)
class Chain:
    """A text under way.

    Attributes:
        tokens: Its token ids so far.
        ended: Whether it goes on no more.
        place: Iteration and row of the response that is this text; None before the first token.
    """

    tokens: tuple[int, ...] = ()
    ended: bool = False
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class Extension:
    """A token that may come next in a chain.

    Attributes:
        chain: Number of the chain.
        token: Its id.
        logprob: Its log-probability under the model, which is its logit but for a constant of the position.
        reward: Reward of the text that it makes.
        place: Iteration and row of that text.
        ends: Whether that text is complete.
    """

    chain: int
    token: int
    logprob: float
    reward: float = 0.0
    place: tuple[int, int] | None = None
    ends: bool = False


@dataclass(frozen=True)
class ARGSState:
    """What is being answered, and how far the texts are.

    Attributes:
        problem: What to answer.
        iteration: The next iteration.
        keys: [C, L] int64, a noise key per chain and position.
        chains: C texts.
        judged: Candidates for the next token whose rewards are known: the likeliest token of each chain.
        rivals: The other candidates, which the next wave will say; none before the likeliest tokens are known.
    """

    problem: Problem
    iteration: int
    keys: Tensor
    chains: tuple[Chain, ...]
    judged: tuple[Extension, ...] = ()
    rivals: tuple[Extension, ...] = ()

    @property
    def growing(self) -> tuple[int, ...]:
        """Numbers of the chains that the next token is chosen for; they are equally long."""
        numbers = [number for number, chain in enumerate(self.chains) if not chain.ended]
        length = min((len(self.chains[number].tokens) for number in numbers), default=0)
        return tuple(number for number in numbers if len(self.chains[number].tokens) == length)

    @property
    def answers(self) -> frozenset[tuple[int, int]]:
        """Where the texts stand; see ``Deciding``."""
        return frozenset(chain.place for chain in self.chains if chain.place is not None)

    @property
    def finished(self) -> bool:
        """Whether all texts have ended."""
        return all(chain.ended for chain in self.chains)


@dataclass(frozen=True)
class ARGS:
    """Alignment as reward-guided search: the next token is chosen by its logit plus ``weight`` times a reward.

    At each position the model's ``candidates`` likeliest tokens are appended to the text so far, and each text is
    scored: ``logit + weight * reward(text + token)``. The best one stays (ARGS-greedy) or, with a ``temperature``, one
    drawn from ``softmax(score / temperature)`` (ARGS-stochastic). Published settings: weight 1.0 to 1.5, 10 candidates.

    One token takes two waves: the likeliest token of each chain, which shows its rivals, and then the rivals. A row is
    a partial text, so a text of T tokens costs ``T * candidates`` reward calls, and so much of a budget of samples; set
    none, and the search ends with the text. The answer is the text that was written, even where some complete text on
    the way had a higher reward. N samples are N ``chains``, which share the waves; they differ by their draws only, and
    the best of them is the answer.

    The reward has to make sense of texts that stop in the middle. The request's temperature, top_p and top_k have no
    say: the rule above replaces them.

    Attributes:
        weight: w, how many nats a unit of the reward is worth.
        candidates: k, tokens that are judged at each position; at most as many as the engine observes (32).
        temperature: Of the choice among them; 0 takes the best score.
        chains: Texts that are written side by side.
    """

    weight: float = 1.0
    candidates: int = 10
    temperature: float = 0.0
    chains: int = 1

    def __post_init__(self) -> None:
        """Reject settings that choose nothing."""
        require(self.weight >= 0, f"weight must not be negative, got {self.weight}; 0 ignores the reward")
        require(self.candidates >= 1, f"candidates must be at least 1, got {self.candidates}")
        require(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}; 0 takes the best")
        require(self.chains >= 1, f"chains must be at least 1, got {self.chains}")
        require(
            self.chains == 1 or self.temperature > 0,
            f"chains={self.chains} at temperature 0 would all be the same text; set a temperature, or chains=1",
        )

    @property
    def name(self) -> str:
        """Short name for tables and metadata."""
        return "args"

    @property
    def iterations(self) -> int:
        """No limit of its own: the search ends with its texts, whose length only the request limits."""
        return sys.maxsize

    def init(self, problem: Problem) -> ARGSState:
        """Nothing written yet."""
        keys = wave_keys(problem.prompt.key, 0, torch.arange(self.chains), problem.sampling.max_tokens)
        return ARGSState(problem, 0, keys, (Chain(),) * self.chains)

    def propose(self, state: ARGSState) -> Wave:
        """The likeliest next token of each chain, and once these are known, its rivals."""
        if state.rivals:
            texts = [(each.chain, (*state.chains[each.chain].tokens, each.token)) for each in state.rivals]
            return _wave(state, texts, kept=len(texts[0][1]) - 1, forced=True)
        texts = [(number, state.chains[number].tokens) for number in state.growing]
        return _wave(state, texts, kept=len(texts[0][1]), forced=False)

    def update(self, state: ARGSState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[ARGSState, Info]:
        """Remember the rewards; when every candidate has one, choose the next token of each chain."""
        if state.rivals:
            shown = zip(state.rivals, range(len(wave)), strict=False)  # a budget may have shortened the wave
            judged = [_judge(state, each, row, rollouts, rewards) for each, row in shown if _said(wave, rollouts, row)]
            after = self._choose(replace(state, judged=(*state.judged, *judged), rivals=()))
        else:
            after = self._compare(state, wave, rollouts, rewards)
        info = {"ess": 1.0, "control_kl": 0.0, "tokens": float(max(len(chain.tokens) for chain in after.chains))}
        return replace(after, iteration=state.iteration + 1), info

    def _compare(self, state: ARGSState, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> ARGSState:
        """Find the rivals of the likeliest tokens; where a chain has none, its likeliest token is chosen."""
        chains, judged, rivals = list(state.chains), list[Extension](), list[Extension]()
        for row, number in zip(range(len(wave)), state.growing, strict=False):
            if not _said(wave, rollouts, row):  # no room or no time is left
                chains[number] = replace(chains[number], ended=True)
                continue
            drawn = int(rollouts.tokens[row, wave.cut[row]])
            for each in self._candidates(number, wave, rollouts, row):
                if each.token == drawn:
                    judged.append(_judge(state, each, row, rollouts, rewards))
                else:
                    rivals.append(each)
        after = replace(state, chains=tuple(chains), judged=tuple(judged), rivals=tuple(rivals))
        return after if rivals else self._choose(after)

    def _candidates(self, chain: int, wave: Wave, rollouts: Rollouts, row: int) -> list[Extension]:
        """The likeliest tokens of a row of which only the last one is new."""
        position = wave.cut[row]
        tokens = rollouts.observed["alternatives"][row, position].tolist()
        logprobs = rollouts.observed["alternative_logprobs"][row, position].tolist()
        require(
            self.candidates <= len(tokens),
            f"candidates={self.candidates}, but the engine observes the {len(tokens)} likeliest tokens only",
        )
        ranked = list(zip(tokens, logprobs, strict=True))[: self.candidates]
        return [Extension(chain, token, logprob) for token, logprob in ranked if logprob > -torch.inf]

    def _choose(self, state: ARGSState) -> ARGSState:
        """The texts, each with the token that its candidates' scores decide for."""
        chains = list(state.chains)
        for number in {each.chain for each in state.judged}:
            chains[number] = self._extended(state, number)
        return replace(state, chains=tuple(chains), judged=())

    def _extended(self, state: ARGSState, number: int) -> Chain:
        chain, candidates = state.chains[number], [each for each in state.judged if each.chain == number]
        scores = self.scores(candidates)
        if self.temperature > 0:
            tokens = torch.tensor([each.token for each in candidates])
            scores = scores / self.temperature + gumbel(fold(state.keys[number, len(chain.tokens)], tokens))
        best = candidates[int(scores.argmax())]
        tokens_so_far = (*chain.tokens, best.token)
        ended = best.ends or len(tokens_so_far) == state.problem.sampling.max_tokens
        return Chain(tokens_so_far, ended, best.place)

    def scores(self, candidates: Iterable[Extension]) -> Tensor:
        """``logit + weight * reward`` of some candidates for one position, but for a constant; [n] float64."""
        candidates = list(candidates)
        rewards = torch.tensor([each.reward for each in candidates], dtype=torch.float64)
        logprobs = torch.tensor([each.logprob for each in candidates], dtype=torch.float64)
        return logprobs + self.weight * (rewards - rewards.max())


def _wave(state: ARGSState, texts: list[tuple[int, tuple[int, ...]]], *, kept: int, forced: bool) -> Wave:
    """One more token for texts of some chains, of which ``kept`` tokens stand: their own next one, or the likeliest."""
    length = kept + 1
    asked = state.problem.sampling
    sampling = replace(asked, max_tokens=length, min_tokens=min(asked.min_tokens, length), temperature=0.0)
    prefix = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, (_, tokens) in zip(prefix, texts, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    keys = state.keys[[number for number, _ in texts], :length]
    cut = torch.full((len(texts),), kept)
    observe: frozenset[Observable] = frozenset() if forced else frozenset(("alternatives",))
    return Wave(state.problem.prompt, prefix, cut, keys, sampling, observe=observe, forced=forced)


def _said(wave: Wave, rollouts: Rollouts, row: int) -> bool:
    """Whether a row has got its token."""
    return bool(rollouts.lengths[row] > wave.cut[row])


def _judge(state: ARGSState, candidate: Extension, row: int, rollouts: Rollouts, rewards: Tensor) -> Extension:
    """The candidate that a row has said, with what is known of it now."""
    ends = rollouts.responses[row].complete
    return replace(candidate, reward=float(rewards[row]), place=(state.iteration, row), ends=ends)
