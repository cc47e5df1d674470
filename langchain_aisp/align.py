"""The one loop: a search asks for rollouts and rewards, and whoever drives it brings them.

``search`` knows no engine, no reward model, no thread and no event loop; it is a generator that yields what it wants.
``iterate`` answers it from a thread, ``aiterate`` from an event loop; ``align`` and ``aalign`` keep only the end.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, Required, TypeAlias, TypedDict, Unpack, cast

import torch
from torch import Tensor

from langchain_aisp.types import (
    Chat,
    Deciding,
    Engine,
    Info,
    Method,
    Problem,
    Prompt,
    Response,
    Reward,
    Rollouts,
    Sampling,
    StateT,
    Ticket,
    Wave,
    require,
)

Stopped = Literal["iterations", "finished", "samples", "seconds", "target_reward", "patience"]


@dataclass(frozen=True)
class Budget:
    """What a search may spend; it stops at whatever is reached first, or at the method's last iteration.

    Attributes:
        samples: Most responses to decode; the last wave is shortened to end exactly there.
        seconds: Wall-clock time; responses still being decoded then are cut off. A reward under way is waited for.
        target_reward: A complete response with this reward is good enough.
        patience: Iterations without a better response.
    """

    samples: int | None = None
    seconds: float | None = None
    target_reward: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        """Reject budgets that leave nothing to do."""
        for name in ("samples", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}; None means no limit")
        seconds, target = self.seconds, self.target_reward
        require(seconds is None or seconds > 0, f"seconds must be positive, got {seconds}; None means no limit")
        require(target is None or not math.isnan(target), "target_reward must not be nan; None means no target")

    def deadline(self, start: float) -> float | None:
        """When decoding must end, on the clock of ``start``; None for no limit."""
        return None if self.seconds is None else start + self.seconds

    def reason_to_stop(self, now: Iteration, best: Candidate) -> Stopped | None:
        """Which limit the search has reached after an iteration, if any."""
        if self.target_reward is not None and best.response.complete and best.reward >= self.target_reward:
            return "target_reward"
        if self.samples is not None and now.samples >= self.samples:
            return "samples"
        if self.seconds is not None and now.seconds >= self.seconds:
            return "seconds"
        if self.patience is not None and now.iteration - best.iteration >= self.patience:
            return "patience"
        return None


@dataclass(frozen=True)
class Score:
    """A search's wish to have candidates scored; the answer is [len(pairs)] float32."""

    pairs: tuple[tuple[Chat, Response], ...]


@dataclass(frozen=True)
class Iteration:
    """What one iteration brought, and what all of them have cost so far.

    Attributes:
        iteration: Number of the iteration, from 0.
        best: Reward of the best response so far.
        mean: Mean reward of this iteration's wave.
        info: What the method reports of its update.
        seconds: Wall-clock time since the search began.
        samples: Responses decoded so far.
        sampled_tokens: Tokens decoded so far, kept prefixes not counted.
        reward_calls: Responses scored so far; identical ones are scored once.
        reward_seconds: Time spent waiting for rewards so far.
        response: The best response so far.
    """

    iteration: int
    best: float
    mean: float
    info: Info
    seconds: float
    samples: int
    sampled_tokens: int
    reward_calls: int
    reward_seconds: float
    response: Response

    @property
    def ess(self) -> float:
        """Effective sample size of the wave's weights, between 1 and its number of rows."""
        return self.info["ess"]

    @property
    def control_kl(self) -> float:
        """KL divergence, in nats, of the controls from the unsteered model's prior over them."""
        return self.info["control_kl"]

    @property
    def numbers(self) -> dict[str, float]:
        """All of it but the response, as one flat line for a trace, a log or a progress bar."""
        return {
            "iteration": self.iteration,
            "best": self.best,
            "mean": self.mean,
            **self.info,
            "seconds": self.seconds,
            "samples": self.samples,
            "sampled_tokens": self.sampled_tokens,
            "reward_calls": self.reward_calls,
            "reward_seconds": self.reward_seconds,
        }


