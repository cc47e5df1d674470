"""Many customers at once: their searches meet in one engine, and each gets the answer it would have got alone."""

import asyncio

from langchain_aisp import AISP, AISPChatModel

CUSTOMERS = [
    "My parcel is late. The order number is 48213.",
    "You charged my card twice for the large kettle.",
    "How do I reset my password? Yours, Agnes.",
    "What are your opening hours today?",
]

chat = AISPChatModel(
    model="demo",
    method=AISP(samples=32, iterations=4),
    max_tokens=96,
    seed=5,
)


async def main() -> None:
    """Answer all customers together, then the first one alone."""
    together = await chat.abatch(CUSTOMERS)
    for customer, message in zip(CUSTOMERS, together, strict=True):
        print(f"{customer}\n  {message.content}  [reward {message.response_metadata['reward']:.2f}]")
    alone = await chat.ainvoke(CUSTOMERS[0])
    print(f"\nThe first customer alone gets the same answer: {alone.content == together[0].content}")


asyncio.run(main())
