"""The one loop: a search asks for rollouts and rewards, and whoever drives it brings them.

``search`` knows no engine, no reward model, no thread and no event loop; it is a generator that yields what it wants.
``iterate`` answers it from a thread, ``aiterate`` from an event loop; ``align`` and ``aalign`` keep only the end.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, Required, TypeAlias, TypedDict, Unpack, cast

import torch
from torch import Tensor

from langchain_aisp.ahead import Ahead, identity, waits
from langchain_aisp.types import (
    Chat,
    Crediting,
    Deciding,
    Engine,
    Flowing,
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

Stopped = Literal["iterations", "finished", "samples", "seconds", "target_reward", "patience", "infeasible"]
"""Why a search ended; ``infeasible`` stands for whatever it was when no response was within ``min_base_logprob``."""


@dataclass(frozen=True)
class Budget:
    """What a search may spend; it stops at whatever is reached first, or at the method's last iteration.

    The last two say how far an answer may part from the model by itself. ``kl_budget`` bounds what a steering does
    while tokens are drawn; a method that steers nothing spends nothing of it. ``min_base_logprob`` bounds the answer,
    however it was found: by steering, by branching, by choosing among many, or by argmax.

    Attributes:
        samples: Most responses to decode; the last wave is shortened to end exactly there.
        seconds: Wall-clock time; responses still being decoded then are cut off. A reward under way is waited for, and
            so is the last look at ``min_base_logprob``.
        target_reward: A complete response with this reward is good enough.
        patience: Iterations without a better response.
        kl_budget: Nats per response, kept beginnings included: the sum over its tokens of ``KL(steered ‖ unsteered)``,
            see ``Wave``, never passes it. Steered argmax decoding is refused, since it draws from nothing.
        min_base_logprob: Nats per response, at most 0: the natural logarithm of the probability with which the model by
            itself says the answer, at temperature 1, among the tokens allowed at each position. Only responses at least
            so likely are returned, or else the likeliest one, a complete one if there is any. It is the sum over the
            tokens, not their mean, which an absurd phrase among many likely tokens would pass: so it bounds every
            token, and longer answers need more room. ``-math.inf`` bounds nothing and tells the number.
    """

    samples: int | None = None
    seconds: float | None = None
    target_reward: float | None = None
    patience: int | None = None
    kl_budget: float | None = None
    min_base_logprob: float | None = None

    def __post_init__(self) -> None:
        """Reject budgets that leave nothing to do."""
        for name in ("samples", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}; None means no limit")
        seconds, target = self.seconds, self.target_reward
        require(seconds is None or seconds > 0, f"seconds must be positive, got {seconds}; None means no limit")
        require(target is None or not math.isnan(target), "target_reward must not be nan; None means no target")
        nats, logprob = self.kl_budget, self.min_base_logprob
        require(nats is None or nats >= 0, f"kl_budget must not be negative, got {nats}; None means no limit")
        require(
            logprob is None or logprob <= 0,
            f"min_base_logprob must be at most 0, the logarithm of certainty, got {logprob}; None means no limit",
        )

    def deadline(self, start: float) -> float | None:
        """When decoding must end, on the clock of ``start``; None for no limit."""
        return None if self.seconds is None else start + self.seconds

    def spent(self, samples: int, seconds: float) -> Stopped | None:
        """Which limit forbids to decode any more, if one does."""
        if self.samples is not None and samples >= self.samples:
            return "samples"
        return "seconds" if self.seconds is not None and seconds >= self.seconds else None

    def reason_to_stop(self, now: Iteration, best: Candidate) -> Stopped | None:
        """Which limit the search has reached after an iteration, if any."""
        good = self.target_reward is not None and best.reward >= self.target_reward
        if good and best.response.complete and now.feasible:
            return "target_reward"
        if (spent := self.spent(now.samples, now.seconds)) is not None:
            return spent
        if self.patience is not None and now.iteration - best.iteration >= self.patience:
            return "patience"
        return None


@dataclass(frozen=True)
class Score:
    """A search's wish to have candidates scored; the answer is [len(pairs)] float32."""

    pairs: tuple[tuple[Chat, Response], ...]