@dataclass(frozen=True)
class Candidate:
    """One decoded response and its reward.

    Attributes:
        response: What was said.
        reward: Its score; higher is better.
        iteration: The iteration that decoded it.
        row: Its row in that iteration's wave.
        tokens: Its token ids, the end token included.
    """

    response: Response
    reward: float
    iteration: int
    row: int
    tokens: tuple[int, ...]

    @property
    def rank(self) -> tuple[bool, float, int, int]:
        """Sorts the best first: complete before cut off, then by reward, then the earlier one."""
        return (not self.response.complete, -self.reward, self.iteration, self.row)


@dataclass(frozen=True)
class Aligned:
    """The outcome of a search.

    Attributes:
        method: Name of the method.
        prompt: What was answered.
        candidates: Every decoded response, the best first; before the others those that the method calls answers.
        trace: One record per iteration.
        stopped: The limit that ended the search.
    """

    method: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]
    trace: tuple[Iteration, ...]
    stopped: Stopped

    @property
    def best(self) -> Candidate:
        """The answer; cut off only when no response was complete."""
        return self.candidates[0]

    @property
    def distinct(self) -> tuple[Candidate, ...]:
        """The candidates without repetitions, the best first."""
        found: dict[Hashable, Candidate] = {}
        for candidate in self.candidates:
            found.setdefault(_identity(candidate.response), candidate)
        return tuple(found.values())

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt.ids)

    @property
    def samples(self) -> int:
        """Responses decoded in all."""
        return self.trace[-1].samples

    @property
    def sampled_tokens(self) -> int:
        """Tokens decoded in all, kept prefixes not counted."""
        return self.trace[-1].sampled_tokens

    @property
    def reward_calls(self) -> int:
        """Responses scored in all."""
        return self.trace[-1].reward_calls

    @property
    def seconds(self) -> float:
        """Wall-clock time of the search."""
        return self.trace[-1].seconds

    @property
    def reward_seconds(self) -> float:
        """Time spent waiting for rewards."""
        return self.trace[-1].reward_seconds


Wish: TypeAlias = Wave | Score | Iteration
Answer: TypeAlias = Rollouts | Tensor | None
Search: TypeAlias = Generator[Wish, Answer, Aligned]


def search(
    method: Method[StateT],
    problem: Problem,
    budget: Budget,
    *,
    clock: Callable[[], float] = time.monotonic,
    start: float | None = None,
) -> Search:
    """Search for the response with the highest reward.

    Rewards are taken to be deterministic within one search: a response that comes up again is not scored again.

    Args:
        method: Proposes waves and learns from their rewards.
        problem: What to answer, and how tokens are drawn.
        budget: When to stop.
        clock: Tells the time in seconds.
        start: When the search began, on that clock; by default when it is first advanced.

    Yields:
        A ``Wave``, to be sent its ``Rollouts``; a ``Score``, to be sent float32 rewards [len(pairs)]; an
        ``Iteration``, to be sent nothing.

    Returns:
        The candidates, the best first, and what they cost.
    """
    start = clock() if start is None else start
    state = method.init(problem)
    known: dict[Hashable, float] = {}
    candidates: list[Candidate] = []
    trace: list[Iteration] = []
    sampled_tokens, reward_seconds = 0, 0.0
    stopped: Stopped | None = None
    while stopped is None:
        wave = method.propose(state)
        if budget.samples is not None:
            wave = first_rows(wave, budget.samples - len(candidates))
        rollouts = cast(Rollouts, (yield wave))
        sampled_tokens += rollouts.sampled_tokens

        asked = clock()
        rewards = yield from _rewards(problem.prompt.chat, rollouts.responses, known)
        reward_seconds += clock() - asked

        state, info = method.update(state, wave, rollouts, rewards)
        candidates += _candidates(len(trace), rollouts, rewards)
        best = min(candidates, key=_order(state))
        now = Iteration(
            iteration=len(trace),
            best=best.reward,
            mean=float(rewards.mean()),
            info=info,
            seconds=clock() - start,
            samples=len(candidates),
            sampled_tokens=sampled_tokens,
            reward_calls=len(known),
            reward_seconds=reward_seconds,
            response=best.response,
        )
        trace.append(now)
        yield now
        stopped = budget.reason_to_stop(now, best) or _end(method, state, now)
    ranked = sorted(candidates, key=_order(state))
    return Aligned(method.name, problem.prompt, tuple(ranked), tuple(trace), stopped)


