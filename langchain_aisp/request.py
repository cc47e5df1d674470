"""One call of the chat model: a search to be run, and its outcome as LangChain's messages."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.exceptions import ModelTimeoutError
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessageChunk, ToolCallChunk, message_chunk_to_message
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk as create_tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from langchain_aisp.align import Aligned, Budget, Candidate, Iteration, Settings, aiterate, iterate
from langchain_aisp.calling import Speech, judges_calls
from langchain_aisp.messages import continues_last
from langchain_aisp.methods import Greedy
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Chat, Engine, Method, Response, Reward, Sampling


@dataclass(frozen=True)
class Request:
    """Everything that one answer depends on.

    Attributes:
        model_name: What the user calls the model.
        engine: Decodes.
        reward: Scores.
        method: Searches.
        speech: What is to be answered, and what the answer may be.
        sampling: How tokens are drawn.
        seed: Fixes the noise.
        budget: What the search may spend.
        n: How many of the best distinct responses are wanted.
    """

    model_name: str
    engine: Engine
    reward: Reward
    method: Method[Any]
    speech: Speech
    sampling: Sampling
    seed: int
    budget: Budget
    n: int

    @property
    def settings(self) -> Settings:
        """How the search answers."""
        return Settings(
            sampling=replace(self.sampling, grammar=self.speech.grammar, reader=self.speech.reader),
            tools=self.speech.tools,
            seed=self.seed,
            budget=self.budget,
            continue_last=continues_last(self.speech.chat),
        )

    @property
    def undecided(self) -> bool:
        """Whether the answer may be a call, which the reward cannot judge: then the model says first what it is."""
        return self.speech.may_call and not judges_calls(self.reward)

    @property
    def alone(self) -> Request:
        """The model's own likeliest answer, judged by nobody."""
        return replace(self, reward=_UNJUDGED, method=Greedy())

    def decided(self, alone: Aligned) -> Request | Aligned:
        """The model's own answer if that is a call; else the request for the best text."""
        response = alone.best.response
        if self.speech.text_only is None or response.tool_calls or response.invalid_tool_calls:
            return _by_likelihood(alone)
        return replace(self, speech=replace(self.speech, grammar=self.speech.text_only, may_call=False))

    def iterate(self) -> Generator[Iteration | Aligned]:
        """Run the search; whoever waits is a thread."""
        request: Request | Aligned = self
        if self.undecided:
            [*_, found] = self.alone.iterate()
            assert isinstance(found, Aligned)
            request = self.decided(found)
        if isinstance(request, Aligned):
            yield from request.trace
            yield request
        else:
            yield from iterate(self.engine, self.reward, self.method, request.speech.chat, **request.settings)

    async def aiterate(self) -> AsyncGenerator[Iteration | Aligned]:
        """Run the search; whoever waits is an event loop."""
        request: Request | Aligned = self
        if self.undecided:
            [*_, found] = [step async for step in self.alone.aiterate()]
            assert isinstance(found, Aligned)
            request = self.decided(found)
        if isinstance(request, Aligned):
            for now in request.trace:
                yield now
            yield request
        else:
            search = aiterate(self.engine, self.reward, self.method, request.speech.chat, **request.settings)
            async with aclosing(search) as steps:
                async for step in steps:
                    yield step


def _by_likelihood(alone: Aligned) -> Aligned:
    """The model's own answer with its log-probability for a reward."""
    [now], [candidate] = alone.trace, alone.candidates
    logprob = now.info["base_logprob"]
    trace = (replace(now, best=logprob, mean=logprob),)
    return replace(alone, candidates=(replace(candidate, reward=logprob),), trace=trace)


def _indifferent(chat: Chat, responses: Sequence[Response]) -> list[float]:
    return [0.0] * len(responses)


_UNJUDGED = as_reward(_indifferent, sees="response", name="base log-probability")


def chunk(request: Request, step: Iteration | Aligned) -> ChatGenerationChunk:
    """An iteration as an empty chunk with its line of the trace, or the outcome as the chunk with the answer.

    Merged, the chunks of a stream make the message of ``invoke``. LangChain appends lists when it merges, but it
    concatenates strings and refuses unequal floats: so every other key stands on one chunk only.
    """
    if isinstance(step, Iteration):
        return ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata={"trace": [step.numbers]}))
    return ChatGenerationChunk(message=_answer(request, step, step.best))


def result(request: Request, steps: Sequence[Iteration | Aligned]) -> ChatResult:
    """The answer as its stream would have brought it, and behind it the next best ones that were asked for."""
    result = generate_from_stream(chunk(request, step) for step in steps)
    aligned = steps[-1]
    assert isinstance(aligned, Aligned)
    others = [message_chunk_to_message(_answer(request, aligned, other)) for other in aligned.distinct[1 : request.n]]
    return ChatResult(generations=[*result.generations, *(ChatGeneration(message=message) for message in others)])


def _answer(request: Request, aligned: Aligned, best: Candidate) -> AIMessageChunk:
    if best.response.finish_reason == "timeout" and not best.response.text:
        limit = request.budget.seconds
        raise ModelTimeoutError(f"{request.model_name} had no answer within {limit} seconds; give it more time.")
    response = best.response
    reasoning = {} if response.reasoning is None else {"reasoning_content": response.reasoning}
    return AIMessageChunk(
        content=response.text,
        additional_kwargs=reasoning,
        tool_call_chunks=_call_chunks(response),
        response_metadata={
            "model_name": request.model_name,
            "model_provider": "aisp",
            "finish_reason": "tool_calls" if response.tool_calls and response.complete else response.finish_reason,
            "reward": best.reward,
            "reward_name": _UNJUDGED.name if aligned.method == "greedy" and request.undecided else request.reward.name,
            "method": aligned.method,
            "samples": aligned.samples,
            "sampled_tokens": aligned.sampled_tokens,
            "reward_calls": aligned.reward_calls,
            "seconds": aligned.seconds,
            "stopped": aligned.stopped,
            "seed": request.seed,
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