@dataclass(frozen=True)
class Check:
    """A search's wish to know how likely responses are that it has; the answer is the wave's ``Rollouts``.

    Unlike other waves it decodes nothing new but a token per row at most, and no deadline cuts it off.
    """

    wave: Wave


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
        base_logprob: Log-probability of that response, in nats, if ``Budget.min_base_logprob`` asks for it.
        feasible: Whether it is within that limit; if not, none so far is, and the best is the likeliest.
        kl: Nats by which that response was steered away from the model, if there is a ``Budget.kl_budget``.
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
    base_logprob: float | None = None
    feasible: bool = True
    kl: float | None = None

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
        limits = {} if self.base_logprob is None else {"base_logprob": self.base_logprob, "feasible": self.feasible}
        steered = {} if self.kl is None else {"kl": self.kl}
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
            **limits,
            **steered,
        }


@dataclass(frozen=True)
class Candidate:
    """One decoded response and its reward.

    Attributes:
        response: What was said.
        reward: Its score; higher is better.
        iteration: The iteration that decoded it.
        row: Its row in that iteration's wave; where rows take the places of others, its number in the order of ends.
        tokens: Its token ids, the end token included.
        base_logprob: Log-probability of the tokens, in nats, as ``Budget.min_base_logprob`` takes it; None if unknown.
        kl: Nats by which the tokens were steered away from the model; None without a ``Budget.kl_budget``.
        cut: Number of tokens that it began with; the others were decoded.
        known: Number of candidates that were there when it was begun, and that it may have these tokens from.
    """

    response: Response
    reward: float
    iteration: int
    row: int
    tokens: tuple[int, ...]
    base_logprob: float | None = None
    kl: float | None = None
    cut: int = 0
    known: int = 0

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
        candidates: Every decoded response, the best first; before the others those that the method calls answers, and
            among these last what is known to miss ``Budget.min_base_logprob``. If all miss it, the likeliest is first.
        trace: One record per iteration.
        stopped: The limit that ended the search.
        min_base_logprob: That limit, in nats.
    """

    method: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]
    trace: tuple[Iteration, ...]
    stopped: Stopped
    min_base_logprob: float | None = None

    @property
    def best(self) -> Candidate:
        """The answer; cut off only when no response was complete."""
        return self.candidates[0]

    @property
    def distinct(self) -> tuple[Candidate, ...]:
        """The candidates without repetitions, the best first."""
        return _distinct(self.candidates)

    @property
    def feasible(self) -> tuple[Candidate, ...]:
        """The distinct candidates that may be returned, the best first; the best alone where none is within the limit.

        With a limit these are as many as were asked for, since no others were looked at.
        """
        least = self.min_base_logprob
        if least is None:
            return self.distinct
        if not _is_within(self.best, least):
            return (self.best,)
        return _distinct(candidate for candidate in self.candidates if _is_within(candidate, least))

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


Wish: TypeAlias = Wave | Score | Check | Iteration
Answer: TypeAlias = Rollouts | Tensor | None
Search: TypeAlias = Generator[Wish, Answer, Aligned]


def search(
    method: Method[StateT],
    problem: Problem,
    budget: Budget,
    *,
    answers: int = 1,
    partial: bool = False,
    whole: bool = False,
    clock: Callable[[], float] = time.monotonic,
    start: float | None = None,
) -> Search:
    """Search for the response with the highest reward.

    Rewards are taken to be deterministic within one search: a response that comes up again is not scored again.

    Args:
        method: Proposes waves and learns from their rewards.
        problem: What to answer, and how tokens are drawn.
        budget: When to stop, and how far an answer may part from the model.
        answers: How many distinct responses are wanted within ``budget.min_base_logprob``.
        partial: Whether the rewards understand unfinished texts: then a method may ask what beginnings earn.
        whole: Whether all rows of a wave are scored together, so that no row takes the place of one that has ended.
        clock: Tells the time in seconds.
        start: When the search began, on that clock; by default when it is first advanced.

    Yields:
        A ``Wave``, to be sent its ``Rollouts``; a ``Score``, to be sent float32 rewards [len(pairs)]; a ``Check``, to
        be sent its wave's ``Rollouts``; an ``Iteration``, to be sent nothing.

    Returns:
        The candidates, the best first, and what they cost.
    """
    start = clock() if start is None else start
    state = method.init(problem)
    scoring = _Scoring(problem.prompt.chat, clock)
    spending, ranking = _Spending(budget.kl_budget), _Ranking(problem, budget.min_base_logprob)
    candidates: list[Candidate] = []
    trace: list[Iteration] = []
    sampled_tokens = 0
    scored: list[Tensor] = []  # rewards of this iteration
    begun: list[tuple[int, int]] = []  # cut and known candidates of the rows that are to go on
    stopped: Stopped | None = None
    while stopped is None:
        while partial and isinstance(state, Crediting) and (looks := state.beginnings) is not None:
            if budget.spent(len(candidates), clock() - start):
                break
            rollouts = cast(Rollouts, (yield Check(looks)))
            sampled_tokens += rollouts.sampled_tokens
            rewards = yield from scoring.rewards(rollouts.responses)
            state = cast(StateT, state.credited(rollouts, rewards))
        wave = method.propose(state)
        waiting = begun[wave.resumed :]
        if budget.samples is not None:
            wave = first_rows(wave, budget.samples - len(candidates) - len(waiting))
        begun = begun[: wave.resumed] + [(cut, len(candidates)) for cut in wave.cut[wave.resumed :].tolist()]
        wave = spending.bound(replace(wave, enough=None) if whole else wave)
        rollouts = cast(Rollouts, (yield wave))
        sampled_tokens += rollouts.sampled_tokens

        rewards = yield from scoring.rewards(rollouts.responses)
        state, info = method.update(state, wave, rollouts, rewards)
        nats = spending.charge(wave, rollouts)
        candidates += _candidates((len(trace), sum(map(len, scored))), rollouts, rewards, nats, begun)
        begun = [begun[row] for row in rollouts.going.tolist()] + waiting
        scored.append(rewards)
        if isinstance(state, Flowing) and state.goes_on and not budget.spent(len(candidates), clock() - start):
            continue
        best = yield from ranking.best(candidates, state)
        now = Iteration(
            iteration=len(trace),
            best=best.reward,
            mean=float(torch.cat(scored).mean()),
            info=info,
            seconds=clock() - start,
            samples=len(candidates),
            sampled_tokens=sampled_tokens,
            reward_calls=scoring.calls,
            reward_seconds=scoring.seconds,
            response=best.response,
            base_logprob=best.base_logprob,
            feasible=ranking.is_feasible(best),
            kl=best.kl,
        )
        trace.append(now)
        scored.clear()
        yield now
        stopped = budget.reason_to_stop(now, best) or _end(method, state, now)
    ranked = yield from ranking.all(candidates, state, answers)
    stopped = stopped if ranking.is_feasible(ranked[0]) else "infeasible"
    return Aligned(method.name, problem.prompt, tuple(ranked), tuple(trace), stopped, budget.min_base_logprob)


def _order(state: object) -> Callable[[Candidate], tuple[bool, tuple[bool, float, int, int]]]:
    """Sorts the best first: what the method calls an answer, if it does so, before anything else."""
    answers = state.answers if isinstance(state, Deciding) else frozenset()
    return lambda candidate: ((candidate.iteration, candidate.row) not in answers, candidate.rank)


def _end(method: Method[Any], state: object, now: Iteration) -> Stopped | None:
    """Whether the method has come to its end."""
    if isinstance(state, Deciding) and state.finished:
        return "finished"
    if isinstance(state, Flowing):
        return "iterations" if state.exhausted else None
    return "iterations" if now.iteration + 1 == method.iterations else None


def first_rows(wave: Wave, count: int) -> Wave:
    """The wave's first ``count`` rows; steering is indexed by row, so it serves them unchanged."""
    spent = None if wave.kl_spent is None else wave.kl_spent[:count]
    warm = None if wave.temperatures is None else wave.temperatures[:count]
    enough = None if wave.enough is None else min(wave.enough, count)
    return replace(
        wave,
        prefix=wave.prefix[:count],
        cut=wave.cut[:count],
        keys=wave.keys[:count],
        kl_spent=spent,
        temperatures=warm,
        enough=enough,
    )


