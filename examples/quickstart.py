"""One answer, what it cost, and how the reward rose while the search went on."""

from langchain_aisp import AISP, AISPChatModel

chat = AISPChatModel(
    model="demo",
    method=AISP(samples=64),
    max_tokens=96,
    seed=7,
)
message = chat.invoke("My name is Olga. You charged my card twice for the large kettle.")
found = message.response_metadata

print(message.content, end="\n\n")
for step in found["trace"]:
    print(f"{step['samples']:3} samples  mean reward {step['mean']:6.2f}  best so far {step['best']:6.2f}")
print(f"\n{found['sampled_tokens']} tokens, {found['reward_calls']} reward calls, {found['seconds']:.1f} seconds")
