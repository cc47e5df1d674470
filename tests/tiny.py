"""A random-weight Llama with a byte tokenizer, for tests that need a real transformers model and no sense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

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


# Families that call tools: their chat templates in short, and a vocabulary in which strings soon come to an end.

TEMPLATES = {
    "llama": (
        "{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n"
        'Answer with {"name": NAME, "parameters": ARGUMENTS}.\n{{ tools | tojson }}<|eot_id|>{% endif %}'
        "{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}{% for call in m.tool_calls or () %}"
        '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}{% endfor %}'
        "<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "qwen": (
        "{% if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools>\n"
        "<tool_call>name and arguments as JSON</tool_call><|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or () %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
CONTROL = {
    "llama": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"],
    "qwen": ["<|im_end|>", "<|im_start|>", "<tool_call>", "</tool_call>"],
}
MERGES = [('"', ","), ('"', "}"), ('"}', "}"), ('"', ":"), ("Ġ", '"'), ('",', 'Ġ"'), ('":', 'Ġ"')]


def ascii_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Printable ASCII and a few tokens that begin with a quote, so that one token in twenty ends a string of JSON."""
    control = ["<|unknown|>", *CONTROL[name]]
    letters = [*(chr(code) for code in range(33, 127)), "Ġ", "Ċ"]
    vocabulary = {token: i for i, token in enumerate([*control, *letters, *map("".join, MERGES)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, unk_token=control[0]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=control[0], eos_token=control[1])
    fast.add_special_tokens({"additional_special_tokens": control[2:]})
    fast.chat_template = TEMPLATES[name]
    return fast


def family(name: str, seed: int = 0, marks: Sequence[str] = ()) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Random weights of a family that calls tools, and its tokenizer, with ``marks`` as further tokens."""
    letters = ascii_tokenizer(name)
    letters.add_tokens(list(marks))
    config = {"llama": LlamaConfig, "qwen": Qwen3Config}[name](
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.2,
        eos_token_id=letters.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval(), letters


def save(name: str, folder: Path, seed: int = 0) -> str:
    """A family as a folder that ``model=`` can name."""
    for part in family(name, seed):
        part.save_pretrained(folder)
    return str(folder)
