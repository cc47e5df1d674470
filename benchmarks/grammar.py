"""What a grammar costs: decoding within a JSON schema against decoding freely, equal numbers of rows and tokens.

Why: the mask is computed on the CPU for every row and step, and the larger the vocabulary, the more tokens there are to
rule on. The schema holds one string that may not end before the last token, so both rivals decode every token of every
row. The large vocabulary is that of a random-weight Llama with a made-up tokenizer: no word is real, every mask is.
"""

from __future__ import annotations

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import decode, save
from benchmarks.speed import compare
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.noise import fold, uniform
from langchain_aisp.types import Grammar, Prompt

_TEXT = '{"type": "object", "properties": {"text": {"type": "string", "minLength": 4000}}, "required": ["text"]}'
TEXT = Grammar(f"start: %json {_TEXT}")


def random_llama(vocabulary: int) -> TransformersEngine:
    """A Llama whose tokens are bytes and made-up words of two to nine letters; 6.8 million weights if they are 4,096."""
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


def main() -> None:
    """Measure the small and the large vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 131_072])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per row")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for vocabulary in args.vocabularies:
        engine = random_llama(vocabulary)

        def masked(prompt: Prompt, engine: TransformersEngine = engine) -> None:
            decode(engine, prompt, args.rows, args.tokens, TEXT)

        def free(prompt: Prompt, engine: TransformersEngine = engine) -> None:
            decode(engine, prompt, args.rows, args.tokens, None)

        results[str(vocabulary)] = compare(f"{vocabulary} tokens: within a schema / free", engine, masked, free, args)
        engine.close()
    settings = {"rows": args.rows, "prompt_tokens": args.prompt, "new_tokens": args.tokens}
    save("grammar", {**settings, "vocabularies": results})


if __name__ == "__main__":
    main()
