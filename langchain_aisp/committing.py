"""Streaming block by block: search for the next tokens, commit the best ones, send them, and go on from there.

Every block is a search of its own, run by the drivers of ``align``: the committed tokens are a kept beginning of all
its rows, and the method sees a problem that begins where they end. So any method will do, but the reward has to
understand unfinished texts. What is committed stays, however the answer goes on: no promise is made against plain
samples of whole answers.
"""

from __future__ import annotations

from asyncio import shield, to_thread, wrap_future
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from dataclasses import dataclass, fields, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from langchain_aisp.align import Aligned, Budget, Candidate, Iteration, Settings, Stopped, aiterate, iterate
from langchain_aisp.futures import gather
from langchain_aisp.methods.misvo import MISVOState
from langchain_aisp.methods.published import PublishedState
from langchain_aisp.noise import fold
from langchain_aisp.rewards.partial import is_partial
from langchain_aisp.types import (
    Chat,
    Ended,
    Engine,
    Grammar,
    Head,
    Info,
    Method,
    Problem,
    Prompt,
    Response,
    Reward,
    Rollouts,
    Sampling,
    Steering,
    Ticket,
    Wave,
    require,
)

_UNDECODED = "\ufffd"  # stands for the bytes of a character that is not there to its end


@dataclass(frozen=True)
class Block:
    """What was committed, and will not be taken back.

    Attributes:
        text: What it adds to the text. The blocks' texts, in order, are the text of the answer.
        tokens: Its token ids.
        reward: Reward of the text so far and what was planned to follow it.
    """

    text: str
    tokens: tuple[int, ...]
    reward: float


def check_committing(reward: Reward, commit_every: int, look_ahead: int | None, settings: Settings) -> None:
    """Refuse what cannot be committed block by block.

    Raises:
        ValueError: Says what, and what to do.
    """
    budget = settings.get("budget", Budget())
    require(commit_every >= 1, f"commit_every must be at least 1 token, got {commit_every}; None commits nothing early")
    require(look_ahead is None or look_ahead >= 0, f"look_ahead must not be negative, got {look_ahead}")
    require(
        is_partial(reward),
        f"commit_every={commit_every} sends text before its end is known, so the reward has to understand unfinished "
        f"texts, and {reward.name!r} does not say so: promise it with as_reward(..., partial=True), or leave out "
        "commit_every",
    )
    require(
        settings["sampling"].grammar is None and not settings.get("tools"),
        "commit_every sends text as it grows, and a call or an answer in JSON is worth nothing until it is whole: "
        "leave out commit_every, or response_format, grounded_answers and the tools",
    )
    answers = settings.get("answers", 1)
    require(answers == 1, f"commit_every writes one answer, and n={answers} were asked for; leave out one of them")
    require(
        budget.min_base_logprob is None and budget.kl_budget is None,
        "min_base_logprob and kl_budget bound a whole answer, and commit_every never sees one before it is sent; leave "
        "out the limits or commit_every",
    )


def commit(
    engine: Engine,
    reward: Reward,
    method: Method[Any],
    chat: Chat,
    *,
    commit_every: int,
    look_ahead: int | None = None,
    **settings: Unpack[Settings],
) -> Generator[Iteration | Block | Aligned, None, None]:
    """Answer a conversation block by block.

    The method searches anew for every block, with all its samples; controls per position move on with the text. Of the
    budget, ``seconds`` are those of the whole answer, and the other limits hold for each block.

    Args:
        engine: Decodes the waves.
        reward: Scores unfinished texts, see ``as_reward(..., partial=True)``.
        method: The search.
        chat: The conversation to answer.
        commit_every: Tokens per block.
        look_ahead: Tokens that are planned beyond the block, and judged with it, before it is committed; as many as
            the block has unless given.
        settings: As for ``align.iterate``.

    Yields:
        An ``Iteration`` after each wave, a ``Block`` when it is committed and, last, the ``Aligned`` outcome with the
        one answer. Iterations count on from block to block.

    Raises:
        ValueError: For what ``check_committing`` refuses.
    """
    check_committing(reward, commit_every, look_ahead, settings)
    answer = _begin(engine, method, chat, commit_every, look_ahead, settings)
    while answer.end is None:
        plan = answer.plan()
        with closing(iterate(plan.engine, reward, plan.method, chat, **plan.settings)) as steps:
            for step in steps:
                if isinstance(step, Iteration):
                    answer = answer.counting(plan, step)
                    yield answer.trace[-1]
                else:
                    with engine.submit(plan.said(step.best)) as ticket:
                        answer = answer.grown(plan, step, ticket.future.result())
        assert answer.block is not None
        yield answer.block
    yield answer.aligned


