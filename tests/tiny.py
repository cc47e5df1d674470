"""A random-weight Llama with a byte tokenizer, for tests that need a real transformers model and no sense."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from langchain_aisp import noise
from langchain_aisp.types import Prompt, Sampling, Steering, Wave

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last or add_generation_prompt %}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens 5 … 260, five control tokens before them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.chat_template = TEMPLATE
    return fast


def model(seed: int = 0, vocabulary: int = 272, context: int = 256, **options: object) -> LlamaForCausalLM:
    """A Llama of two layers; its vocabulary is larger than the tokenizer's, as padded ones are."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.3,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "vocab_size": vocabulary,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options})).eval()


def wave(
    prompt: Prompt,
    rows: int,
    length: int,
    *,
    iteration: int = 0,
    steering: Steering | None = None,
    observe: frozenset[str] = frozenset(),
    **sampling: object,
) -> Wave:
    """Responses from scratch."""
    keys = noise.wave_keys(prompt.key, iteration, torch.arange(rows), length)
    zeros = torch.zeros(rows, dtype=torch.int64)
    return Wave(prompt, torch.zeros_like(keys), zeros, keys, Sampling(length, **sampling), steering, observe)
