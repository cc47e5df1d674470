"""One model, two rewards, two characters: the answer follows the reward, the weights stay as they are."""

from collections.abc import Sequence

from langchain_aisp import AISP, AISPChatModel
from langchain_aisp.types import Chat

KIND_WORDS = ("sorry", "thank", "please", "happy", "glad", "pleasure", "wish", "warm", "kind", "lovely", "great day")


def brief(chat: Chat, responses: Sequence[str]) -> list[float]:
    """Every word costs one."""
    return [-float(len(text.split())) for text in responses]


def warm(chat: Chat, responses: Sequence[str]) -> list[float]:
    """Every kind word counts once."""
    return [float(sum(word in text.lower() for word in KIND_WORDS)) for text in responses]


for reward in (brief, warm):
    chat = AISPChatModel(model="demo", reward=reward, method=AISP(samples=96), max_tokens=80, seed=1)
    message = chat.invoke("Where is my order 48213?")
    trace = message.response_metadata["trace"]
    print(f"{reward.__name__}: {trace[0]['mean']:.1f} on average without a search, {trace[-1]['best']:.0f} with it")
    print(f"  {message.content}\n")
