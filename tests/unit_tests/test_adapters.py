"""PEFT adapters: loaded, combined and steered like the same change made to the weights by hand."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from langchain_aisp.align import align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.loading import load_model
from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.evaluation.datasets import PromptRecord
from langchain_aisp.evaluation.run import Evaluation
from langchain_aisp.methods import AISP, BestOfN
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Sampling
from tests import tiny

peft = pytest.importorskip("peft")

CHAT = [{"role": "user", "content": "Hello"}]
IDS = torch.tensor([[7, 90, 33, 121, 8]])
Save = Callable[..., str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random model."""
    folder = tmp_path_factory.mktemp("base")
    tiny.model(tie_word_embeddings=True).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def save(base: str, tmp_path: Path) -> Save:
    """Saves a random LoRA for that model and returns its folder."""

    def call(seed: int, rank: int = 2, targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")) -> str:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(load_model(base), config)
        for name, weights in adapted.named_parameters():
            if "lora_B" in name:  # zeros, as training begins
                torch.nn.init.normal_(weights, std=0.1)
        folder = tmp_path / f"lora-{seed}"
        adapted.save_pretrained(folder)
        return str(folder)

    return call


def changed_by_hand(base: str, weights: dict[str, float]) -> PreTrainedModel:
    """The model with ``weight * alpha / rank * B A`` added to its matrices; a tied head gets weights of its own."""
    model = load_model(base)
    for folder, weight in weights.items():
        config = peft.LoraConfig.from_pretrained(folder)
        tensors = peft.load_peft_weights(folder)
        for name, down in tensors.items():
            if "lora_A" not in name:
                continue
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            up = tensors[name.replace("lora_A", "lora_B")]
            update = weight * config.lora_alpha / config.r * (up @ down)
            module.weight = torch.nn.Parameter(module.weight.detach() + update)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def answers(model: PreTrainedModel, control_kl: float = 0.0) -> list[tuple[int, ...]]:
    """Every response of a search whose later waves are steered."""
    engine = TransformersEngine(model, tiny.tokenizer())
    reward = as_reward(lambda chat, texts: [float(text.count("e") - len(text) / 9) for text in texts])
    method = AISP(samples=16, iterations=4, control_kl=control_kl)
    found = align(engine, reward, method, CHAT, sampling=Sampling(max_tokens=12))
    engine.close()
    return [candidate.tokens for candidate in found.candidates]


def test_an_adapter_changes_the_logits_like_the_same_change_of_the_weights(base: str, save: Save) -> None:
    lora = save(1)
    adapted = logits(load_model(base, adapter=lora))
    torch.testing.assert_close(adapted, logits(changed_by_hand(base, {lora: 1.0})), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, logits(load_model(base)), atol=0.1)


def test_several_adapters_of_unlike_ranks_add_up_by_their_weights(base: str, save: Save) -> None:
    weights = {save(1): 0.7, save(2, rank=3, targets=("q_proj", "o_proj")): -0.4}
    adapted = logits(load_model(base, adapter=weights))
    torch.testing.assert_close(adapted, logits(changed_by_hand(base, weights)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("q_proj", "up_proj"), ("v_proj", "lm_head")], ids=["inside", "head"])
def test_a_steered_search_of_an_adapted_model_is_that_of_the_changed_weights(
    base: str, save: Save, targets: tuple[str, ...]
) -> None:
    lora = save(3, targets=targets)
    adapted, by_hand = load_model(base, adapter=lora), changed_by_hand(base, {lora: 1.0})
    assert answers(adapted, control_kl=0.3) == answers(by_hand, control_kl=0.3)
    assert answers(adapted, control_kl=0.3) != answers(load_model(base), control_kl=0.3)


def test_what_was_added_pins_an_evaluation(base: str, save: Save) -> None:
    found = {}
    for adapter in (None, save(1), {save(1): 0.5, save(2): 1.0}):
        with TransformersEngine.from_pretrained(base, adapter=adapter, device="cpu") as engine:
            reward, sampling = as_reward(lambda chat, texts: [0.0] * len(texts), fingerprint="none"), Sampling()
            arms, prompts = (Arm("plain", BestOfN(1), sampling),), (PromptRecord("1", tuple(CHAT)),)
            found[str(adapter)] = Evaluation(engine=engine, reward=reward, arms=arms, prompts=prompts).config
    configs = list(found.values())
    assert [config.get("adapters") for config in configs] == [None, {save(1): 1.0}, {save(1): 0.5, save(2): 1.0}]
    assert len({str(config) for config in configs}) == 3


def test_an_adapter_of_a_tied_head_leaves_the_embeddings_alone(base: str, save: Save) -> None:
    plain, adapted = load_model(base), load_model(base, adapter=save(4, targets=("lm_head",)))
    assert torch.equal(plain.get_input_embeddings().weight, adapted.get_input_embeddings().weight)
    assert not torch.equal(plain.get_output_embeddings().weight, adapted.get_output_embeddings().weight)


def test_an_adapter_of_another_model_is_refused(base: str, save: Save, tmp_path: Path) -> None:
    lora = save(5)
    tiny.model(hidden_size=16).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match=r"lora-5 does not fit LlamaForCausalLM: .* another shape"):
        load_model(str(tmp_path / "smaller"), adapter=lora)


def test_an_adapter_with_weights_left_over_is_refused(base: str, save: Save, tmp_path: Path) -> None:
    lora = save(6)
    tiny.model(num_hidden_layers=1).save_pretrained(tmp_path / "shorter")
    with pytest.raises(ValueError, match="lora-6 does not fit LlamaForCausalLM: 6 weights"):
        load_model(str(tmp_path / "shorter"), adapter=lora)


def test_an_adapter_that_is_no_lora_has_no_weight(base: str, tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(load_model(base), config).save_pretrained(tmp_path / "ia3")
    assert load_model(base, adapter=str(tmp_path / "ia3")) is not None
    with pytest.raises(ValueError, match="has no weight but 1, got 0.5"):
        load_model(base, adapter={str(tmp_path / "ia3"): 0.5})


def test_no_adapters_at_all_are_refused(base: str) -> None:
    with pytest.raises(ValueError, match="names no adapter"):
        load_model(base, adapter={})


def test_without_peft_the_extra_is_named(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"langchain-aisp\[peft\]"):
        load_model(base, adapter="anything")
