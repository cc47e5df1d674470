"""The guard lets nothing unchecked out, and its log survives what kills its writers."""

import json
import subprocess
import sys
import threading
import time

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from langchain_aisp import AISPChatModel, BestOfN
from langchain_aisp.guard import (
    AuditLog,
    Fallback,
    Guard,
    GuardError,
    GuardMiddleware,
    HandOver,
    LeastReward,
    Pattern,
    ReportedReward,
    SearchLonger,
    judged,
    pii,
)
from tests.toy import ToyEngine

RUDE = Pattern("rudeness", "idiot")
SAFE = Fallback("A colleague will write to you.")


def says(*answers):
    return GenericFakeChatModel(messages=iter([AIMessage(a) if isinstance(a, str) else a for a in answers]))


def short(chat, responses):
    return [-float(len(text)) for text in responses]


def test_a_good_answer_passes_and_says_so():
    answer = Guard([RUDE, LeastReward(short, -9)]).wrap(says("Hello")).invoke("Hi")
    assert answer.content == "Hello"
    assert answer.response_metadata["guard"]["action"] == "passed"
    assert answer.response_metadata["guard"]["scores"] == {"short": -5.0}


def test_searching_longer_stops_at_the_first_good_answer():
    guard = Guard([RUDE], [SearchLonger(2), SAFE])
    answer = guard.wrap(says("idiot", "idiot", "Sorry", "unused")).invoke("Hi")
    assert answer.content == "Sorry"
    assert answer.response_metadata["guard"]["action"] == "searched longer"
    assert answer.response_metadata["guard"]["reasons"] == ["contains rudeness"]


def test_policies_chain_in_order():
    answer = Guard([RUDE], [SearchLonger(1), SAFE]).wrap(says("idiot", "idiot", "unused")).invoke("Hi")
    assert answer.content == SAFE.text


def test_without_a_policy_the_guard_raises_with_reasons():
    with pytest.raises(GuardError, match="below 2") as caught:
        Guard([ReportedReward(2)]).wrap(says(AIMessage("x", response_metadata={"reward": 1.0}))).invoke("Hi")
    assert len(caught.value.reasons) == 1


def test_a_bad_question_never_reaches_the_model():
    guard = Guard(input_checks=pii(), input_policies=[SAFE])
    assert guard.wrap(says()).invoke("I am a@b.org").content == SAFE.text


@pytest.mark.parametrize("policy", [SearchLonger(), HandOver()])
def test_policies_about_answers_are_refused_for_questions(policy):
    with pytest.raises(ValueError, match="act on answers"):
        Guard(input_checks=[RUDE], input_policies=[policy])


def test_a_check_that_breaks_lets_nothing_out():
    def broken(chat, responses):
        raise OSError("gone")

    with pytest.raises(Exception, match="gone"):
        Guard([LeastReward(broken, 0)], [SAFE]).wrap(says("Hello")).invoke("Hi")


def test_a_judge_may_be_any_chat_model():
    guard = Guard([judged(says("Score: 2"), "Is it kind?", least=5)], [SAFE])
    assert guard.wrap(says("Go away")).invoke("Hi").content == SAFE.text


def test_a_stream_shows_checked_text_only():
    chunks = list(Guard([RUDE], [SAFE]).wrap(says("you idiot")).stream("Hi"))
    assert [chunk.content for chunk in chunks] == [SAFE.text]


async def test_async_and_batch_decide_alike():
    guard = Guard([RUDE, LeastReward(short, -9)], [SAFE])
    assert (await guard.wrap(says("idiot")).ainvoke("Hi")).content == SAFE.text
    assert [a.content for a in guard.wrap(says("Hello", "Hello")).batch(["Hi", "Ho"])] == ["Hello", "Hello"]