async def acommit(
    engine: Engine,
    reward: Reward,
    method: Method[Any],
    chat: Chat,
    *,
    commit_every: int,
    look_ahead: int | None = None,
    **settings: Unpack[Settings],
) -> AsyncGenerator[Iteration | Block | Aligned, None]:
    """``commit`` for an event loop; see there."""
    check_committing(reward, commit_every, look_ahead, settings)
    answer = await to_thread(_begin, engine, method, chat, commit_every, look_ahead, settings)
    while answer.end is None:
        plan = answer.plan()
        async with aclosing(aiterate(plan.engine, reward, plan.method, chat, **plan.settings)) as steps:
            async for step in steps:
                if isinstance(step, Iteration):
                    answer = answer.counting(plan, step)
                    yield answer.trace[-1]
                else:
                    with engine.submit(plan.said(step.best)) as ticket:
                        answer = answer.grown(plan, step, await shield(wrap_future(ticket.future)))
        assert answer.block is not None
        yield answer.block
    yield answer.aligned


@dataclass(frozen=True)
class _Answer:
    """How far an answer is, and what it has cost.

    Attributes:
        engine: Decodes.
        method: Searches for each block.
        prompt: What is answered.
        settings: Those of the whole answer.
        every: Tokens per block.
        ahead: Tokens planned beyond it.
        tokens: Committed so far.
        text: What was sent of them.
        trace: All iterations so far.
        blocks: How many blocks that were.
        state: What the method came to in the last block; None before the first.
        block: The last block.
        end: The whole answer, once it is there.
    """

    engine: Engine
    method: Method[Any]
    prompt: Prompt
    settings: Settings
    every: int
    ahead: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    trace: tuple[Iteration, ...] = ()
    blocks: int = 0
    state: Any = None
    block: Block | None = None
    end: Candidate | None = None

    @property
    def seconds_left(self) -> float | None:
        """Of the budget; None without a limit."""
        limit = self.settings.get("budget", Budget()).seconds
        return limit if limit is None or not self.trace else limit - self.trace[-1].seconds

    @property
    def aligned(self) -> Aligned:
        """The outcome: the answer alone, and what all blocks have cost."""
        assert self.end is not None
        stopped: Stopped = "seconds" if self.end.response.finish_reason == "timeout" else "finished"
        return Aligned(self.method.name, self.prompt, (self.end,), self.trace, stopped)

    def plan(self) -> _Plan:
        """The search for the next block."""
        sampling, done = self.settings["sampling"], len(self.tokens)
        length = min(self.every + self.ahead, sampling.max_tokens - done)
        key = self.prompt.key if self.blocks == 0 else fold(self.prompt.key, self.blocks)
        wanted = replace(sampling, max_tokens=length, min_tokens=min(length, max(0, sampling.min_tokens - done)))
        budget = replace(self.settings.get("budget", Budget()), seconds=self.seconds_left)
        return _Plan(
            _Continued(
                self.engine,
                replace(self.prompt, key=key),
                torch.tensor(self.tokens, dtype=torch.int64),
                None if done + length == sampling.max_tokens else length,
            ),
            _Carrying(self.method, self.state, self.every),
            Settings(sampling=wanted, budget=budget),
            self.every,
            self.trace[-1] if self.trace else None,
        )

    def counting(self, plan: _Plan, now: Iteration) -> _Answer:
        """With an iteration, counted on from those of the blocks before."""
        return replace(self, trace=(*self.trace, plan.counted(now)))

    def grown(self, plan: _Plan, found: Aligned, said: Rollouts) -> _Answer:
        """With the next block, as the engine spells it, committed."""
        best, left = found.best, self.seconds_left
        time_is_up = left is not None and left <= 0
        if isinstance(best.response, _Open) and not time_is_up:
            kept, end = best.tokens[: self.every], None
            text = _settled(said.responses[0].text, self.settings["sampling"].stop)
        else:
            kept, end = best.tokens, self._end(plan, best)
            text = end.response.text
        if not text.startswith(self.text):
            message = f"{self.engine.name} spells the committed text {self.text!r} otherwise when it goes on: {text!r}"
            raise RuntimeError(message)
        return replace(
            self,
            tokens=(*self.tokens, *kept),
            text=text,
            blocks=self.blocks + 1,
            state=plan.method.state,
            block=Block(text[len(self.text) :], kept, best.reward),
            end=end,
        )

    def _end(self, plan: _Plan, best: Candidate) -> Candidate:
        """The whole answer; cut off by the clock where it could have gone on."""
        response = best.response
        if isinstance(response, _Open):
            response = Response(**{**_parts(response), "finish_reason": "timeout"})
        iteration = best.iteration + (0 if plan.before is None else plan.before.iteration + 1)
        return replace(best, response=response, iteration=iteration, tokens=(*self.tokens, *best.tokens))