class Settings(TypedDict, total=False):
    """How a conversation is answered.

    Attributes:
        sampling: How tokens are drawn; always needed.
        tools: Tools that the model is told of, in the form of the OpenAI API; none unless given.
        seed: The same seed gives the same answer; 0 unless given.
        budget: When to stop, and how far the answer may part from the model; without one, at the method's last
            iteration and without limits.
        answers: How many distinct responses are wanted within ``Budget.min_base_logprob``; 1 unless given.
        continue_last: Continue the last message instead of answering it; False unless given.
    """

    sampling: Required[Sampling]
    tools: Sequence[Mapping[str, Any]]
    seed: int
    budget: Budget
    answers: int
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
        settings: ``sampling`` and, if wanted, ``tools``, ``seed``, ``budget``, ``answers`` and ``continue_last``, see
            ``Settings``.

    Yields:
        An ``Iteration`` after each wave and, last, the ``Aligned`` outcome.
    """
    run = _start(engine, reward, method, chat, settings)
    ahead = run.ahead(None)
    step = run.advance(None)
    while not isinstance(step, Aligned):
        answer: Answer = None
        if isinstance(step, Iteration):
            yield step
        else:
            with run.submit(step, None, ahead) as ticket:
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
    ahead = run.ahead(loop)
    step = await loop.run_in_executor(_thinkers, run.advance, None)
    while not isinstance(step, Aligned):
        answer: Answer = None
        if isinstance(step, Iteration):
            yield step
        else:
            with run.submit(step, loop, ahead) as ticket:
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
    chat: Chat
    steps: Search
    deadline: float | None

    def ahead(self, loop: asyncio.AbstractEventLoop | None) -> Ahead | None:
        """What scores rows as they end, if that is any use; to be called where the search is driven from."""
        return Ahead(self.reward, self.chat, loop) if waits(self.reward) else None

    def advance(self, answer: Answer) -> Wish | Aligned:
        """The search's next wish or, last, its outcome."""
        try:
            return self.steps.send(answer)
        except StopIteration as end:
            return cast(Aligned, end.value)

    def submit(
        self, wish: Wave | Score | Check, loop: asyncio.AbstractEventLoop | None, ahead: Ahead | None
    ) -> Ticket[Rollouts | Tensor]:
        """Start what the search asks for."""
        if isinstance(wish, Check):
            return self.engine.submit(wish.wave)
        if isinstance(wish, Score):
            return self.reward.submit(wish.pairs, loop=loop) if ahead is None else ahead.submit(wish.pairs)
        if ahead is None:
            return self.engine.submit(wish, deadline=self.deadline)
        return ahead.during(self.engine.submit(wish, deadline=self.deadline, ended=ahead.tell))


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
    sampling = settings["sampling"]
    allowed = None if sampling.grammar is None else functools.partial(engine.allowed, sampling.grammar)
    problem = Problem(prompt, sampling, engine.head, allowed)
    partial = bool(getattr(reward, "partial", False))
    steps = search(
        method,
        problem,
        budget,
        answers=settings.get("answers", 1),
        partial=partial,
        whole=partial or waits(reward),  # either asks for something once per wave
        start=start,
    )
    return _Run(engine, reward, prompt.chat, steps, budget.deadline(start))


