"""One call of the chat model: a search to be run, and its outcome as LangChain's messages."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import attrgetter
from statistics import mean
from typing import Any

from langchain_core.exceptions import ModelTimeoutError
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessageChunk, ToolCallChunk, message_chunk_to_message
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk as create_tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from torch import Tensor

from langchain_aisp.ahead import waits
from langchain_aisp.align import Aligned, Budget, Candidate, Iteration, Settings, aiterate, iterate, said_logprobs
from langchain_aisp.calling import UNJUDGED, Speech, compares_kinds, judges_calls
from langchain_aisp.committing import Block, acommit, check_committing, commit
from langchain_aisp.logprobs import Entry, Logprobs
from langchain_aisp.messages import continues_last
from langchain_aisp.methods import BestOfN, Greedy
from langchain_aisp.rewards import as_reward
from langchain_aisp.rewards.partial import is_partial
from langchain_aisp.types import (
    Chat,
    Engine,
    Method,
    Response,
    Reward,
    Rollouts,
    Sampling,
    Ticket,
    Wave,
    aanswered,
    answered,
)

CALLS = 16
"""So many calls are drawn where no reward judges them; the likeliest is made."""


@dataclass(frozen=True)
class Outcome:
    """What a search has found, and what the model by itself thinks of it.

    Attributes:
        aligned: The outcome of the search.
        answers: The responses that are returned, the best first.
        logprobs: For each of these the entries of its tokens; none if they were not asked for.
    """

    aligned: Aligned
    answers: tuple[Candidate, ...]
    logprobs: tuple[list[Entry], ...] = ()


@dataclass(frozen=True)
class Request:
    """Everything that one answer depends on.

    Attributes:
        model_name: What the user calls the model.
        engine: Decodes.
        reward: Scores.
        method: Searches.
        chat: The conversation as it was given.
        speech: What is to be answered, and what the answer may be.
        sampling: How tokens are drawn.
        seed: Fixes the noise.
        budget: What the search may spend, and how far the answer may part from the model.
        n: How many of the best distinct responses are wanted.
        logprobs: How the log-probabilities of their tokens are told; None if they are not.
        commit_every: Tokens per block when the answer is sent block by block; None when it is sent as a whole.
        own: The model's own answer, judged, if it has decided of which kind the answer is; it stands for election too.
    """

    model_name: str
    engine: Engine
    reward: Reward
    method: Method[Any]
    chat: Chat
    speech: Speech
    sampling: Sampling
    seed: int
    budget: Budget
    n: int
    logprobs: Logprobs | None = None
    commit_every: int | None = None
    own: Aligned | None = None

    def __post_init__(self) -> None:
        """Reject what cannot be sent block by block."""
        if self.commit_every is not None:
            check_committing(self.reward, self.commit_every, None, self.settings)

    @property
    def settings(self) -> Settings:
        """How the search answers."""
        return Settings(
            sampling=replace(self.sampling, grammar=self.speech.grammar, reader=self.speech.reader),
            tools=self.speech.tools,
            seed=self.seed,
            budget=self.budget,
            answers=self.n,
            continue_last=continues_last(self.speech.chat),
        )

    @property
    def undecided(self) -> bool:
        """Whether the model has to say first what its answer is, a call or a text: the reward cannot."""
        if not self.speech.may_call:
            return False
        return not judges_calls(self.reward) or (self.speech.call_only is not None and not compares_kinds(self.reward))

    @property
    def alone(self) -> Request:
        """The model's own likeliest answer, whatever the reward thinks of it."""
        reward = self.reward if judges_calls(self.reward) else _LIKELIHOOD
        speech = replace(self.speech, may_call=False)
        return replace(self, reward=reward, method=Greedy(), speech=speech, commit_every=None)

    def decided(self, alone: Aligned) -> Request:
        """The request for the best answer of the own one's kind, or for the likeliest call if nobody judges calls."""
        response = alone.best.response
        if self.speech.text_only is None or response.tool_calls or response.invalid_tool_calls:
            calls = replace(self.speech, grammar=self.speech.call_only or self.speech.grammar, may_call=False)
            decided = replace(self, speech=calls, own=alone)
            return decided if judges_calls(self.reward) else decided.unjudged
        texts = replace(self.speech, grammar=self.speech.text_only, may_call=False)
        return replace(self, speech=texts, own=alone if judges_calls(self.reward) else None)

    @property
    def unjudged(self) -> Request:
        """Calls as the model would make them, of which ``_ended`` takes the likeliest."""
        sampling, budget = replace(self.sampling, temperature=1.0), replace(self.budget, target_reward=None)
        unjudged = replace(self, sampling=sampling, budget=budget, commit_every=None)
        return replace(unjudged, reward=_LIKELIHOOD, method=BestOfN(CALLS))

    @property
    def is_unjudged(self) -> bool:
        """Whether it is the log-probability that chooses among calls: known when all are there, so news come last."""
        return self.reward is _LIKELIHOOD and self.own is not None

    @property
    def told_reward(self) -> Reward:
        """The reward, told the conversation as it was given, not as it was rewritten for the model's template."""
        return self.reward if self.speech.chat is self.chat else _AsGiven(self.reward, self.chat)

    def iterate(self) -> Generator[Iteration | Block | Outcome]:
        """Run the search; whoever waits is a thread."""
        with closing(self._search()) as steps:
            for step in steps:
                yield answered(self._outcome(step), self._decode) if isinstance(step, Aligned) else step

    async def aiterate(self) -> AsyncGenerator[Iteration | Block | Outcome]:
        """Run the search; whoever waits is an event loop."""
        async with aclosing(self._asearch()) as steps:
            async for step in steps:
                yield await aanswered(self._outcome(step), self._adecode) if isinstance(step, Aligned) else step

    def _search(self) -> Generator[Iteration | Block | Aligned]:
        if self.undecided:
            [*_, alone] = self.alone._search()
            assert isinstance(alone, Aligned)
            yield from self.decided(alone)._search()
            return
        given, every = (self.engine, self.told_reward, self.method, self.speech.chat), self.commit_every
        settings = self.settings
        search = iterate(*given, **settings) if every is None else commit(*given, commit_every=every, **settings)
        with closing(search) as steps:
            for step in steps:
                if isinstance(step, Aligned):
                    found = answered(self._ended(step), self._decode)
                    yield from found.trace if self.is_unjudged else ()
                    yield found
                elif not self.is_unjudged:
                    yield step

    async def _asearch(self) -> AsyncGenerator[Iteration | Block | Aligned]:
        if self.undecided:
            [*_, alone] = [step async for step in self.alone._asearch()]
            assert isinstance(alone, Aligned)
            async with aclosing(self.decided(alone)._asearch()) as steps:
                async for step in steps:
                    yield step
            return
        given, every = (self.engine, self.told_reward, self.method, self.speech.chat), self.commit_every
        settings = self.settings
        search = aiterate(*given, **settings) if every is None else acommit(*given, commit_every=every, **settings)
        async with aclosing(search) as steps:
            async for step in steps:
                if isinstance(step, Aligned):
                    found = await aanswered(self._ended(step), self._adecode)
                    for now in found.trace if self.is_unjudged else ():
                        yield now
                    yield found
                elif not self.is_unjudged:
                    yield step

    def _ended(self, found: Aligned) -> Generator[Wave, Rollouts, Aligned]:
        """The outcome of the search, with the model's own answer among the candidates, before others of its reward.

        Of equally good calls, which are all if nobody judges them, the first is the one that the model by itself finds
        likeliest. What the grammar left out counts, so a call that it would rather have made otherwise is unlikely.
        Asks for a wave then.
        """
        found = found if self.own is None else _beside(self.own, found)
        calls = self._equal_calls(found)
        if not calls or (len(calls) == 1 and not self.is_unjudged):
            return found
        tokens = [each.tokens for each in calls]
        wave = Wave.saying(found.prompt, tokens, replace(self.sampling, grammar=None), {"base_logprobs"})
        logprobs = said_logprobs(wave, (yield wave), tokens)
        if not self.is_unjudged:
            likeliest = calls[max(range(len(calls)), key=logprobs.__getitem__)]
            return replace(found, candidates=(likeliest, *(each for each in found.candidates if each is not likeliest)))
        judged = [replace(each, reward=nats) for each, nats in zip(calls, logprobs, strict=True)]
        ranked = tuple(sorted(judged, key=attrgetter("rank")))
        now = replace(found.trace[-1], best=ranked[0].reward, mean=mean(logprobs), response=ranked[0].response)
        return replace(found, candidates=ranked, trace=(now,))

    def _equal_calls(self, found: Aligned) -> list[Candidate]:
        """The best calls; none if the answer is a text, or is being sent already."""
        best = found.best
        if not best.tokens or self.commit_every is not None or not (self.is_unjudged or best.response.tool_calls):
            return []
        good = [each for each in found.feasible if each.response.complete and each.reward == best.reward]
        return good or [best]

    def _outcome(self, aligned: Aligned) -> Generator[Wave, Rollouts, Outcome]:
        """What is told of a search; asks for a wave if the log-probabilities of the answers are wanted."""
        answers = aligned.feasible[: self.n]
        if self.logprobs is None:
            return Outcome(aligned, answers)
        logprobs = yield from self.logprobs.tell(aligned.prompt, answers, self.sampling.stop)
        return Outcome(aligned, answers, logprobs)

    def _decode(self, wave: Wave) -> Rollouts:
        with self.engine.submit(wave) as ticket:
            return ticket.future.result()

    async def _adecode(self, wave: Wave) -> Rollouts:
        with self.engine.submit(wave) as ticket:
            return await asyncio.shield(asyncio.wrap_future(ticket.future))  # shielded as in ``align.aiterate``