@dataclass(frozen=True)
class _Plan:
    """The search for one block.

    Attributes:
        engine: Begins where the committed tokens end.
        method: Begins with what it has learned.
        settings: Those of the block.
        every: Tokens that will be committed.
        before: The last iteration of the block before.
    """

    engine: _Continued
    method: _Carrying
    settings: Settings
    every: int
    before: Iteration | None

    def counted(self, now: Iteration) -> Iteration:
        """An iteration with the costs of the blocks before."""
        if self.before is None:
            return now
        sums = ("samples", "sampled_tokens", "reward_calls", "seconds", "reward_seconds")
        costs = {name: getattr(now, name) + getattr(self.before, name) for name in sums}
        return replace(now, iteration=now.iteration + self.before.iteration + 1, **costs)

    def said(self, best: Candidate) -> Wave:
        """The text with the block as a wave, so that the engine spells it; nothing is decoded."""
        tokens = [*self.engine.committed.tolist(), *best.tokens[: self.every]]
        length = max(1, len(tokens))  # time may have been up before the first token
        prefix = torch.tensor([tokens + [-1] * (length - len(tokens))])
        sampling = replace(self.settings["sampling"], max_tokens=length, min_tokens=0)
        return Wave(
            self.engine.prompt, prefix, torch.tensor([len(tokens)]), torch.zeros_like(prefix), sampling, forced=True
        )


class _Open(Response):
    """A text that stops where its plan does: not cut off, since the answer goes on."""

    @property
    def complete(self) -> bool:
        """It stands beside texts that have come to their end, and the reward decides."""
        return True


