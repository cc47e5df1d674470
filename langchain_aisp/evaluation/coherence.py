"""How close an answer stays to its prompt: cosines of sentence embeddings, by LangChain's or a model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from langchain_aisp.evaluation.metrics import cosine

SIMCSE = "pooler:princeton-nlp/sup-simcse-bert-base-uncased"
"""What the papers measure coherence with."""

_POOLER = "pooler:"
_BATCH = 32


class Embeddings(Protocol):
    """What is needed of LangChain's embeddings."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text."""


def coherence(embeddings: Embeddings, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Cosine, from -1 to 1, of the embeddings of each prompt and its response; a blank response gets 0.

    Args:
        embeddings: Any embeddings of LangChain, or ``load_embeddings``.
        prompts: n texts.
        responses: n texts.

    Returns:
        n numbers.

    Source: the measure of ARGS, RE-Control and AISP, there with SimCSE (``SIMCSE``).
    """
    texts = list(dict.fromkeys([*prompts, *responses]))
    vectors = dict(zip(texts, embeddings.embed_documents(texts), strict=True))
    pairs = zip(prompts, responses, strict=True)
    return [cosine(vectors[prompt], vectors[answer]) if answer.strip() else 0.0 for prompt, answer in pairs]


def load_embeddings(spec: str) -> Embeddings:
    """Embeddings by name.

    Args:
        spec: ``pooler:MODEL`` for the pooler output of an encoder of transformers, cut at 128 tokens, as the papers use
            it, or else the id or folder of a model of sentence-transformers.

    Raises:
        ImportError: The latter without the package.
    """
    if spec.startswith(_POOLER):
        return PoolerEmbeddings(spec.removeprefix(_POOLER))
    return SentenceEmbeddings(spec)


@dataclass(frozen=True)
class PoolerEmbeddings:
    """The pooler output of an encoder such as BERT: its first token's state behind one more layer.

    Attributes:
        path: Id or folder of an encoder with a pooler; loaded at the first use.
        max_tokens: What of a text is read.
    """

    path: str
    max_tokens: int = 128

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text."""
        batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
        return [vector for batch in batches for vector in self._embed(batch)]

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> list[list[float]]:
        model, tokenizer = self._loaded
        read = tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        vectors: list[list[float]] = model(**read).pooler_output.float().tolist()
        return vectors

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer.

        Raises:
            ValueError: The model has no trained pooler.
        """
        from transformers import AutoModel, AutoTokenizer

        model, info = AutoModel.from_pretrained(self.path, output_loading_info=True)
        if missing := sorted(map(str, info["missing_keys"])):
            raise ValueError(f"{self.path} has no trained weights for {', '.join(missing[:3])}; take another encoder")
        return model.eval(), AutoTokenizer.from_pretrained(self.path)


@dataclass(frozen=True)
class SentenceEmbeddings:
    """A model of sentence-transformers.

    Attributes:
        path: Id or folder; loaded at the first use.
    """

    path: str

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text."""
        vectors: list[list[float]] = self._loaded.encode(texts, show_progress_bar=False).tolist()
        return vectors

    @cached_property
    def _loaded(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as missing:
            message = f"embeddings by {self.path} need sentence-transformers: pip install 'langchain-aisp[eval]'"
            raise ImportError(message) from missing
        return SentenceTransformer(self.path)
