"""The embedded demo: a customer-service world with an exact judge, and two small models trained on it."""

from pathlib import Path

from langchain_aisp.demo.checker import PARTS, Checks, Facts, Scenario, check, gold_reward
from langchain_aisp.demo.scenarios import Draft, compose, draft, redraw, scenarios

LANGUAGE_MODEL_PATH = Path(__file__).parent / "language_model"
REWARD_MODEL_PATH = Path(__file__).parent / "reward_model"

__all__ = [
    "LANGUAGE_MODEL_PATH",
    "PARTS",
    "REWARD_MODEL_PATH",
    "Checks",
    "Draft",
    "Facts",
    "Scenario",
    "check",
    "compose",
    "draft",
    "gold_reward",
    "redraw",
    "scenarios",
]
