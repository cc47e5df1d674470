"""A support bot with a memory: bad answers are replaced, one about money waits for a human, a log tells of all."""

import tempfile

from langchain.agents import create_agent
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

from langchain_aisp import AISP, AISPChatModel
from langchain_aisp.guard import AuditLog, Guard, GuardMiddleware, HandOver, ReportedReward, Rules, SearchLonger
from langchain_aisp.rewards import must_not_match

CUSTOMER = ["Thank you for the kettle.", "My parcel is late.", "My name is Olga. You charged my card twice."]
SECRETS = must_not_match(r"(send|tell|give|text) me your|(need|want|require|what is) your", name="secrets")
MONEY = must_not_match(r"\b(refund|pay|paid|return|charge|money)", name="money")

chat = AISPChatModel(model="demo", method=AISP(samples=1, iterations=1), max_tokens=80, seed=7)
search = SearchLonger(1, lambda attempt: {"method": AISP(samples=32, iterations=4)})
with tempfile.TemporaryDirectory() as folder, SqliteSaver.from_conn_string(f"{folder}/memory.sqlite") as memory:
    log = AuditLog(f"{folder}/audit.jsonl")
    guard = Guard([Rules([SECRETS, MONEY]), ReportedReward(0)], [search, HandOver()], audit=log)
    bot = create_agent(chat, middleware=[GuardMiddleware(guard)], checkpointer=memory)
    thread = {"configurable": {"thread_id": "olga"}}
    for text in CUSTOMER:
        state = bot.invoke({"messages": text}, thread)
        for asked in state.get("__interrupt__", ()):
            print(f"A human is asked, {asked.value['reasons']}:\n  {asked.value['message']}")
            state = bot.invoke(Command(resume={**asked.value, "type": "approve"}), thread)
        print(f"{text}\n  {state['messages'][-1].content}")
    print(f"{len(state['messages'])} messages are remembered")
    for record in log.read():
        rewards = ", then ".join(f"{attempt['reward']:.2f}" for attempt in record["tried"])
        print(f"{record['action']}: {'sent' if record['sent'] else 'nothing sent yet'}, reward {rewards}")
