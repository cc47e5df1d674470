"""Middleware of LangChain's agents around the demo model."""

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, ModelRetryMiddleware, SummarizationMiddleware
from langchain_core.messages import AIMessage, HumanMessage

from langchain_aisp import AISP, AISPChatModel

SUM_UP = "Sum up: {messages}"  # LangChain's own prompt is longer than the demo can read


def model(**options):
    settings = {"model": "demo", "method": AISP(samples=16, iterations=2), "max_tokens": 64, "seed": 7}
    return AISPChatModel(**{**settings, **options})


def test_a_long_conversation_is_summarised_by_the_model():
    middleware = SummarizationMiddleware(model(), trigger=("messages", 4), keep=("messages", 1), summary_prompt=SUM_UP)
    turns = [HumanMessage("Hello"), AIMessage("Hello!"), HumanMessage("My parcel is late."), AIMessage("Sorry.")]
    messages = create_agent(model(), middleware=[middleware]).invoke({"messages": [*turns, HumanMessage("Hello")]})[
        "messages"
    ]
    assert [message.type for message in messages] == ["human", "human", "ai"]
    assert "summary" in messages[0].text
    assert messages[-1].text


def flaky(failures):
    """A reward that fails so many times before it works."""
    left = iter([True] * failures)

    def reward(chat, responses):
        if next(left, False):
            raise ConnectionError("the reward is away")
        return [float(len(text)) for text in responses]

    return reward


def test_middleware_tries_again_when_a_reward_fails():
    retry = ModelRetryMiddleware(max_retries=1, initial_delay=0.0, on_failure="error")
    bot = create_agent(model(reward=flaky(1)), middleware=[retry])
    assert bot.invoke({"messages": "Hello"})["messages"][-1].text


def test_middleware_falls_back_to_another_model():
    fallback = ModelFallbackMiddleware(model(reward=lambda chat, responses: [0.0] * len(responses)))
    bot = create_agent(model(reward=flaky(99)), middleware=[fallback])
    assert bot.invoke({"messages": "Hello"})["messages"][-1].text
    with pytest.raises(Exception, match="the reward is away"):
        create_agent(model(reward=flaky(99))).invoke({"messages": "Hello"})
