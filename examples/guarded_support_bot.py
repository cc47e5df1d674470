"""A support bot that remembers the conversation in SQLite, checks its answers, and logs what it decided."""

import tempfile
from pathlib import Path

from langchain.agents import create_agent
from langgraph.checkpoint.sqlite import SqliteSaver

from langchain_aisp import AISP, AISPChatModel
from langchain_aisp.guard import AuditLog, Fallback, Guard, GuardMiddleware, Pattern, ReportedReward, SearchLonger, pii

CUSTOMER = [
    "My name is Olga. You charged my card twice for the large kettle.",
    "Thank you. What are your opening hours today?",
    "My card number is 4111 1111 1111 1111.",
]

chat = AISPChatModel(model="demo", method=AISP(samples=16, iterations=2), max_tokens=80, seed=1)
with tempfile.TemporaryDirectory() as folder, SqliteSaver.from_conn_string(f"{folder}/memory.sqlite") as memory:
    log = AuditLog(Path(folder) / "audit.jsonl")
    guard = Guard(
        checks=[ReportedReward(least=0.5), Pattern("a promise of money", r"\bguaranteed? refund")],
        policies=[
            SearchLonger(1, lambda attempt: {"method": AISP(samples=32, iterations=4), "seed": 1 + attempt}),
            Fallback("A colleague will write to you today."),
        ],
        input_checks=pii(),
        input_policies=[Fallback("Please never send card numbers or addresses here.")],
        audit=log,
    )
    bot = create_agent(chat, middleware=[GuardMiddleware(guard)], checkpointer=memory)
    for text in CUSTOMER:
        state = bot.invoke({"messages": text}, {"configurable": {"thread_id": "olga"}})
        print(f"{text}\n  {state['messages'][-1].content}")
    for record in log.read():
        print(record["stage"], record["action"], record["reasons"])
