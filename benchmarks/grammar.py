"""What a grammar costs: decoding within it against decoding freely, in seconds per token, equal numbers of rows.

Two cases. A model that keeps to the grammar by itself, as where tools stand beside free text: tokens are only tried.
This is measured on trained models: drawing alone; as the default search decodes, which keeps likely alternatives; with
a look at the whole allowed distribution, as for log-probabilities, which needs a mask at every step; and the default
search as a whole, under a reward that costs nothing. And a model that knows nothing of it: a random-weight Llama with
a large, made-up vocabulary within a JSON schema, where nearly every token is refused, masked and drawn again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import decode, free_reward, median_with_interval, random_prompt, save, seconds_of, with_interval
from langchain_aisp import AISP, align
from langchain_aisp.demo.scenarios import scenarios
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.noise import fold, uniform, wave_keys
from langchain_aisp.types import Grammar, Observable, Prompt, Sampling, Wave

_TEXT = '{"type": "object", "properties": {"text": {"type": "string", "minLength": 4000}}, "required": ["text"]}'
TEXT = Grammar(f"start: %json {_TEXT}")
ANYTHING = Grammar("start: /(?s:.*)/")

T = TypeVar("T")


def random_llama(vocabulary: int) -> TransformersEngine:
    """A Llama whose tokens are bytes and made-up words of two to nine letters; 6.8 million weights with 4,096."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=1024,
        eos_token_id=0,
        bos_token_id=None,
    )
    tokenizer = made_up_tokenizer(vocabulary)
    return TransformersEngine(LlamaForCausalLM(config), tokenizer, name=f"random Llama, {vocabulary} tokens")


def made_up_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Bytes, then words, half of them with a space in front, up to ``vocabulary`` tokens."""
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = (uniform(fold(1, torch.arange(vocabulary * 9))) * 26).long().view(-1, 9).tolist()
    lengths = (2 + uniform(fold(2, torch.arange(vocabulary))) * 8).long().tolist()
    words = ("".join(chr(97 + letter) for letter in row[:length]) for row, length in zip(letters, lengths, strict=True))
    spaced = [f"{'Ġ' * (index % 2)}{word}" for index, word in enumerate(words)]
    known = dict.fromkeys([*tokens, *spaced])
    spare = [f"Ġspare{index}" for index in range(vocabulary)]  # for words that came up twice
    names = [*known, *spare][:vocabulary]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", chat_template="{{ messages[-1]['content'] }}"
    )


Tokens: TypeAlias = Callable[[T], int]
"""Decodes something; says how many tokens."""


def per_token(name: str, one: Tokens[T], other: Tokens[T], items: Sequence[T], warm_up: T) -> dict[str, Any]:
    """Ratio of the seconds per token of two rivals, who may end at different places."""
    rivals = one, other
    for rival in rivals:
        rival(warm_up)
    seconds = []
    for number, item in enumerate(items):
        turns = (1, 0) if number % 2 else (0, 1)
        found = {which: seconds_per_token(rivals[which], item) for which in turns}
        seconds.append([found[0], found[1]])
    ratio = median_with_interval([a / b for a, b in seconds])
    print(f"{name}: {with_interval(ratio)} over {len(items)} pairs", flush=True)
    return {"ratio": ratio, "seconds_per_token": seconds}


def seconds_per_token(work: Tokens[T], item: T) -> float:
    """How long each token took."""
    counts: list[int] = []
    seconds = seconds_of(lambda: counts.append(work(item)))
    return seconds / counts[0]


def beside_text(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """A trained model answers conversations, within a grammar that lets any text through and without."""
    engine = TransformersEngine.from_pretrained(path, device="cpu")
    prompts = [
        engine.encode(one.messages, seed=number) for number, one in enumerate(scenarios("test", args.pairs + 1, seed=3))
    ]

    def answer(prompt: Prompt, grammar: Grammar | None, observe: frozenset[Observable]) -> int:
        keys = wave_keys(prompt.key, 0, torch.arange(args.rows), args.tokens)
        start, sampling = torch.zeros(args.rows, dtype=torch.int64), Sampling(max_tokens=args.tokens, grammar=grammar)
        wave = Wave(prompt, torch.zeros_like(keys), start, keys, sampling, observe=observe)
        return engine.submit(wave).future.result().sampled_tokens

    def search(prompt: Prompt, grammar: Grammar | None) -> int:
        sampling = Sampling(max_tokens=args.tokens, grammar=grammar)
        aligned = align(engine, free_reward(), AISP(), prompt.chat, sampling=sampling)
        return aligned.sampled_tokens

    found = {}
    cases: dict[str, Callable[..., int]] = {
        "drawn": partial(answer, observe=frozenset()),
        "as searched": partial(answer, observe=frozenset({"unchecked_alternatives"})),
        "observed": partial(answer, observe=frozenset({"alternatives"})),
        "default search": search,
    }
    for case, work in cases.items():
        every = 3 if case == "default search" else 1  # a search takes its time
        found[case] = per_token(
            f"{Path(path).name}, {engine.head.vocabulary} tokens, {case}: within a grammar of text / free",
            partial(work, grammar=ANYTHING),
            partial(work, grammar=None),
            prompts[1::every],
            prompts[0],
        )
    engine.close()
    return {"vocabulary": engine.head.vocabulary, **found}


def within_schema(vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """A random model fills a schema."""
    engine = random_llama(vocabulary)
    prompts = [random_prompt(engine, args.prompt, number) for number in range(args.random_pairs + 1)]

    def fill(prompt: Prompt, grammar: Grammar | None) -> int:
        return decode(engine, prompt, args.rows, args.tokens, grammar).sampled_tokens

    name = f"random, {vocabulary} tokens: within a schema / free"
    found = per_token(name, partial(fill, grammar=TEXT), partial(fill, grammar=None), prompts[1:], prompts[0])
    engine.close()
    return found


def main() -> None:
    """Measure trained models, then the large vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo"], help="ids or folders of trained models")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[131_072], help="of random models")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of random prompts")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per row at most")
    parser.add_argument("--pairs", type=int, default=61)
    parser.add_argument("--random-pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trained = {Path(path).name: beside_text(path, args) for path in args.models}
    random = {str(vocabulary): within_schema(vocabulary, args) for vocabulary in args.vocabularies}
    settings = {"rows": args.rows, "prompt_tokens": args.prompt, "new_tokens": args.tokens}
    save("grammar", {**settings, "trained": trained, "random": random})


if __name__ == "__main__":
    main()