def _order(state: object) -> Callable[[Candidate], tuple[bool, tuple[bool, float, int, int]]]:
    """Sorts the best first: what the method calls an answer, if it does so, before anything else."""
    answers = state.answers if isinstance(state, Deciding) else frozenset()
    return lambda candidate: ((candidate.iteration, candidate.row) not in answers, candidate.rank)


def _end(method: Method[Any], state: object, now: Iteration) -> Stopped | None:
    """Whether the method has come to its end."""
    if isinstance(state, Deciding) and state.finished:
        return "finished"
    return "iterations" if now.iteration + 1 == method.iterations else None


def first_rows(wave: Wave, count: int) -> Wave:
    """The wave's first ``count`` rows; steering is indexed by row, so it serves them unchanged."""
    return replace(wave, prefix=wave.prefix[:count], cut=wave.cut[:count], keys=wave.keys[:count])


class Settings(TypedDict, total=False):
    """How a conversation is answered.

    Attributes:
        sampling: How tokens are drawn; always needed.
        tools: Tools that the model is told of, in the form of the OpenAI API; none unless given.
        seed: The same seed gives the same answer; 0 unless given.
        budget: When to stop; without one, at the method's last iteration.
        continue_last: Continue the last message instead of answering it; False unless given.
    """

    sampling: Required[Sampling]
    tools: Sequence[Mapping[str, Any]]
    seed: int
    budget: Budget
    continue_last: bool


def iterate(
    engine: Engine,
    reward: Reward,
    method: Method[Any],
    chat: Chat,
    **settings: Unpack[Settings],
) -> Generator[Iteration | Aligned, None, None]:
    """Answer a conversation, telling of every iteration.

    Leaving early, by an exception or by closing the iterator, cancels what is in flight.

    Args:
        engine: Decodes the waves.
        reward: Scores the responses.
        method: The search.
        chat: The conversation to answer.
        settings: ``sampling`` and, if wanted, ``tools``, ``seed``, ``budget`` and ``continue_last``, see ``Settings``.

    Yields:
        An ``Iteration`` after each wave and, last, the ``Aligned`` outcome.
    """
    run = _start(engine, reward, method, chat, settings)
    step = run.advance(None)
    while not isinstance(step, Aligned):
        answer: Answer = None
        if isinstance(step, Iteration):
            yield step
        else:
            with run.submit(step, None) as ticket:
                answer = ticket.future.result()
        step = run.advance(answer)
    yield step


async def aiterate(
    engine: Engine,
    reward: Reward,
    method: Method[Any],
    chat: Chat,
    **settings: Unpack[Settings],
) -> AsyncGenerator[Iteration | Aligned, None]:
    """``iterate`` for an event loop, which stays free while others decode, score or compute; see there."""
    loop = asyncio.get_running_loop()
    run = await loop.run_in_executor(_thinkers, _start, engine, reward, method, chat, settings)
    step = await loop.run_in_executor(_thinkers, run.advance, None)
    while not isinstance(step, Aligned):
        answer: Answer = None
        if isinstance(step, Iteration):
            yield step
        else:
            with run.submit(step, loop) as ticket:
                # Unshielded, a cancelled task would cancel the bare future first, and the ticket, finding it done,
                # would not tell the engine.
                answer = await asyncio.shield(asyncio.wrap_future(ticket.future))
        step = await loop.run_in_executor(_thinkers, run.advance, answer)
    yield step


