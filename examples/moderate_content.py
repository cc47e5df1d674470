"""Moderates given texts with rules and a reward: each passes, or is held back with reasons."""

from collections.abc import Sequence

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda

from langchain_aisp.guard import Guard, GuardError, LeastReward, Pattern, pii
from langchain_aisp.types import Chat

TEXTS = [
    "Thank you, the kettle works well.",
    "Write to me at agnes@example.org.",
    "You are an idiot.",
    "BUY NOW! BUY NOW! BUY NOW!",
]


def calm(chat: Chat, responses: Sequence[str]) -> list[float]:
    """The share of letters that are not capitals."""
    return [1 - sum(letter.isupper() for letter in text) / len(text) for text in responses]


guard = Guard(checks=[*pii(), Pattern("rudeness", r"\bidiot\b"), LeastReward(calm, least=0.8)])
moderated = guard.wrap(RunnableLambda(lambda messages: AIMessage(messages)))

for text in TEXTS:
    try:
        moderated.invoke(text)
        print(f"passed  {text}")
    except GuardError as error:
        print(f"held    {text}  ({'; '.join(error.reasons)})")
