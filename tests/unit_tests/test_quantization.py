"""Quantized loading on a CPU: less memory, the prompt still shared, steering and answers still work."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from langchain_aisp import AISP, AISPChatModel
from langchain_aisp.align import align
from langchain_aisp.demo import LANGUAGE_MODEL_PATH
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import PublishedAISP
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Sampling

CHAT = [{"role": "user", "content": "My parcel is late."}]
KINDS = ["int8", "nf4"] + ["torchao"] * bool(find_spec("torchao"))  # which .ci/run adds


def quantization(kind: str):
    """A name that the engine knows, or a configuration of transformers."""
    if kind != "torchao":
        return kind
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module", params=KINDS)
def engine(request):
    options = {"device": "cpu", "quantization": quantization(request.param)}
    with TransformersEngine.from_pretrained(str(LANGUAGE_MODEL_PATH), **options) as engine:
        yield engine


def letters(chat, texts):
    return [float(len(set(text))) for text in texts]


def test_a_quantized_model_is_quantized_and_shares_its_prompt(engine):
    assert engine.model.hf_quantizer is not None
    assert engine.cache.name == "slots"


@pytest.mark.parametrize("method", [AISP(16, 2), PublishedAISP(samples_per_iteration=8, iterations=2)])
def test_searches_work_and_are_reproducible(engine, method):
    found = [align(engine, as_reward(letters), method, CHAT, sampling=Sampling(max_tokens=16)) for _ in range(2)]
    assert found[0].best.response.text
    assert [each.tokens for each in found[0].candidates] == [each.tokens for each in found[1].candidates]
    assert found[0].trace[-1].best >= found[0].trace[0].best


def test_the_chat_model_passes_it_on():
    chat = AISPChatModel(model="demo", quantization="nf4", device="cpu", method=AISP(8, 2), max_tokens=8)
    assert chat.invoke("My parcel is late.").content
