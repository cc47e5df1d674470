"""Models and tokenizers from the hub or a folder: device, precision, quantization, adapters, never remote code unasked."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from langchain_aisp.types import require

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
    require(isinstance(named, torch.dtype), f"dtype must be 'auto' or a torch dtype such as 'bfloat16', got {dtype!r}")
    return named  # type: ignore[no-any-return]


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    quantization: str | Any | None = None,
    adapter: str | None = None,
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
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    if adapter is not None:
        _add_adapter(model, adapter)
    if quantization is None:
        model.to(target)
    return model.eval()  # type: ignore[no-any-return]


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model."""
    return AutoTokenizer.from_pretrained(  # type: ignore[no-any-return]
        path, revision=revision, trust_remote_code=trust_remote_code
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


def _add_adapter(model: PreTrainedModel, adapter: str) -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        message = "adapter= needs the package peft: pip install 'langchain-aisp[peft]'"
        raise ImportError(message) from error
    model.load_adapter(adapter)
