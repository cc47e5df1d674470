"""Models and tokenizers from the hub or a folder: device, precision, quantization, adapters, no remote code unasked.

And what an engine has to know of a loaded model: its head, which must be one that can be steered, and its context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from langchain_aisp import noise
from langchain_aisp.engine.cache import decoder_config, input_device
from langchain_aisp.engine.decode import SteeredHead
from langchain_aisp.types import Head, require

_SAMPLES = 32  # noise vectors that measure a head
_UNLIMITED = 1 << 30
_QUANTIZATIONS = ("int8", "nf4")


def pick_device(device: str) -> torch.device:
    """The named device; ``auto`` takes cuda, else mps, else cpu."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """The named precision; ``auto`` is float32 on a CPU, where bfloat16 is slow, and the checkpoint's own elsewhere."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        message = f"dtype must be 'auto' or a torch dtype such as 'bfloat16', got {dtype!r}"
        raise ValueError(message)  # a name that torch does not know, not a wrong type
    return named


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    quantization: str | Any | None = None,
    adapter: str | Mapping[str, float] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode; arguments as in ``TransformersEngine.from_pretrained``."""
    target = pick_device(device)
    options: dict[str, Any] = {
        "revision": revision,
        "dtype": pick_dtype(dtype, target),
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization)
        options["device_map"] = {"": target}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    if adapter is not None:
        add_adapters(model, adapter_weights(adapter))
    module: torch.nn.Module = model  # transformers' own typing of .to() hides that it is a module's
    if quantization is None:
        module.to(target)
    module.eval()
    return model


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path, revision=revision, trust_remote_code=trust_remote_code
    )
    return tokenizer


def context_length(model: PreTrainedModel) -> int:
    """Longest text in tokens, as long as one set of rotary frequencies holds.

    Models with ``longrope`` turn to other frequencies at their original length; what they remember of the text before
    would then be wrong, so their texts end there.
    """
    config = decoder_config(model)
    longest = getattr(config, "max_position_embeddings", None) or _UNLIMITED
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, Mapping))):
        if parameters.get("rope_type") == "longrope":
            longest = min(longest, parameters.get("original_max_position_embeddings") or longest)
    return int(longest)


def output_head(model: PreTrainedModel) -> nn.Module:
    """The head of a decoder, or a ValueError."""
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder:
        fault = "is an encoder and a decoder"
    elif isinstance(head, nn.ModuleList):
        fault = f"has {len(head)} heads"
    elif not isinstance(head, nn.Module):
        fault = "has no head"
    else:
        return head
    message = f"{type(model).__name__} {fault}, so its pre-logits cannot be steered; use a decoder with one linear head"
    raise ValueError(f"{message} (AutoModelForCausalLM)")


@torch.inference_mode()
def measure_head(model: PreTrainedModel, head: SteeredHead) -> Head:
    """Width, spread and vocabulary of the head, seen in the model's own logits, behind whatever scales or caps them.

    Raises:
        ValueError: The logits do not come from the head's input, once per pass, or depend on later tokens.
    """
    name = type(model).__name__
    _require_causal(model)
    keys = noise.fold(0, torch.arange(_SAMPLES))
    widths: list[int] = []

    def shifted(hidden: Tensor) -> Tensor:
        widths.append(hidden.shape[-1])
        return hidden + noise.normal(keys, hidden.shape[-1]).to(hidden)[:, None]

    ids = torch.ones(_SAMPLES, 2, dtype=torch.int64, device=input_device(model))
    plain = model(input_ids=ids).logits.float()
    with head.editing(shifted):
        steered = model(input_ids=ids).logits.float()
    require(
        head.calls == 1 and not torch.equal(plain, steered),
        f"the logits of {name} do not come from its output embeddings, which it calls {head.calls} times in one pass; "
        "only models whose logits come from one linear head, called once, can be steered",
    )
    spread = (steered - plain)[:, -1].var(dim=-1, unbiased=False).mean().sqrt()
    return Head(widths[0], float(spread), plain.shape[-1])


def _require_causal(model: PreTrainedModel) -> None:
    """Raise ValueError when a token's logits change with the token after it."""
    ids = torch.tensor([[1, 2, 3, 2], [1, 4, 5, 4]], device=input_device(model))
    first, second = model(input_ids=ids).logits[:, 0].float()
    require(
        bool((first - second).abs().max() <= 0.1 * first.std()),  # rounding stays far below
        f"{type(model).__name__} sees the tokens that follow, so it cannot decode; if it is an encoder that can be a "
        "decoder too, load it with is_decoder=True, else use a causal language model (AutoModelForCausalLM)",
    )