@dataclass(frozen=True)
class _Continued:
    """An engine for which an answer begins where the committed tokens end; texts are whole.

    Attributes:
        engine: Decodes.
        prompt: What is answered, with the block's noise key.
        committed: [C] int64 tokens.
        length: Tokens of a row that may still go on; None when the plan reaches the answer's own limit.
    """

    engine: Engine
    prompt: Prompt
    committed: Tensor
    length: int | None

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def head(self) -> Head:
        return self.engine.head

    def encode(self, chat: Chat, **_: Any) -> Prompt:
        """The prompt, which is encoded already."""
        return self.prompt

    def submit(self, wave: Wave, *, deadline: float | None = None, ended: Ended | None = None) -> Ticket[Rollouts]:
        """Decode what follows the committed tokens; nothing is told early, for that would be with these tokens."""
        ticket = self.engine.submit(self._whole(wave), deadline=deadline)
        return Ticket(gather([ticket.future], lambda rollouts: self._rest(rollouts[0])).future, ticket.cancel)

    def allowed(self, grammar: Grammar, tokens: Tensor, choices: Tensor) -> Tensor:
        """Never asked, since answers in blocks are refused a grammar."""
        raise NotImplementedError("an answer that is sent in blocks obeys no grammar")

    def _whole(self, wave: Wave) -> Wave:
        """The wave with the committed tokens before its own."""
        done, sampling = len(self.committed), wave.sampling
        tokens = self.committed.expand(len(wave), done)
        return replace(
            wave,
            prefix=torch.cat([tokens, wave.prefix], dim=1),
            cut=wave.cut + done,
            keys=torch.cat([torch.zeros_like(tokens), wave.keys], dim=1),
            sampling=_longer(sampling, done),
            steering=None if wave.steering is None else _Later(wave.steering, done),
        )

    def _rest(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts without the committed tokens."""
        done = len(self.committed)
        lengths = rollouts.lengths - done
        return replace(
            rollouts,
            tokens=rollouts.tokens[:, done:],
            lengths=lengths,
            responses=tuple(map(self._open, rollouts.responses, lengths.tolist())),
            observed={name: seen[:, done:] for name, seen in rollouts.observed.items()},
        )

    def _open(self, response: Response, length: int) -> Response:
        if length != self.length or response.finish_reason != "length":
            return response
        return _Open(**_parts(response))


@dataclass(frozen=True)
class _Later:
    """A steering whose positions begin where the committed tokens end.

    Attributes:
        steering: What steers.
        start: How many tokens are committed.
    """

    steering: Steering
    start: int

    @property
    def open_loop(self) -> bool:
        return self.steering.open_loop

    def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        return self.steering.offset(rows, positions - self.start, keys, hidden)


class _Carrying:
    """A method that begins with what it has learned in the block before.

    Attributes:
        state: What it has come to.
    """

    def __init__(self, method: Method[Any], state: Any, count: int) -> None:
        """Take the state it came to before, None for none, and how many tokens were committed since."""
        self.method, self.state, self._count = method, state, count

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def iterations(self) -> int:
        return self.method.iterations

    def init(self, problem: Problem) -> Any:
        return carried(self.state, self.method.init(problem), self._count)

    def propose(self, state: Any) -> Wave:
        return self.method.propose(state)

    def update(self, state: Any, wave: Wave, rollouts: Rollouts, rewards: Tensor) -> tuple[Any, Info]:
        self.state, info = self.method.update(state, wave, rollouts, rewards)
        return self.state, info


def carried(before: Any, fresh: Any, count: int) -> Any:
    """A fresh state with what the one before has learned about positions that are still to come.

    Controls per position move ``count`` positions on. Methods without such controls begin anew: what they know are
    responses, and those have parted from the committed text.
    """
    if isinstance(before, PublishedState):
        return replace(fresh, mean=_shifted(before.mean, fresh.mean, count))
    if isinstance(before, MISVOState):
        controls = _shifted(before.controls, fresh.controls, count)
        return replace(fresh, controls=controls, fisher=before.fisher, tokens=before.tokens)
    return fresh


def _shifted(controls: Tensor, fresh: Tensor, count: int) -> Tensor:
    """Controls [T, D] of which the first ``count`` have been spent, as long as the fresh ones [T', D]."""
    shifted = fresh.clone()
    left = controls[count:][: len(fresh)]
    shifted[: len(left)] = left
    return shifted


def _begin(
    engine: Engine, method: Method[Any], chat: Chat, every: int, ahead: int | None, settings: Settings
) -> _Answer:
    prompt = engine.encode(chat, seed=settings.get("seed", 0), continue_last=settings.get("continue_last", False))
    return _Answer(engine, method, prompt, settings, every, every if ahead is None else ahead)


def _longer(sampling: Sampling, tokens: int) -> Sampling:
    return replace(sampling, max_tokens=sampling.max_tokens + tokens, min_tokens=sampling.min_tokens + tokens)


def _parts(response: Response) -> dict[str, Any]:
    return {field.name: getattr(response, field.name) for field in fields(response)}


def _settled(text: str, stop: tuple[str, ...]) -> str:
    """As much of an unfinished text as later tokens cannot change: no half character, no beginning of a stop string."""
    begun = (count for each in stop for count in range(1, len(each)) if text.endswith(each[:count]))
    return text[: len(text) - max(begun, default=0)].rstrip(_UNDECODED)
