"""Rewards: what the search makes better. Any function, a reward model, or a combination of them."""

from langchain_aisp.rewards.base import RewardError, check_scores
from langchain_aisp.rewards.callable import CallableReward, as_reward
from langchain_aisp.rewards.classifier import ClassifierReward
from langchain_aisp.rewards.combinations import Minimum, WeightedSum

__all__ = [
    "CallableReward",
    "ClassifierReward",
    "Minimum",
    "RewardError",
    "WeightedSum",
    "as_reward",
    "check_scores",
]
