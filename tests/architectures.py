"""Tiny random models of many architectures, and which cache each of them takes.

``python -m tests.architectures`` prints the table of ``docs/architectures.md``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
WINDOW = 6
"""Sliding windows and chunks, far shorter than the texts of the tests."""

SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED: Mapping[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: Mapping[str, Any] = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
_WINDOWS: Mapping[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LINEAR: Mapping[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA_HEADS: Mapping[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        title: Name for people.
        kind: transformers' ``model_type``.
        cache: Name of the cache that ``choose_cache`` gives it.
        note: What is particular about it, or why it gets no better cache.
        sizes: Where its configuration differs from the usual tiny one; None leaves a size out.
    """

    title: str
    kind: str
    cache: str
    note: str
    sizes: Mapping[str, Any]


def _slots(title: str, kind: str, note: str = "", /, *parts: Mapping[str, Any], **sizes: Any) -> Architecture:
    return Architecture(title, kind, "slots", note, _merge(*parts, sizes))


def _expanded(title: str, kind: str, note: str, /, *parts: Mapping[str, Any], **sizes: Any) -> Architecture:
    return Architecture(title, kind, "expanded", note, _merge(*parts, sizes))


def _none(title: str, kind: str, note: str, /, *parts: Mapping[str, Any], **sizes: Any) -> Architecture:
    return Architecture(title, kind, "none", note, _merge(*parts, sizes))


def _merge(*parts: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: size for part in parts for name, size in part.items()}


_SHARED_KEYS: Mapping[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_WIDE_CAP = {"query_pre_attn_scalar": 8}
_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}

_RECURRENT = "recurrent layers"
_HYBRID = "attention and recurrent layers"
_TOKENWISE = "recurrent; reads kept tokens one at a time, several would start it anew"
_OWN_ATTENTION = "its attention does not ask transformers' registry"
_ASKS_LENGTH = "asks its cache for the length of the text"