def align(
    engine: Engine,
    reward: Reward,
    method: Method[Any],
    chat: Chat,
    **settings: Unpack[Settings],
) -> Aligned:
    """Answer a conversation; arguments as for ``iterate``."""
    steps = iterate(engine, reward, method, chat, **settings)
    [aligned] = [step for step in steps if isinstance(step, Aligned)]
    return aligned


async def aalign(
    engine: Engine,
    reward: Reward,
    method: Method[Any],
    chat: Chat,
    **settings: Unpack[Settings],
) -> Aligned:
    """Answer a conversation from an event loop; arguments as for ``iterate``."""
    steps = aiterate(engine, reward, method, chat, **settings)
    [aligned] = [step async for step in steps if isinstance(step, Aligned)]
    return aligned


# The methods' arithmetic of asynchronous callers runs here. Nothing ever waits in these threads, so unlike asyncio's
# default executor, where callers may be parked, they are always soon free.
_thinkers = ThreadPoolExecutor(thread_name_prefix="aisp-method")


@dataclass(frozen=True)
class _Run:
    """A search under way and those who answer it; the two drivers differ only in how they wait."""

    engine: Engine
    reward: Reward
    steps: Search
    deadline: float | None

    def advance(self, answer: Answer) -> Wish | Aligned:
        """The search's next wish or, last, its outcome."""
        try:
            return self.steps.send(answer)
        except StopIteration as end:
            return cast(Aligned, end.value)

    def submit(self, wish: Wave | Score, loop: asyncio.AbstractEventLoop | None) -> Ticket[Rollouts | Tensor]:
        """Start what the search asks for."""
        if isinstance(wish, Wave):
            return self.engine.submit(wish, deadline=self.deadline)
        return self.reward.submit(wish.pairs, loop=loop)


def _start(engine: Engine, reward: Reward, method: Method[Any], chat: Chat, settings: Settings) -> _Run:
    """Set up a search; its clock starts once the prompt is encoded."""
    prompt = engine.encode(
        chat,
        tools=settings.get("tools", ()),
        seed=settings.get("seed", 0),
        continue_last=settings.get("continue_last", False),
    )
    start = time.monotonic()
    budget = settings.get("budget", Budget())
    steps = search(method, Problem(prompt, settings["sampling"], engine.head), budget, start=start)
    return _Run(engine, reward, steps, budget.deadline(start))


def _rewards(
    chat: Chat, responses: Sequence[Response], known: dict[Hashable, float]
) -> Generator[Wish, Answer, Tensor]:
    """Rewards [N] of the responses; asks for those not ``known`` yet, once each, and remembers them."""
    identities = [_identity(response) for response in responses]
    unknown = {
        identity: (chat, response)
        for identity, response in zip(identities, responses, strict=True)
        if identity not in known
    }
    if unknown:
        rewards = cast(Tensor, (yield Score(tuple(unknown.values()))))
        assert rewards.shape == (len(unknown),), f"{len(unknown)} pairs got rewards of shape {tuple(rewards.shape)}"
        known.update(zip(unknown, rewards.tolist(), strict=True))
    return torch.tensor([known[identity] for identity in identities], dtype=torch.float32)


def _identity(response: Response) -> Hashable:
    """What makes two responses the same to a reward; tool calls are dicts, so they are compared as text."""
    tool_calls = json.dumps([response.tool_calls, response.invalid_tool_calls], default=repr)
    return (response.text, response.finish_reason, response.reasoning, tool_calls)


def _candidates(iteration: int, rollouts: Rollouts, rewards: Tensor) -> list[Candidate]:
    """A wave's rows as candidates."""
    rows = zip(rollouts.responses, rewards.tolist(), rollouts.tokens.tolist(), rollouts.lengths.tolist(), strict=True)
    return [
        Candidate(response, reward, iteration, row, tuple(tokens[:length]))
        for row, (response, reward, tokens, length) in enumerate(rows)
    ]
