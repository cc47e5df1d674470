"""Models and rewards that papers on inference-time alignment use, with the templates that they do not bring along.

Base models have no chat template, and reward models are only right about texts like those they were trained on. So
every template stands here, is passed explicitly, and is written into the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from langchain_aisp.engine import TransformersEngine
from langchain_aisp.rewards import ClassifierReward
from langchain_aisp.types import require

HUMAN_ASSISTANT = (
    "{{ bos_token or '' }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' }}{{ m['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""Plain turns as in HH-RLHF, for base models."""

VICUNA = (
    "{{ bos_token or '' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ASSISTANT: ' + m['content'] }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""The turns of Vicuna 1.1 and 1.5."""

ULTRARM = (
    "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ 'Human: ' if m['role'] == 'user' else 'Assistant: ' if m['role'] == 'assistant' else '' }}{{ m['content'] }}"
    "{% endfor %}"
)
"""UltraRM's model card: one line per turn. Others write "User:", so compare with whom you compare."""

MISTRAL = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' }}{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}"
    "{% endif %}{{ m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] }}{% if not loop.last %}{{ eos_token }}{% endif %}"
    "{% endif %}{% endfor %}"
)
"""Mistral-Instruct 0.2's turns, which Eurus-RM's model card names (its example closes them with a backslash)."""

TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "human-assistant": (HUMAN_ASSISTANT, ("\n\nHuman:",)),
    "vicuna": (VICUNA, ()),
}
"""Templates for language models that have none, and the strings that then end an answer."""


@dataclass(frozen=True)
class ModelRecipe:
    """A language model and how it is talked to.

    Attributes:
        path: Hub id or folder.
        chat_template: Its template; None takes the tokenizer's own.
        stop: Strings that end an answer: a base model would go on with the next turn.
    """

    path: str
    chat_template: str | None = None
    stop: tuple[str, ...] = ()

    def load(self) -> TransformersEngine:
        """The engine, once per process."""
        return TransformersEngine.shared(self.path, chat_template=self.chat_template)


@dataclass(frozen=True)
class RewardRecipe:
    """A reward model and how it reads conversations.

    Attributes:
        path: Hub id.
        chat_template: Its template; None takes the tokenizer's own.
        scalar_head: Name of its linear head, where it is no sequence classifier.
        add_bos: Exactly one BOS in front, none, or what the template writes; see ``ClassifierReward``.
        add_eos: The same of the EOS at the end.
        batch_size: Most texts per forward pass.
    """

    path: str
    chat_template: str | None = None
    scalar_head: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    batch_size: int = 32

    def load(self, path: str | None = None, *, allow_pickle: bool = False) -> ClassifierReward:
        """The reward model, in half precision on an accelerator; loaded at its first use.

        Args:
            path: Replaces the hub id, for a copy on disk.
            allow_pickle: Whether ``.bin`` weights may be read, with ``weights_only=True``.
        """
        return ClassifierReward.from_pretrained(
            path or self.path,
            dtype="bfloat16" if torch.cuda.is_available() else None,
            scalar_head=self.scalar_head,
            allow_pickle=allow_pickle,
            chat_template=self.chat_template,
            add_bos=self.add_bos,
            add_eos=self.add_eos,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Recipe:
    """A whole evaluation; what the command line says besides replaces parts of it.

    Attributes:
        model: The language model.
        reward: What is optimised.
        gold: What judges without being seen.
        prompts: See ``load_prompts``.
        limit: How many prompts.
        samples: Responses per search: n = κ = 32 of those who use the published method.
        max_tokens: Longest answer.
        methods: See ``parse_arms``.
    """

    model: ModelRecipe
    reward: RewardRecipe
    gold: RewardRecipe
    prompts: str = "hh-rlhf:test"
    limit: int = 300
    samples: int = 1024
    max_tokens: int = 128
    methods: str = "best_of_n,greedy,aisp,published"


MODELS = {
    "llama3-8b": ModelRecipe("meta-llama/Meta-Llama-3-8B", *TEMPLATES["human-assistant"]),
    "vicuna-7b": ModelRecipe("lmsys/vicuna-7b-v1.5", *TEMPLATES["vicuna"]),
}
REWARDS = {
    "ultrarm": RewardRecipe(
        "openbmb/UltraRM-13b", ULTRARM, "regression_head", add_bos=True, add_eos=False, batch_size=16
    ),
    "eurus": RewardRecipe("openbmb/Eurus-RM-7b", MISTRAL, "regression_head", add_bos=True, add_eos=False),
    "skywork": RewardRecipe("Skywork/Skywork-Reward-V2-Llama-3.1-8B"),
    "skywork-small": RewardRecipe("Skywork/Skywork-Reward-V2-Qwen3-0.6B"),
}
_GOLD = {"ultrarm": "skywork", "eurus": "skywork", "skywork": "eurus", "skywork-small": "eurus"}  # of unlike training
_PROMPTS = {"skywork-small": "shp:test"}  # what others report with it

RECIPES = {
    f"{model}-{reward}": Recipe(
        MODELS[model], REWARDS[reward], REWARDS[_GOLD[reward]], prompts=_PROMPTS.get(reward, Recipe.prompts)
    )
    for model in MODELS
    for reward in REWARDS
}
"""One for each of the models with each of the rewards: ``llama3-8b-ultrarm``, ``vicuna-7b-eurus``, …"""


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: There is none.
    """
    require(name in RECIPES, f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
