"""Agents of LangChain and graphs of LangGraph on the demo model: loops with tools, streams, middleware."""

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelFallbackMiddleware, ModelRetryMiddleware, SummarizationMiddleware
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from langchain_aisp import AISP, AISPChatModel

QUESTION = "Where is my parcel 48213?"
SUM_UP = "Sum up: {messages}"  # LangChain's own prompt is longer than the demo can read


@tool
def get_order_status(order_number: str) -> str:
    """Find out where an order is."""
    return f"order {order_number} is in transit, arrives Tuesday"


def model(**options):
    settings = {"model": "demo", "method": AISP(samples=16, iterations=2), "max_tokens": 64, "seed": 7}
    return AISPChatModel(**{**settings, **options})


def agent(**options):
    return create_agent(model(), [get_order_status], **options)


def check_loop(messages):
    _, call, result, answer = messages
    assert [(made["name"], made["args"]) for made in call.tool_calls] == [
        ("get_order_status", {"order_number": "48213"})
    ]
    assert result.content == "order 48213 is in transit, arrives Tuesday"
    assert "Tuesday" in answer.content
    assert not answer.tool_calls


def test_an_agent_calls_its_tool_and_tells_the_result():
    check_loop(agent().invoke({"messages": QUESTION})["messages"])


async def test_an_agent_in_an_event_loop_does_the_same():
    messages = (await agent().ainvoke({"messages": QUESTION}))["messages"]
    check_loop(messages)
    assert [message.content for message in messages] == [
        message.content for message in agent().invoke({"messages": QUESTION})["messages"]
    ]


def test_a_graph_with_a_tool_node_runs_the_same_loop():
    bound = model().bind_tools([get_order_status])
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [bound.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([get_order_status]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    check_loop(graph.compile().invoke({"messages": QUESTION})["messages"])


def test_an_agent_streams_messages_updates_and_the_progress_of_the_search():
    parts = list(agent().stream({"messages": QUESTION}, stream_mode=["messages", "updates", "custom"]))
    by_mode = {mode: [part for name, part in parts if name == mode] for mode in ("messages", "updates", "custom")}
    assert [next(iter(part)) for part in by_mode["updates"]] == ["model", "tools", "model"]
    said = "".join(chunk.text for chunk, _ in by_mode["messages"] if isinstance(chunk, AIMessage))
    assert said == by_mode["updates"][-1]["model"]["messages"][-1].text
    assert by_mode["custom"][-1]["aisp_iteration"]["samples"] == 16
    chunks = [chunk for message, _ in by_mode["messages"] for chunk in getattr(message, "tool_call_chunks", [])]
    assert [chunk["name"] for chunk in chunks] == ["get_order_status"]


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
