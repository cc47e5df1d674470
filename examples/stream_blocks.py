"""An answer that is sent while it is written: every block is the best of a search, and is never taken back."""

import sys
from collections.abc import Sequence

from langchain_aisp import AISP
from langchain_aisp.align import Iteration
from langchain_aisp.committing import Block, commit
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Chat, Sampling

KIND_WORDS = ("sorry", "thank", "please", "happy", "glad", "help", "welcome")


def kind(chat: Chat, texts: Sequence[str]) -> list[float]:
    """A point per kind word so far, and a little less for every word: also an unfinished text has a value."""
    return [sum(text.lower().count(word) for word in KIND_WORDS) - 0.02 * len(text.split()) for text in texts]


steps = commit(
    TransformersEngine.shared("demo"),
    as_reward(kind, partial=True),
    AISP(samples=16, iterations=2),
    [{"role": "user", "content": "My parcel is late."}],
    commit_every=12,
    sampling=Sampling(max_tokens=48),
    seed=3,
)
for step in steps:
    if isinstance(step, Block):
        sys.stdout.write(f"{step.text}|")
        sys.stdout.flush()
    elif not isinstance(step, Iteration):
        print(f"\nreward {step.best.reward:.2f}, {step.samples} samples in {len(step.trace)} waves")
