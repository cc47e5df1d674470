"""One sample, Best-of-N and AISP on unseen customers; the last two decode equally many answers.

"reward" is what the searches climb; "gold" is an exact checker they never see, and counts the good parts of an answer.
"""

from statistics import mean

from langchain_aisp import AISP, AISPChatModel, BestOfN
from langchain_aisp.demo import gold_reward, scenarios

METHODS = {
    "one sample": BestOfN(samples=1),
    "Best-of-N": BestOfN(samples=48),
    "AISP": AISP(samples=48, iterations=6),
}
CUSTOMERS = scenarios("test", 3, seed=1)

print("method       reward   gold  samples  tokens")
for name, method in METHODS.items():
    chat = AISPChatModel(model="demo", method=method, max_tokens=80, seed=1)
    messages = chat.batch([list(customer.messages) for customer in CUSTOMERS])
    found = [message.response_metadata for message in messages]
    gold = [gold_reward(who)(who.messages, [m.content])[0] for who, m in zip(CUSTOMERS, messages, strict=True)]
    costs = f"{mean(f['samples'] for f in found):8.0f} {mean(f['sampled_tokens'] for f in found):7.0f}"
    print(f"{name:11} {mean(f['reward'] for f in found):7.2f} {mean(gold):6.2f} {costs}")
