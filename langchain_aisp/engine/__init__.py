"""Engines turn waves into rollouts; the only layer that knows a model library."""

from langchain_aisp.engine.transformers import TransformersEngine

__all__ = ["TransformersEngine"]