def _distinct(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The candidates without repetitions, in order."""
    found: dict[Hashable, Candidate] = {}
    for candidate in candidates:
        found.setdefault(identity(candidate.response), candidate)
    return tuple(found.values())


def _candidates(
    first: tuple[int, int],
    rollouts: Rollouts,
    rewards: Tensor,
    nats: Sequence[float | None],
    begun: Sequence[tuple[int, int]],
) -> list[Candidate]:
    """A wave's ended rows as candidates, from this iteration and row on; ``nats`` and ``begun`` are of all its rows."""
    iteration, place = first
    tokens, lengths = rollouts.tokens.tolist(), rollouts.lengths.tolist()
    ended = zip(rollouts.ended.tolist(), rollouts.responses, rewards.tolist(), strict=True)
    return [
        Candidate(
            response,
            reward,
            iteration,
            number,
            tuple(tokens[row][: lengths[row]]),
            kl=nats[row],
            cut=begun[row][0],
            known=begun[row][1],
        )
        for number, (row, response, reward) in enumerate(ended, start=place)
    ]


class _Scoring:
    """Rewards of responses to a conversation, each asked for once, and the time that this takes."""

    def __init__(self, chat: Chat, clock: Callable[[], float]) -> None:
        self._chat = chat
        self._clock = clock
        self._known: dict[Hashable, float] = {}
        self.seconds = 0.0

    @property
    def calls(self) -> int:
        """How many responses have been scored."""
        return len(self._known)

    def rewards(self, responses: Sequence[Response]) -> Generator[Wish, Answer, Tensor]:
        """Rewards [N] of the responses; asks for those that are not known yet."""
        asked, known = self._clock(), self._known
        identities = [identity(response) for response in responses]
        pairs = zip(identities, responses, strict=True)
        unknown = {each: (self._chat, response) for each, response in pairs if each not in known}
        if unknown:
            rewards = cast(Tensor, (yield Score(tuple(unknown.values()))))
            assert rewards.shape == (len(unknown),), f"{len(unknown)} pairs got rewards of shape {tuple(rewards.shape)}"
            known.update(zip(unknown, rewards.tolist(), strict=True))
        self.seconds += self._clock() - asked
        return torch.tensor([known[each] for each in identities], dtype=torch.float32)


class _Spending:
    """What decoded positions have taken of the KL budget, by their noise keys.

    A key belongs to one decoded position, and rows copy it with the token that they keep. A token that the method has
    chosen has a key of its own and was not drawn under any steering.
    """

    def __init__(self, budget: float | None) -> None:
        self._budget = budget
        self._nats: dict[int, float] = {}

    def bound(self, wave: Wave) -> Wave:
        """The wave with the budget, less what its rows keep."""
        if self._budget is None:
            return wave
        kept = zip(wave.keys.tolist(), wave.cut.tolist(), strict=True)
        spent = [sum(self._nats.get(key, 0.0) for key in keys[:cut]) for keys, cut in kept]
        return replace(wave, kl_budget=self._budget, kl_spent=torch.tensor(spent, dtype=torch.float64))

    def charge(self, wave: Wave, rollouts: Rollouts) -> Sequence[float | None]:
        """Note what a wave has taken; nats of each of its rows, with what they kept, None without a budget."""
        if wave.kl_spent is None:
            return [None] * len(wave)
        if wave.steering is None:
            return wave.kl_spent.tolist()
        require("kl" in rollouts.observed, "this engine cannot bound how far it steers; leave out kl_budget")
        positions = torch.arange(wave.keys.shape[1])
        decoded = (positions >= wave.cut[:, None]) & (positions < rollouts.lengths[:, None])
        taken = rollouts.observed["kl"].where(decoded, 0)
        self._nats.update(zip(wave.keys[taken > 0].tolist(), taken[taken > 0].tolist(), strict=True))
        total: list[float] = (wave.kl_spent + taken.double().sum(dim=1)).tolist()
        return total


class _Ranking:
    """Which candidates are best, and may be returned: only these are checked, from the best down, each text once."""

    def __init__(self, problem: Problem, least: float | None) -> None:
        self._problem = problem
        self._least = least
        self._known: dict[tuple[int, ...], float] = {(): 0.0}

    def is_feasible(self, candidate: Candidate) -> bool:
        """Whether a ranked candidate may be returned."""
        return self._least is None or _is_within(candidate, self._least)

    def best(self, candidates: Sequence[Candidate], state: object) -> Generator[Wish, Answer, Candidate]:
        """The best candidate, or the likeliest where none may be returned."""
        if self._least is None:
            return min(candidates, key=_order(state))
        return (yield from self.all(candidates, state, 1))[0]

    def all(
        self, candidates: Sequence[Candidate], state: object, wanted: int
    ) -> Generator[Wish, Answer, list[Candidate]]:
        """All candidates, the best first, so many of them checked that the ``wanted`` best distinct ones are known."""
        order = _order(state)
        ranked = sorted(candidates, key=order)
        if self._least is None:
            return ranked
        answers = sum(not order(candidate)[0] for candidate in ranked) or len(ranked)  # what stands is ranked first
        found, looked_at = 0, 0
        while found < wanted and looked_at < answers:
            looked_at = min(max(wanted, 4 * looked_at), answers)
            yield from self._learn(ranked[:looked_at])
            found = len(_distinct(each for each in ranked[:looked_at] if not self._misses(each)))
        told = [replace(each, base_logprob=self._known.get(each.tokens)) for each in ranked]
        by: Callable[[Candidate], Any] = self._misses if found else _likeliest_first
        return sorted(told[:answers], key=by) + told[answers:]

    def _misses(self, candidate: Candidate) -> bool:
        """Whether a candidate is known to be too unlikely."""
        assert self._least is not None
        return self._known.get(candidate.tokens, 0.0) < self._least

    def _learn(self, candidates: Sequence[Candidate]) -> Generator[Wish, Answer, None]:
        """Ask for the log-probabilities of those that are not known yet."""
        unknown = list(dict.fromkeys(each.tokens for each in candidates if each.tokens not in self._known))
        if not unknown:
            return
        wave = Wave.saying(self._problem.prompt, unknown, self._problem.sampling, {"base_logprobs"})
        rollouts = cast(Rollouts, (yield Check(wave)))
        self._known.update(zip(unknown, said_logprobs(wave, rollouts, unknown), strict=True))


def said_logprobs(wave: Wave, rollouts: Rollouts, answers: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of each answer, in nats, that a wave of ``Wave.saying`` has said and observed.

    Raises:
        ValueError: The engine drew tokens instead.
    """
    require(
        torch.equal(rollouts.tokens[wave.said], wave.prefix[wave.said]),
        "this engine draws tokens where it was given some (Wave.forced), so it cannot tell how likely a response is: "
        "leave out min_base_logprob, and let no tool be called",
    )
    steps = rollouts.observed["base_logprobs"][wave.said].double().split([len(tokens) for tokens in answers])
    return [float(each.sum()) for each in steps]


def _is_within(candidate: Candidate, least: float) -> bool:
    """Whether a candidate is known to be at least so likely."""
    return candidate.base_logprob is not None and candidate.base_logprob >= least


def _likeliest_first(candidate: Candidate) -> tuple[bool, float]:
    """Sorts candidates of known log-probability; complete ones before those that were cut off."""
    assert candidate.base_logprob is not None
    return (not candidate.response.complete, -candidate.base_logprob)