@dataclass(frozen=True)
class _AsGiven:
    """A reward that is told the conversation as it was given, not as it was rewritten for a chat template."""

    reward: Reward
    chat: Chat

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def partial(self) -> bool:
        return is_partial(self.reward)

    @property
    def waits(self) -> bool:
        return waits(self.reward)

    @property
    def fingerprint(self) -> str:
        return self.reward.fingerprint

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: asyncio.AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        return self.reward.submit([(self.chat, response) for _, response in pairs], loop=loop)


def _beside(own: Aligned, found: Aligned) -> Aligned:
    """The outcome of a search with another answer among the candidates, before others of its reward."""
    if own.stopped == "infeasible":
        return found
    if found.stopped == "infeasible":
        return replace(found, candidates=(own.best, *found.candidates), stopped=own.stopped)
    better = sum(1 for _ in takewhile(lambda each: each.rank < own.best.rank, found.candidates))
    return replace(found, candidates=(*found.candidates[:better], own.best, *found.candidates[better:]))


def _indifferent(chat: Chat, responses: Sequence[Response]) -> list[float]:
    return [0.0] * len(responses)


_LIKELIHOOD = as_reward(_indifferent, sees="response", name=UNJUDGED)


def chunk(request: Request, step: Iteration | Block | Outcome) -> ChatGenerationChunk:
    """An iteration as an empty chunk with its line of the trace, or the outcome as the chunk with the answer.

    A block is a chunk with its text; then nothing of the text is left for the outcome.

    Merged, the chunks of a stream make the message of ``invoke``. LangChain appends lists when it merges, but it
    concatenates strings and refuses unequal floats: so every other key stands on one chunk only.
    """
    if isinstance(step, Iteration):
        return ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata={"trace": [step.numbers]}))
    if isinstance(step, Block):
        return ChatGenerationChunk(message=AIMessageChunk(content=step.text))
    return ChatGenerationChunk(message=_answer(request, step, 0))