@pytest.mark.parametrize("decision", ["approve", "edit", "reject"])
def test_a_human_decides_and_what_was_shown_goes_out(decision):
    agent = create_agent(
        says("idiot one", "idiot two"),
        middleware=[GuardMiddleware(Guard([RUDE], [HandOver(), SAFE]))],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "1"}}
    [asked] = agent.invoke({"messages": "Hi"}, config)["__interrupt__"]
    assert asked.value["message"] == "idiot one"
    text = asked.value["message"] if decision == "approve" else "Dear customer"
    answer = agent.invoke(Command(resume={"type": decision, "message": text}), config)["messages"][-1]
    assert answer.content == {"approve": "idiot one", "edit": "Dear customer", "reject": SAFE.text}[decision]


async def test_a_human_decides_on_an_event_loop_too():
    agent = create_agent(
        says("idiot one", "idiot two"),
        middleware=[GuardMiddleware(Guard([RUDE], [HandOver()]))],
        checkpointer=InMemorySaver(),
    )
    config = {"configurable": {"thread_id": "1"}}
    await agent.ainvoke({"messages": "Hi"}, config)
    resume = Command(resume={"type": "approve", "message": "idiot one"})
    assert (await agent.ainvoke(resume, config))["messages"][-1].content == "idiot one"


def test_searching_longer_changes_an_aligned_models_method_for_the_call():
    chat = AISPChatModel(engine=ToyEngine(), reward=short, method=BestOfN(samples=1), max_tokens=6, seed=1)
    guard = Guard([LeastReward(short, -1.0)], [SearchLonger(1, lambda attempt: {"method": BestOfN(samples=64)})])
    assert len(chat.invoke("Hi").content) > 1
    answer = guard.wrap(chat).invoke("Hi")
    assert answer.response_metadata["samples"] == 64
    assert answer.response_metadata["guard"]["action"] == "searched longer"


async def test_an_agent_is_guarded_and_its_stream_too():
    agent = create_agent(says("idiot", "idiot"), middleware=[GuardMiddleware(Guard([RUDE], [SAFE]))])
    assert (await agent.ainvoke({"messages": "Hi"}))["messages"][-1].content == SAFE.text
    streamed = "".join(chunk.text for chunk, _ in agent.stream({"messages": "Hi"}, stream_mode="messages"))
    assert "idiot" not in streamed


def test_the_log_keeps_hashes_unless_told_otherwise(tmp_path):
    log = AuditLog(tmp_path / "log")
    Guard([RUDE], [SAFE], audit=log).wrap(says("idiot")).invoke("Hi", {"configurable": {"thread_id": "7"}})
    [record] = log.read()
    assert record["action"] == "fell back"
    assert record["thread"] == "7"
    assert record["run"]
    assert record["said"].startswith("sha256:")


def test_a_torn_line_is_set_aside(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\n{"b"')
    AuditLog(path).write({"c": 2}, {})
    assert [set(r) & {"a", "c"} for r in AuditLog(path).read()] == [{"a"}, {"c"}]
    assert (tmp_path / "log.torn").read_bytes() == b'{"b"\n'


WRITER = """
import sys, importlib.util as u
spec = u.spec_from_file_location("audit", sys.argv[1]); m = u.module_from_spec(spec)
sys.modules["audit"] = m; spec.loader.exec_module(m)
log = m.AuditLog(sys.argv[2])
while True: log.write({"x": "y" * 5000}, {})
"""


def test_killed_and_concurrent_writers_leave_whole_records(tmp_path):
    path = tmp_path / "log"
    source = sys.modules[AuditLog.__module__].__file__
    process = subprocess.Popen([sys.executable, "-c", WRITER, source, str(path)])
    while not path.exists() or path.stat().st_size < 20_000:
        time.sleep(0.01)
    log = AuditLog(path)
    threads = [threading.Thread(target=lambda: [log.write({"mine": 1}, {}) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.kill()
    process.wait()
    AuditLog(path)
    assert sum("mine" in record for record in log.read()) == 20
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
