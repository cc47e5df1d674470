"""Closeness of meaning as a reward: the cosine between a candidate and a reference, by any embeddings of LangChain."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from threading import Lock
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from langchain_aisp.rewards.asking import Asking, Scoring, Settled
from langchain_aisp.rewards.base import RewardError
from langchain_aisp.rewards.fingerprint import stable_fingerprint
from langchain_aisp.rewards.foreign import identity_of, settled_fingerprint
from langchain_aisp.types import Chat, Response, Ticket, require

Reference: TypeAlias = str | Sequence[str]
Vector: TypeAlias = Sequence[float]

_REMEMBERED = 1024


@dataclass(frozen=True, eq=False)
class EmbeddingReward(Settled):
    """Scores candidates by the cosine, from −1 to 1, of their embedding and that of a reference.

    References are embedded once and remembered. A blank candidate says nothing and scores −1.

    Attributes:
        embeddings: Embeddings with ``embed_documents`` and, for callers on an event loop, ``aembed_documents``.
        reference: A text, several texts, or a function that finds them in the conversation, such as
            ``last_user_text``.
        combine: Of several references the ``"closest"`` counts, or the ``"mean"`` of all cosines.
        timeout: Most seconds for all candidates of a conversation; None sets no limit.
        name: For error messages.
        fingerprint: Identity for cache keys; unless given, a hash of the settings, where the embeddings have a
            ``fingerprint`` or LangChain can write them down (see ``identity_of``), else one of this process.
    """

    embeddings: Any
    reference: Reference | Callable[[Chat], Reference]
    _: KW_ONLY
    combine: Literal["closest", "mean"] = "closest"
    timeout: float | None = None
    name: str = "similarity"
    fingerprint: str = ""
    _memory: _Memory = field(default_factory=lambda: _Memory(), init=False, repr=False)
    _asking: Asking = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Reject what could only fail later, in the middle of a search."""
        ask = getattr(self.embeddings, "embed_documents", None)
        if not callable(ask) or isinstance(self.embeddings, type):
            got = type(self.embeddings).__name__
            raise TypeError(f"embeddings must be an object with embed_documents, as LangChain's are; got {got}")
        if not callable(self.reference):
            texts = _listed(self.reference)
            require(bool(texts) and all(map(str.strip, texts)), "reference must be text that is not blank")
        require(self.combine in ("closest", "mean"), f"combine is 'closest' or 'mean', got {self.combine!r}")
        aask = getattr(self.embeddings, "aembed_documents", None)
        object.__setattr__(self, "_asking", Asking(self._compare, ask, aask, name=self.name, timeout=self.timeout))
        object.__setattr__(self, "fingerprint", self.fingerprint or self._derived_fingerprint())

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Start comparing; one call of the embeddings per distinct conversation.

        Args:
            pairs: Conversations and candidates; only the text of a candidate is read.
            loop: The caller's running loop, on which ``aembed_documents`` runs; otherwise ``embed_documents`` runs in
                a thread.

        Returns:
            A ticket for [len(pairs)] float32. Its errors are ``RewardError``.
        """
        return self._asking.submit(pairs, loop)

    def _compare(self, chat: Chat, responses: Sequence[Response]) -> Scoring:
        """Embed the candidates, and the references that are not known yet, in one call."""
        references = self._references(chat)
        known = self._memory.recall(references)
        said = [response.text for response in responses if response.text.strip()]
        if not said:
            return [-1.0] * len(responses)
        texts = [*(text for text in dict.fromkeys(references) if text not in known), *said]
        vectors = _checked(self.name, (yield texts), texts)
        known.update(zip(texts[: -len(said)], vectors, strict=False))
        self._memory.keep({text: known[text] for text in references})
        cosines = iter(self._cosines(vectors[-len(said) :], [known[text] for text in references]))
        return [next(cosines) if response.text.strip() else -1.0 for response in responses]

    def _references(self, chat: Chat) -> list[str]:
        found = _listed(self.reference(chat) if callable(self.reference) else self.reference)
        if not found or not all(map(str.strip, found)):
            remedy = "Return at least one text that is not blank, for every conversation."
            raise RewardError(self.name, f"got the reference {found!r} from its function", remedy)
        return found

    def _cosines(self, candidates: Sequence[Vector], references: Sequence[Vector]) -> list[float]:
        """Scores [n] of candidates [n, D] against references [m, D]."""
        if len({len(vector) for vector in (*candidates, *references)}) > 1:
            problem = f"has references of width {len(references[0])}, candidates of width {len(candidates[0])}"
            raise RewardError(self.name, problem, "The embeddings must always have one width; make a new reward.")
        left, right = (normalize(torch.tensor(rows, dtype=torch.float64), dim=-1) for rows in (candidates, references))
        cosines = torch.einsum("nd,md->nm", left, right)
        best = cosines.amax(dim=1) if self.combine == "closest" else cosines.mean(dim=1)
        return best.tolist()

    def _derived_fingerprint(self) -> str:
        about = stable_fingerprint(self.reference) if callable(self.reference) else repr(_listed(self.reference))
        return settled_fingerprint("similarity", about, self.combine, identity_of(self.embeddings))


class _Memory:
    """Vectors of the latest references; several threads may ask."""

    def __init__(self) -> None:
        self._vectors: dict[str, Vector] = {}
        self._lock = Lock()

    def recall(self, texts: Sequence[str]) -> dict[str, Vector]:
        with self._lock:
            return {text: self._vectors[text] for text in texts if text in self._vectors}

    def keep(self, vectors: dict[str, Vector]) -> None:
        """Remember vectors; the oldest make room."""
        with self._lock:
            self._vectors = dict([*(self._vectors | vectors).items()][-_REMEMBERED:])


def _listed(reference: Reference) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference)


def _checked(name: str, vectors: Any, texts: Sequence[str]) -> list[Vector]:
    """What the embeddings returned as one vector per text."""
    listed = [[float(number) for number in vector] for vector in vectors]
    if len(listed) != len(texts):
        problem = f"got {len(listed)} embeddings for {len(texts)} texts"
        raise RewardError(name, problem, "embed_documents must return one vector per text, in their order.")
    return listed  # type: ignore[return-value]
