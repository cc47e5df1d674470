"""A comparison in the toy world, where decoding costs nothing."""

from collections.abc import Callable

import pytest

from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.evaluation.datasets import PromptRecord
from langchain_aisp.evaluation.run import Evaluation
from langchain_aisp.methods import AISP, BestOfN
from langchain_aisp.types import Sampling
from tests.toy import ToyEngine, ToyReward, counts, spells

SAMPLING = Sampling(max_tokens=6)
ARMS = (
    Arm("best_of_n", BestOfN(samples=8, samples_per_wave=4), SAMPLING),
    Arm("aisp", AISP(samples=8, iterations=4, population=2), SAMPLING),
)
PROMPTS = tuple(
    PromptRecord(f"toy/{number}", ({"role": "user", "content": f"Say <b>{number}</b> & go | on."},), reference="abc")
    for number in range(3)
)


@pytest.fixture(scope="session")
def comparison() -> Callable[..., Evaluation]:
    """Makes a comparison of two methods on three prompts with two seeds; arguments replace its parts."""

    def make(**parts: object) -> Evaluation:
        usual = {
            "engine": ToyEngine(),
            "reward": ToyReward(counts("a")),
            "arms": ARMS,
            "prompts": PROMPTS,
            "gold": ToyReward(spells("abcabc")),
            "seeds": (0, 1),
        }
        return Evaluation(**{**usual, **parts})

    return make
