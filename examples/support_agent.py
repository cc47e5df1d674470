"""An agent of LangChain's with three tools: it looks things up, and the best of many answers tells what it found."""

from langchain.agents import create_agent
from langchain_core.tools import tool

from langchain_aisp import AISP, AISPChatModel

STATES = {"48213": "in transit, arrives Tuesday", "30561": "approved, due Monday"}


@tool
def get_order_status(order_number: str) -> str:
    """Find out where an order is."""
    return STATES.get(order_number, "Error: order not found")


@tool
def get_refund_status(order_number: str) -> str:
    """Find out about the refund of an order."""
    return STATES.get(order_number, "Error: order not found")


@tool
def book_appointment(day: str, time: str) -> str:
    """Book an appointment with the repair desk."""
    return f"Booked as {day[0]}{time.replace(':', '')}."


chat = AISPChatModel(model="demo", method=AISP(samples=32, iterations=4), max_tokens=64, seed=7)
agent = create_agent(chat, [get_order_status, get_refund_status, book_appointment])

for customer in (
    "Hello, I am Maya. Where is my parcel 48213?",
    "When will I get the money for order 30561?",
    "Please book a repair on Thursday at 14:30.",
):
    for message in agent.invoke({"messages": [("user", customer)]})["messages"]:
        said = message.text or ", ".join(f"{call['name']}({call['args']})" for call in message.tool_calls)
        print(f"{message.type:7}{said}")
