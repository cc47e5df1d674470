"""A chain: prompt template, aligned model, plain text. The search is invisible to the chain."""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from langchain_aisp import AISP, AISPChatModel

prompt = ChatPromptTemplate(
    [
        ("system", "You are the help desk of {shop}. A pick-up point keeps parcels for 28 days."),
        ("user", "{request}"),
    ]
)
model = AISPChatModel(
    model="demo",
    method=AISP(samples=48, iterations=6),
    max_tokens=96,
    seed=3,
)
chain = prompt | model | StrOutputParser()

print(chain.invoke({"shop": "Northnest", "request": "How long do you keep my parcel? Yours, Agnes."}))
