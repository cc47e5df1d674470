"""Rewards: what the search makes better. Functions, models, judges, rules, servers, calls, or combinations of them."""

from langchain_aisp.rewards.base import RewardError, check_scores
from langchain_aisp.rewards.callable import CallableReward, as_reward
from langchain_aisp.rewards.calls import CallReward, CompleteCalls, CoveringCalls, GroundedCalls, as_call_reward
from langchain_aisp.rewards.classifier import ClassifierReward
from langchain_aisp.rewards.combinations import WeightedSum
from langchain_aisp.rewards.embedding import EmbeddingReward
from langchain_aisp.rewards.ensemble import EnsembleReward, Minimum
from langchain_aisp.rewards.foreign import last_user_text
from langchain_aisp.rewards.judge import JudgeReward
from langchain_aisp.rewards.remote import RemoteReward
from langchain_aisp.rewards.results import told_results
from langchain_aisp.rewards.rules import (
    Rule,
    RuleReward,
    Violation,
    length_between,
    must_match,
    must_not_match,
    must_satisfy,
    no_personal_data,
    no_topic,
)

__all__ = [
    "CallReward",
    "CallableReward",
    "ClassifierReward",
    "CompleteCalls",
    "CoveringCalls",
    "EmbeddingReward",
    "EnsembleReward",
    "GroundedCalls",
    "JudgeReward",
    "Minimum",
    "RemoteReward",
    "RewardError",
    "Rule",
    "RuleReward",
    "Violation",
    "WeightedSum",
    "as_call_reward",
    "as_reward",
    "check_scores",
    "last_user_text",
    "length_between",
    "must_match",
    "must_not_match",
    "must_satisfy",
    "no_personal_data",
    "no_topic",
    "told_results",
]
