"""Plain samples of the language model, by the package's own engine."""

from collections.abc import Sequence

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from langchain_aisp.demo.checker import Message
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import BestOfN
from langchain_aisp.types import Problem, Sampling, Wave


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