ARCHITECTURES: tuple[Architecture, ...] = (
    _slots("Llama", "llama"),
    _slots("Mistral", "mistral", "sliding window", sliding_window=WINDOW),
    _slots("Ministral", "ministral", "some layers with a sliding window", _WINDOWS),
    _slots("Ministral 3", "ministral3", "queries scaled by their position"),
    _slots("Mixtral", "mixtral", "experts, sliding window", _FOUR, sliding_window=WINDOW),
    _slots("Qwen2", "qwen2", "some layers with a sliding window", _WINDOWS, use_sliding_window=True),
    _slots("Qwen2-MoE", "qwen2_moe", "experts", _EXPERTS, shared_expert_intermediate_size=16),
    _slots("Qwen3", "qwen3"),
    _slots("Qwen3-MoE", "qwen3_moe", "experts", _EXPERTS),
    _expanded("Qwen3-Next", "qwen3_next", _HYBRID, _EXPERTS, _LINEAR, shared_expert_intermediate_size=16),
    _expanded("Qwen3.5", "qwen3_5_text", _HYBRID, _LINEAR),
    _slots("Gemma", "gemma"),
    _slots("Gemma 2", "gemma2", "scores and logits capped, some layers with a sliding window", _WINDOWS, _WIDE_CAP),
    _slots("Gemma 3", "gemma3_text", "some layers with a sliding window", _WINDOWS, _WIDE_CAP),
    _slots(
        "Gemma 3n",
        "gemma3n_text",
        "layers share keys, logits capped, some layers with a sliding window",
        _SHARED_KEYS,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    _slots(
        "Gemma 4",
        "gemma4_text",
        "layers share keys, some layers with a sliding window and other widths",
        _SHARED_KEYS,
        global_head_dim=16,
    ),
    _slots("VaultGemma", "vaultgemma", "scores and logits capped, some layers with a sliding window", _WINDOWS),
    _none(
        "RecurrentGemma",
        "recurrent_gemma",
        "keeps its state inside the model, one for all callers",
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=WINDOW,
    ),
    _slots("Phi", "phi", "rotates a part of each head"),
    _slots("Phi-3", "phi3", "sliding window", sliding_window=WINDOW),
    _slots("Phi-3.5-MoE", "phimoe", "experts, sliding window", _FOUR, sliding_window=WINDOW),
    _slots("GPT-2", "gpt2"),
    _expanded("GPT-J", "gptj", _OWN_ATTENTION, rotary_dim=4),
    _expanded("GPT-Neo", "gpt_neo", _OWN_ATTENTION, attention_types=[[["global", "local"], 1]], window_size=WINDOW),
    _slots("GPT-NeoX", "gpt_neox", "rotates a part of each head"),
    _slots("GPT-BigCode", "gpt_bigcode", "one head of keys for all queries"),
    _slots("gpt-oss", "gpt_oss", "attention sinks, experts, some layers with a sliding window", _WINDOWS, _FOUR),
    _expanded("Bloom", "bloom", _OWN_ATTENTION),
    _expanded("MPT", "mpt", _OWN_ATTENTION),
    _expanded("OPT", "opt", _ASKS_LENGTH, ffn_dim=48, word_embed_proj_dim=32),
    _expanded("Falcon, rotary", "falcon", _OWN_ATTENTION, head_dim=None),
    _expanded("Falcon, alibi", "falcon", _OWN_ATTENTION, head_dim=None, alibi=True),
    _expanded("Falcon-Mamba", "falcon_mamba", _TOKENWISE),
    _expanded("Falcon-H1", "falcon_h1", _HYBRID, _MAMBA_HEADS, mamba_d_ssm=64),
    _slots("Granite", "granite", "logits scaled"),
    _slots("GraniteMoE", "granitemoe", "experts, logits scaled", _FOUR),
    _slots("GraniteMoE shared", "granitemoeshared", "experts, logits scaled", _FOUR),
    _expanded(
        "Granite 4 hybrid",
        "granitemoehybrid",
        _HYBRID,
        _MAMBA_HEADS,
        _FOUR,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=16,
    ),
    _slots("Cohere", "cohere", "logits scaled"),
    _slots("Cohere 2", "cohere2", "logits scaled, some layers with a sliding window", _WINDOWS),
    _slots("StableLM", "stablelm", "rotates a part of each head"),
    _slots("OLMo", "olmo"),
    _slots("OLMo 2", "olmo2"),
    _slots("OLMo 3", "olmo3", "some layers with a sliding window", _WINDOWS),
    _expanded("OLMo hybrid", "olmo_hybrid", _HYBRID, _LINEAR),
    _slots("OLMoE", "olmoe", "experts", num_experts=4, num_experts_per_tok=2),
    _slots("SmolLM3", "smollm3", "some layers without positions"),
    _slots("GLM", "glm", "rotates a part of each head"),
    _slots("GLM-4", "glm4", "rotates a part of each head"),
    _slots("GLM-4-MoE", "glm4_moe", "experts", _ROUTED),
    _slots("DeepSeek-V2", "deepseek_v2", "latent attention, experts", _ROUTED, _LATENT),
    _slots("DeepSeek-V3", "deepseek_v3", "latent attention, experts", _ROUTED, _LATENT),
    _expanded(
        "DeepSeek-V3.2",
        "deepseek_v32",
        "an indexer picks the keys that are seen",
        _ROUTED,
        _LATENT,
        index_topk=4,
        index_n_heads=16,
        index_head_dim=8,
    ),
    _expanded("Mamba", "mamba", _TOKENWISE),
    _expanded("Mamba 2", "mamba2", _RECURRENT, num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=8),
    _none("RWKV", "rwkv", "has a state of its own kind"),
    _slots("Nemotron", "nemotron", "rotates a part of each head"),
    _expanded(
        "Nemotron-H",
        "nemotron_h",
        _HYBRID,
        layers_block_type=["mamba", "attention", "moe"],
        num_hidden_layers=3,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
    ),
    _slots("StarCoder 2", "starcoder2", "sliding window", sliding_window=WINDOW),
    _expanded("CodeGen", "codegen", _OWN_ATTENTION, rotary_dim=4),
    _slots("Persimmon", "persimmon", "rotates a part of each head"),
    _expanded("XGLM", "xglm", _OWN_ATTENTION, d_model=32, ffn_dim=48, attention_heads=4, num_layers=2),
    _expanded("BioGPT", "biogpt", _ASKS_LENGTH),
    _slots("ERNIE 4.5", "ernie4_5"),
    _slots("ERNIE 4.5 MoE", "ernie4_5_moe", "experts", moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    _slots("EXAONE 4", "exaone4", "some layers with a sliding window, others without positions", _WINDOWS),
    _slots("Helium", "helium"),
    _expanded("LFM2", "lfm2", "attention and convolution layers", layer_types=["conv", "full_attention"]),
    _expanded(
        "LFM2-MoE",
        "lfm2_moe",
        "attention and convolution layers",
        _EXPERTS,
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
    ),
    _expanded("Bamba", "bamba", _HYBRID, _MAMBA_HEADS, attn_layer_indices=[1]),
    _expanded("Jamba", "jamba", _HYBRID, num_experts=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
    _expanded(
        "Zamba 2",
        "zamba2",
        _HYBRID,
        layers_block_type=["linear_attention", "hybrid"],
        mamba_d_state=8,
        n_mamba_heads=4,
        chunk_size=8,
        head_dim=None,
        num_key_value_heads=4,
    ),
    _none(
        "MiniMax",
        "minimax",
        "has a cache of its own kind",
        _FOUR,
        block_size=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    _slots("MiniMax-M2", "minimax_m2", "experts", _FOUR),
    _slots("Arcee", "arcee"),
    _slots("dots.llm1", "dots1", "experts", _ROUTED),
    _slots("Seed-OSS", "seed_oss"),
    _slots("Apertus", "apertus"),
    _slots("Hunyuan dense", "hunyuan_v1_dense"),
    _slots("Hunyuan MoE", "hunyuan_v1_moe", "experts", num_experts=4, moe_topk=2),
    _expanded(
        "Llama 4",
        "llama4_text",
        "attention in chunks",
        num_local_experts=4,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"],
        intermediate_size_mlp=48,
    ),
    _slots("MiniCPM3", "minicpm3", "latent attention; the head's input is scaled before it is steered", _LATENT),
    _slots("JetMoe", "jetmoe", "experts in the attention", num_local_experts=4),
    _expanded("DiffLlama", "diffllama", "runs each attention twice"),
    _expanded("Doge", "doge", "works on its attention mask itself"),
    _slots("BitNet", "bitnet"),
    _slots("nanochat", "nanochat", "logits capped"),
    _slots("CWM", "cwm", "some layers with a sliding window", _WINDOWS),
    _slots("ModernBERT decoder", "modernbert-decoder", "some layers with a sliding window", local_attention=2 * WINDOW),
    _none("GPT", "openai-gpt", "accepts no cache"),
    _expanded("CTRL", "ctrl", _ASKS_LENGTH, dff=48),
)

BY_TITLE: Mapping[str, Architecture] = {one.title: one for one in ARCHITECTURES}


def configuration(kind: str, **sizes: Any) -> PreTrainedConfig:
    """A tiny configuration; ``sizes`` replace the usual ones, None leaves one out."""
    known = {name: size for name, size in {**SIZES, **sizes}.items() if size is not None}
    return AutoConfig.for_model(kind, **known)


def build(architecture: Architecture) -> PreTrainedModel:
    """A model with random float32 weights, the same ones at every call."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        configuration(architecture.kind, **architecture.sizes), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.1:
                parameter.mul_(0.2 / parameter.std().clamp(min=0.01))  # or else no token cares for another one
    return model.eval()


def table() -> str:
    """The table as Markdown."""
    rows = [f"| {one.title} | `{one.kind}` | {one.cache} | {one.note} |" for one in ARCHITECTURES]
    return "\n".join(["| Architecture | `model_type` | Cache | Remarks |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