def _quantization(quantization: str | Any) -> Any:
    if not isinstance(quantization, str):
        return quantization  # a configuration object of transformers
    require(
        quantization in _QUANTIZATIONS,
        f"quantization must be one of {', '.join(_QUANTIZATIONS)}, a transformers quantization config or None, "
        f"got {quantization!r}",
    )
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def adapter_weights(adapter: str | Mapping[str, float] | None) -> Mapping[str, float]:
    """A weight for each adapter: one that is named alone counts once."""
    return {adapter: 1.0} if isinstance(adapter, str) else dict(adapter or {})


def add_adapters(model: PreTrainedModel, weights: Mapping[str, float]) -> None:
    """Add PEFT adapters to a model, all of them active at once: what they change adds up, each times its weight.

    Nothing is merged, so a quantized model stays as it is and ranks may differ. The one exception is a head that an
    adapter changes: it is merged into weights of its own, since gradients by the pre-logits read them.

    Args:
        model: A model of transformers, not steered yet.
        weights: Ids or paths of adapters, and a factor for each; 1 adds it as it was trained, a negative one takes away
            what it taught. Factors other than 1 are for LoRA.

    Raises:
        ImportError: There is no package peft.
        ValueError: There are no adapters, or one does not fit the model or cannot be weighted.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        message = "adapter= needs the package peft: pip install 'langchain-aisp[peft]'"
        raise ImportError(message) from error
    require(len(weights) > 0, "adapter= names no adapter; give a path, paths with a weight each, or None")
    names = {f"adapter_{number}": path for number, path in enumerate(weights)}
    for name, path in names.items():
        found = model.load_adapter(path, adapter_name=name, ignore_mismatched_sizes=True)
        _require_fitting(found, name, path, model)
        _scale(model, name, weights[path], path)
    model.set_adapter(list(names))
    _merge_into_head(model)


def _require_fitting(found: Any, name: str, path: str, model: PreTrainedModel) -> None:
    """Raise ValueError unless every weight found its place; transformers only warns, and would go on without it."""
    missing = {key for key in found.missing_keys if name in key.split(".")}  # those of earlier adapters are listed too
    stray = sorted({*missing, *found.unexpected_keys, *(key for key, *_ in found.mismatched_keys)})
    shown = ", ".join(stray[:3]) + (", …" if len(stray) > 3 else "")
    require(
        not stray,
        f"the adapter {path} does not fit {type(model).__name__}: {len(stray)} weights are missing, unknown or of "
        f"another shape ({shown}); load it on the model that it was trained on",
    )


def _scale(model: PreTrainedModel, name: str, weight: float, path: str) -> None:
    """Multiply what a LoRA adds to the model's layers."""
    if weight == 1.0:
        return
    from peft import PeftType
    from peft.tuners.lora import LoraLayer

    adapted: Any = model  # where transformers keeps the configurations is no part of its typing
    kind = adapted.peft_config[name].peft_type
    require(kind == PeftType.LORA, f"the adapter {path} is {kind}, which has no weight but 1, got {weight}")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(name, weight)


def _merge_into_head(model: PreTrainedModel) -> None:
    """Merge what adapters change of the head into a copy of its weights, which the embeddings may share."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head: Any = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and head.weight.is_floating_point():
        base: Any = head.get_base_layer()
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        head.merge()