def result(request: Request, steps: Sequence[Iteration | Block | Outcome]) -> ChatResult:
    """The answer as its stream would have brought it, and behind it the next best ones that were asked for."""
    result = generate_from_stream(chunk(request, step) for step in steps)
    outcome = steps[-1]
    assert isinstance(outcome, Outcome)
    others = [message_chunk_to_message(_answer(request, outcome, rank)) for rank in range(1, len(outcome.answers))]
    return ChatResult(generations=[*result.generations, *(ChatGeneration(message=message) for message in others)])


def _answer(request: Request, outcome: Outcome, rank: int) -> AIMessageChunk:
    """The answer of this rank, 0 for the best, as one chunk."""
    aligned, best = outcome.aligned, outcome.answers[rank]
    if best.response.finish_reason == "timeout" and not best.response.text:
        limit = request.budget.seconds
        raise ModelTimeoutError(f"{request.model_name} had no answer within {limit} seconds; give it more time.")
    response = best.response
    reasoning = {} if response.reasoning is None else {"reasoning_content": response.reasoning}
    logprobs = {"logprobs": {"content": outcome.logprobs[rank]}} if outcome.logprobs else {}
    limits = {"base_logprob": best.base_logprob, "kl": best.kl}
    calls = response.tool_calls or response.invalid_tool_calls
    return AIMessageChunk(
        content=response.text if request.commit_every is None else "",
        additional_kwargs=reasoning,
        tool_call_chunks=_call_chunks(response),
        response_metadata={
            "model_name": request.model_name,
            "model_provider": "aisp",
            "finish_reason": "tool_calls" if response.tool_calls and response.complete else response.finish_reason,
            "reward": best.reward,
            "reward_name": UNJUDGED if calls and not judges_calls(request.reward) else request.reward.name,
            "method": aligned.method,
            "samples": aligned.samples,
            "sampled_tokens": aligned.sampled_tokens,
            "reward_calls": aligned.reward_calls,
            "seconds": aligned.seconds,
            "stopped": aligned.stopped,
            "seed": request.seed,
            **{name: nats for name, nats in limits.items() if nats is not None},
            **logprobs,
        },
        usage_metadata=UsageMetadata(
            input_tokens=aligned.prompt_tokens,
            output_tokens=len(best.tokens),
            total_tokens=aligned.prompt_tokens + len(best.tokens),
        ),
        chunk_position="last",
    )


def _call_chunks(response: Response) -> list[ToolCallChunk]:
    """The calls of a response; LangChain parses their arguments again, leniently.

    An invalid call's arguments go as a JSON string: so nobody takes half of an object for a whole one.
    """
    return [
        create_tool_call_chunk(
            name=call["name"],
            args=json.dumps(call["args"], ensure_ascii=False),
            id=f"call_{uuid.uuid4().hex}",
            index=index,
        )
        for index, call in enumerate((*response.tool_calls, *response.invalid_tool_calls))
    ]
