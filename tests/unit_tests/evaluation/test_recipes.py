"""Recipes on tiny random models of the same architectures, templates and classes as the real ones."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from langchain_aisp import cli
from langchain_aisp.evaluation.log import read_log
from langchain_aisp.evaluation.recipes import (
    HUMAN_ASSISTANT,
    MISTRAL,
    MODELS,
    RECIPES,
    REWARDS,
    ULTRARM,
    VICUNA,
    ModelRecipe,
    find_recipe,
)
from langchain_aisp.rewards.conversation import ConversationEncoder
from langchain_aisp.types import Response

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CHAT = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bored."},
]
ANSWERED = [*CHAT, {"role": "assistant", "content": "Read."}]
SKYWORK = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def bare_tokenizer(template=None):
    """Bytes, a BOS and an EOS; no chat template unless given."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def config_of(kind, **options):
    usual = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.5}
    return kind(**SIZES, max_position_embeddings=512, **usual, **options)


def save_language_model(folder):
    torch.manual_seed(0)
    LlamaForCausalLM(config_of(LlamaConfig)).save_pretrained(folder)
    bare_tokenizer().save_pretrained(folder)
    return str(folder)


def save_scalar_head(folder, backbone, **config):
    """A backbone and ``regression_head`` in one file, under the names and the class that the real ones have."""
    torch.manual_seed(1)
    for name, value in config.items():
        setattr(backbone.config, name, value)
    backbone.config.save_pretrained(folder)
    bare_tokenizer().save_pretrained(folder)
    weights = {f"model.{name}": tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    head = {"regression_head.weight": torch.randn(1, SIZES["hidden_size"])}
    save_file(weights | head, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def save_ultrarm(folder):
    return save_scalar_head(folder, LlamaModel(config_of(LlamaConfig)), architectures=["LlamaRewardModel"])


def save_eurus(folder):
    """Its configuration names code of its own, which must not be needed."""
    backbone = MistralModel(config_of(MistralConfig, num_key_value_heads=2))
    code = {"AutoModel": "modeling_eurus_rm.EurusRewardModel"}
    return save_scalar_head(folder, backbone, architectures=["EurusRewardModel"], auto_map=code)


def save_skywork(folder):
    torch.manual_seed(2)
    LlamaForSequenceClassification(config_of(LlamaConfig, num_labels=1, pad_token_id=1)).save_pretrained(folder)
    bare_tokenizer(SKYWORK).save_pretrained(folder)
    return str(folder)


SAVERS = {"ultrarm": save_ultrarm, "eurus": save_eurus, "skywork": save_skywork, "skywork-small": save_skywork}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Hi.", "Why?")))
    return str(path)


@pytest.fixture
def folders(tmp_path):
    """Makes folders for models."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        return folder

    return make


def rendered(template, chat, **options):
    return bare_tokenizer().apply_chat_template(chat, chat_template=template, tokenize=False, **options)


def test_the_human_assistant_template_is_that_of_hh_rlhf():
    asked = rendered(HUMAN_ASSISTANT, CHAT, add_generation_prompt=True)
    assert asked == "<s>\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Bored.\n\nAssistant:"


def test_the_vicuna_template_has_its_system_prompt_and_ends_what_the_assistant_said():
    asked = rendered(VICUNA, CHAT, add_generation_prompt=True)
    assert asked.startswith("<s>A chat between a curious user and an artificial intelligence assistant. The assistant")
    assert asked.endswith("user's questions. USER: Hi. ASSISTANT: Hello.</s> USER: Bored. ASSISTANT:")
    own = rendered(VICUNA, [{"role": "system", "content": "Be brief."}, *CHAT[:1]], add_generation_prompt=True)
    assert own == "<s>Be brief. USER: Hi. ASSISTANT:"


def test_the_templates_of_the_rewards_are_those_of_their_model_cards():
    assert rendered(ULTRARM, ANSWERED) == "Human: Hi.\nAssistant: Hello.\nHuman: Bored.\nAssistant: Read."
    assert rendered(MISTRAL, ANSWERED) == "[INST] Hi. [/INST] Hello.</s>[INST] Bored. [/INST] Read."
    system = [{"role": "system", "content": "Be brief."}, *ANSWERED[:2]]
    assert rendered(MISTRAL, system) == "[INST] Be brief.\n\nHi. [/INST] Hello."


@pytest.mark.parametrize("name", ["ultrarm", "eurus"])
def test_a_scalar_head_reads_the_last_token_of_the_template_with_one_bos_and_no_eos(folders, name):
    recipe, path = REWARDS[name], SAVERS[name](folders(name))
    encoder = ConversationEncoder(
        bare_tokenizer(), chat_template=recipe.chat_template, add_bos=True, add_eos=False, max_length=None
    )
    ids = encoder.encode(CHAT, "Read.")
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert ids[-1] not in (0, 1)
    reward = recipe.load(path)
    reward.load()
    model = reward._scorer._model
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected = float(model.score(hidden))
    [score] = reward.submit([(CHAT, Response("Read."))]).future.result(timeout=60).tolist()
    assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_recipe_with_every_reward_and_another_one_to_judge(model, reward):
    recipe = find_recipe(f"{model}-{reward}")
    assert (recipe.model, recipe.reward) == (MODELS[model], REWARDS[reward])
    assert recipe.gold.path != recipe.reward.path
    assert recipe.model.chat_template is not None


def test_an_unknown_recipe_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="llama3-8b-ultrarm"):
        find_recipe("gpt")


@pytest.mark.parametrize("name", ["llama3-8b-ultrarm", "llama3-8b-eurus", "vicuna-7b-skywork"])
def test_a_recipe_runs_with_one_command(folders, prompts, tmp_path, name):
    recipe, reward = RECIPES[name], name.removeprefix("llama3-8b-").removeprefix("vicuna-7b-")
    out = tmp_path / "runs.jsonl"
    models = ("--model", save_language_model(folders("model")), "--reward", SAVERS[reward](folders("reward")))
    gold = ("--gold", (save_skywork if reward != "skywork" else save_eurus)(folders("gold")))
    small = ("--prompts", prompts, "--samples", "4", "--max-tokens", "6", "--methods", "best_of_n,aisp")
    result = CliRunner().invoke(cli.app, ["eval", "--recipe", name, *models, *gold, *small, "--out", str(out)])
    assert result.exit_code == 0, result.output
    config, lines = read_log(out)
    assert config["chat_template"] == recipe.model.chat_template
    assert f"add_bos={recipe.reward.add_bos}, add_eos={recipe.reward.add_eos}" in config["reward"]["settings"]
    assert f"chat_template={recipe.reward.chat_template!r}" in config["reward"]["settings"]
    assert all(repr(recipe.model.stop) in settings for settings in config["methods"].values())
    runs = [line for line in lines if line["kind"] == "run"]
    assert len(runs) == 4
    assert all(len(run["samples"]) == 4 and run["gold"] is not None for run in runs)


def test_a_base_model_outside_of_recipes_needs_a_template(folders, prompts, tmp_path):
    path = save_language_model(folders("model"))
    with pytest.raises(ValueError, match="chat_template"):
        ModelRecipe(path).load()
    small = ("--prompts", prompts, "--samples", "2", "--max-tokens", "4", "--methods", "best_of_n")
    arguments = ["eval", "--model", path, "--reward", "demo", *small, "--chat-template", "human-assistant"]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path / "runs.jsonl")])
    assert result.exit_code == 0, result.output
    config, _ = read_log(tmp_path / "runs.jsonl")
    assert config["chat_template"] == HUMAN_ASSISTANT
    assert config["gold"] is None
