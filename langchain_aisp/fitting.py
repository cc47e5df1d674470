"""Value networks for ``REControl``: the model answers, the reward judges, and a network learns to foretell it.

Not a search: nothing is adapted, so all prompts' answers decode as one batch. What is fitted, and how, is in
``methods.value``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from langchain_aisp.methods import BestOfN
from langchain_aisp.methods.value import Fit, fit
from langchain_aisp.types import Chat, Engine, Problem, Reward, Sampling, Wave, require


@dataclass(frozen=True)
class Answers:
    """Answers of the model itself, with what a value network is fitted to.

    Attributes:
        prelogits: S answers, [tokens, D] float32 each: the pre-logits that their tokens were drawn from.
        rewards: [S] float32.
    """

    prelogits: tuple[Tensor, ...]
    rewards: Tensor


def fit_value(
    engine: Engine,
    reward: Reward,
    prompts: Sequence[Chat],
    *,
    sampling: Sampling,
    samples_per_prompt: int = 16,
    hidden: int | None = None,
    epochs: int = 100,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Fit:
    """Fit a value network for a model and a reward.

    Args:
        engine: Decodes the answers; it has to observe pre-logits.
        reward: Judges them; the network foretells it.
        prompts: Conversations like those that will be answered, but none that is tested on. The last tenth only
            chooses when to stop.
        sampling: How the answers are drawn; with a temperature, or all answers to a prompt are the same.
        samples_per_prompt: Answers to each; all of them are kept in memory, tokens × D × 4 bytes each.
        hidden: Width of the network's inner layers; that of the pre-logits unless given.
        epochs: Most passes over the answers.
        learning_rate: Of Adam.
        seed: Fixes the answers, the first weights and the order.

    Returns:
        The network, and how much of the rewards' variance it explains on prompts it was not fitted on. A share near 0
        says that the reward cannot be foretold from these pre-logits: more answers may help, steering will not.

    Raises:
        ValueError: There are too few answers, or all have the same reward.
    """
    answers = collect(engine, reward, prompts, sampling=sampling, samples_per_prompt=samples_per_prompt, seed=seed)
    rewards = answers.rewards
    return fit(answers.prelogits, rewards, hidden=hidden, epochs=epochs, learning_rate=learning_rate, seed=seed)


def collect(
    engine: Engine,
    reward: Reward,
    prompts: Sequence[Chat],
    *,
    sampling: Sampling,
    samples_per_prompt: int,
    seed: int = 0,
) -> Answers:
    """Plain samples, their pre-logits and rewards; prompt by prompt, in the order of the prompts.

    Args:
        engine: Decodes the answers.
        reward: Judges them.
        prompts: Conversations.
        sampling: How the answers are drawn.
        samples_per_prompt: Answers to each.
        seed: Fixes the answers.
    """
    require(len(prompts) > 0, "there are no prompts to answer")
    prelogits, rewards = list[Tensor](), list[Tensor]()
    with ExitStack() as unfinished:
        decoding = [
            unfinished.enter_context(engine.submit(_plain(engine, chat, sampling, samples_per_prompt, seed)))
            for chat in prompts
        ]
        for chat, ticket in zip(prompts, decoding, strict=True):
            rollouts = ticket.future.result()
            judged = unfinished.enter_context(reward.submit([(chat, response) for response in rollouts.responses]))
            rewards.append(judged.future.result())
            seen = rollouts.observed["prelogits"]
            prelogits += [walk[:length].clone() for walk, length in zip(seen, rollouts.lengths.tolist(), strict=True)]
    return Answers(tuple(prelogits), torch.cat(rewards))


def _plain(engine: Engine, chat: Chat, sampling: Sampling, count: int, seed: int) -> Wave:
    """Samples of the model itself, whose pre-logits are wanted."""
    method = BestOfN(samples=count, samples_per_wave=count)
    problem = Problem(engine.encode(chat, seed=seed), sampling, engine.head)
    return replace(method.propose(method.init(problem)), observe=frozenset(("prelogits",)))
