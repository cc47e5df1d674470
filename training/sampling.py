"""Answers of the language model, by the package's own engine: plain samples, and what a search finds."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from langchain_aisp.align import align
from langchain_aisp.demo.checker import Message
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP, BestOfN
from langchain_aisp.rewards import ClassifierReward
from langchain_aisp.types import Problem, Sampling, Wave

CALLERS = 4  # searches at a time: one decodes while another one's answers are scored


def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[Sequence[Message]],
    count: int,
    *,
    max_tokens: int = 64,
    seed: int = 0,
) -> list[list[str]]:
    """Draws `count` answers at temperature 1 to each conversation."""
    with TransformersEngine(model, tokenizer) as engine:
        tickets = [engine.submit(_wave(engine, chat, count, max_tokens, seed)) for chat in chats]
        rollouts = [ticket.future.result() for ticket in tickets]
    return [[response.text for response in wave.responses] for wave in rollouts]


def _wave(engine: TransformersEngine, chat: Sequence[Message], count: int, max_tokens: int, seed: int) -> Wave:
    method = BestOfN(count, samples_per_wave=count)
    problem = Problem(engine.encode(chat, seed=seed), Sampling(max_tokens=max_tokens), engine.head)
    return method.propose(method.init(problem))


def searched(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    reward: ClassifierReward,
    chats: Sequence[Sequence[Message]],
    *,
    samples: int = 96,
    temperature: float = 0.4,
    max_tokens: int = 80,
) -> list[list[str]]:
    """The distinct answers that the default search decodes for each conversation, the highest reward first."""
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)

    def answers(index: int) -> list[str]:
        found = align(engine, reward, AISP(samples=samples), chats[index], sampling=sampling, seed=index)
        return [candidate.response.text for candidate in found.distinct]

    with TransformersEngine(model, tokenizer) as engine, ThreadPoolExecutor(CALLERS) as callers:
        return list(callers.map(answers, range(len(chats))))
