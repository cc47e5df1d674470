"""Reward models of the Hugging Face kind: a sequence classifier, or a backbone with a scalar head."""

from __future__ import annotations

import uuid
from asyncio import AbstractEventLoop
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from os import PathLike
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from langchain_aisp.futures import fail, settle
from langchain_aisp.rewards.base import RewardError, check_scores
from langchain_aisp.rewards.checkpoint import Checkpoint, LoadedClassifier
from langchain_aisp.rewards.conversation import ConversationEncoder
from langchain_aisp.rewards.fingerprint import digest
from langchain_aisp.rewards.scorer import Scorer, Settings
from langchain_aisp.rewards.threads import Workers
from langchain_aisp.types import Chat, Response, Ticket

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ClassifierReward:
    """Scores candidates with a reward model.

    The score is the logit of a model with one label, the log-probability of ``label`` (log-sigmoid for multi-label
    models) of a model with several. One thread runs the model; requests that wait at the same time share batches.
    Texts are padded on the right and decoders are read at each row's own last token, so that no score depends on the
    batch (up to the rounding of the matrix products).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        fingerprint: str | None = None,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        label: str | int | None = None,
    ) -> None:
        """Use a model that is in memory already; it is switched to evaluation mode.

        Args:
            model: A sequence classifier.
            tokenizer: Its own tokenizer.
            name: For error messages; the model's name unless given.
            fingerprint: Identity for cache keys; one of this object alone unless given.
            chat_template: See ``Settings``, also for the other arguments.
            add_bos: Policy for the BOS token.
            add_eos: Policy for the EOS token.
            batch_size: Most texts per forward pass.
            max_length: Most tokens per text.
            label: The label that counts.
        """
        settings = Settings(chat_template, add_bos, add_eos, batch_size, max_length, label)
        known = str(model.config.name_or_path or type(model).__name__)
        loaded: nn.Module = model
        self._set_up(LoadedClassifier(loaded.eval(), tokenizer), settings, name or known, fingerprint)

    @classmethod
    def from_pretrained(
        cls,
        model_id_or_path: str | PathLike[str],
        *,
        name: str | None = None,
        fingerprint: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device = "auto",
        trust_remote_code: bool = False,
        scalar_head: str | None = None,
        allow_pickle: bool = False,
        chat_template: str | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        label: str | int | None = None,
    ) -> ClassifierReward:
        """A reward model from a folder or the hub, loaded at its first use, once per process for equal arguments.

        Args:
            model_id_or_path: Folder or hub id.
            name: For error messages; the path unless given.
            fingerprint: Identity for cache keys; derived from the files and settings unless given.
            revision: Branch, tag or commit of the hub.
            dtype: Of the weights; float32 on a CPU and the checkpoint's elsewhere unless given.
            device: Torch device; "auto" is the first accelerator, else the CPU.
            trust_remote_code: Whether the checkpoint's own Python code may run.
            scalar_head: Name of a linear head (one output, no bias) beside a plain backbone, such as
                "regression_head" for UltraRM and Eurus-RM.
            allow_pickle: Whether ``.bin`` weights may be read (with ``weights_only=True``).
            chat_template: See ``Settings``, also for the arguments below.
            add_bos: Policy for the BOS token.
            add_eos: Policy for the EOS token.
            batch_size: Most texts per forward pass.
            max_length: Most tokens per text.
            label: The label that counts.

        Raises:
            RewardError: On first use, when the model cannot be loaded or used as asked.
        """
        source = Checkpoint(
            path=str(model_id_or_path),
            revision=revision,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            device=str(device),
            trust_remote_code=trust_remote_code,
            scalar_head=scalar_head,
            allow_pickle=allow_pickle,
        )
        settings = Settings(chat_template, add_bos, add_eos, batch_size, max_length, label)
        return _restore(source, settings, name or source.path, fingerprint)

    def _set_up(
        self, source: Checkpoint | LoadedClassifier, settings: Settings, name: str, fingerprint: str | None
    ) -> None:
        self.name = name
        self.settings = settings
        self._source = source
        self._explicit_fingerprint = fingerprint
        self._worker = Workers(1, f"aisp-reward-{name}")
        self._waiting: deque[_Job] = deque()
        self._scorer: Scorer | None = None
        self._scorer_lock = Lock()
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments of ``from_pretrained``; the copy loads at its first use."""
        if isinstance(self._source, LoadedClassifier):
            raise TypeError(
                f"Reward {self.name!r} holds a model in memory and cannot be pickled; "
                "make it with ClassifierReward.from_pretrained(path) instead"
            )
        return _restore, (self._source, self.settings, self.name, self._explicit_fingerprint)

    def __copy__(self) -> ClassifierReward:
        """The same object: its settings are never edited."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassifierReward:
        """The same object: its settings are never edited."""
        return self

    @cached_property
    def fingerprint(self) -> str:
        """The explicit one, else a hash of settings and files (their sizes and times, or the hub's commit)."""
        if self._explicit_fingerprint is not None:
            return self._explicit_fingerprint
        if isinstance(self._source, LoadedClassifier):
            return f"process-{uuid.uuid4().hex}"
        settings = replace(self.settings, batch_size=1)  # no score depends on it
        return digest("classifier", repr(self._source), self._source.stamp(), repr(settings))

    def load(self) -> None:
        """Load the model now rather than at the first use.

        Raises:
            RewardError: When it cannot be loaded or used as asked.
        """
        self._ready()

    def close(self) -> None:
        """Fail what is waiting and let go of a loaded checkpoint; memory is freed when no other reward shares it."""
        self._closed = True
        for job in self._take_jobs():
            fail(job.future, self._closed_error())
        with self._scorer_lock:
            self._scorer = None

    def submit(
        self, pairs: Sequence[tuple[Chat, Response]], *, loop: AbstractEventLoop | None = None
    ) -> Ticket[Tensor]:
        """Queue pairs for the model's thread.

        Args:
            pairs: Conversations and candidates; only the text of a candidate is read.
            loop: Not needed, nothing here is awaited.

        Returns:
            A ticket for [len(pairs)] float32. Its errors are ``RewardError``.
        """
        job = _Job(list(pairs))
        if self._closed:
            fail(job.future, self._closed_error())
        else:
            self._waiting.append(job)
            self._worker.start(self._work)
        return Ticket(job.future)

    def _work(self) -> None:
        """Score everything that waits; later calls of this may find nothing left."""
        if jobs := self._take_jobs():
            try:
                self._score(jobs)
            except BaseException as error:  # the thread must live on, and nobody may wait for ever
                for job in jobs:
                    fail(job.future, self._wrapped(error, "failed", _REMEDY_FOR_SCORING))

    def _take_jobs(self) -> list[_Job]:
        """All waiting jobs; another thread may take some of them at the same time."""
        jobs = []
        while self._waiting:
            try:
                jobs.append(self._waiting.popleft())
            except IndexError:
                break
        return jobs

    def _score(self, jobs: Sequence[_Job]) -> None:
        scorer = self._ready()
        rows = [row for job in jobs for row in self._encoded(job, scorer.encoder)]
        rows.sort(key=lambda row: len(row.ids), reverse=True)  # what does not fit into memory fails at once
        self._answer(jobs)
        for crowd in _by_conversation(rows) if scorer.can_share else [rows]:
            while crowd := [row for row in crowd if not row.job.future.done()]:
                size = scorer.batch_size([len(row.ids) for row in crowd])
                batch, crowd = crowd[:size], crowd[size:]
                for row, score in zip(batch, scorer([row.ids for row in batch]), strict=True):
                    row.job.add(row.index, score)
                self._answer({row.job for row in batch})

    def _answer(self, jobs: Iterable[_Job]) -> None:
        """Complete the jobs of which nothing is missing any more: nobody waits for another request's batches."""
        for job in jobs:
            if job.missing == 0:
                settle(job.future, partial(check_scores, self.name, job.scores, job.texts))

    def _encoded(self, job: _Job, encoder: ConversationEncoder) -> list[_Row]:
        """The job's rows, or none and a failed job."""
        rows = []
        for index, (chat, response) in enumerate(job.pairs):
            if job.future.done():
                return []
            try:
                rows.append(_Row(encoder.encode(chat, response.text), job, index))
            except Exception as error:
                remedy = "Check that its chat template accepts this conversation."
                fail(job.future, self._wrapped(error, "could not read the conversation", remedy, response.text))
                return []
        return rows

    def _ready(self) -> Scorer:
        """The loaded model with its encoder."""
        with self._scorer_lock:
            if self._closed:
                raise self._closed_error()
            if self._scorer is None:
                try:
                    loaded = self._source.load() if isinstance(self._source, Checkpoint) else self._source
                    self._scorer = Scorer(loaded, self.settings)
                except Exception as error:
                    raise self._wrapped(error, "could not be loaded", _REMEDY_FOR_LOADING) from error
            return self._scorer

    def _closed_error(self) -> RewardError:
        return RewardError(self.name, "is closed", "Make a new one, or close it after the last request.")

    def _wrapped(self, error: BaseException, problem: str, remedy: str, response: str | None = None) -> RewardError:
        """The error as a RewardError that names its cause; ValueErrors of this package bring their own remedy."""
        if isinstance(error, RewardError):
            return error
        wrapped = RewardError(self.name, f"{problem}: {str(error).rstrip('.')}", remedy, response)
        wrapped.__cause__ = error
        return wrapped


def _by_conversation(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows of one conversation together, so that its tokens are read once; conversations with few rows mixed."""
    crowds: defaultdict[int, list[_Row]] = defaultdict(list)
    for row in rows:
        crowds[id(row.chat)].append(row)
    mixed = [row for row in rows if len(crowds[id(row.chat)]) < _CROWD]
    return [*(crowd for crowd in crowds.values() if len(crowd) >= _CROWD), mixed]


_CROWD = 8  # candidates of one conversation that are worth a batch of their own
_REMEDY_FOR_SCORING = "The traceback above shows where; if memory ran out, lower batch_size or max_length."
_REMEDY_FOR_LOADING = (
    "Check path and arguments; only safetensors are read unless allow_pickle=True, and custom code only with "
    "trust_remote_code=True."
)


def _restore(source: Checkpoint, settings: Settings, name: str, fingerprint: str | None) -> ClassifierReward:
    """A reward from a checkpoint; also what a pickle calls."""
    reward = ClassifierReward.__new__(ClassifierReward)
    reward._set_up(source, settings, name, fingerprint)
    return reward


@dataclass(eq=False)
class _Job:
    """Pairs of one request and where their scores go."""

    pairs: list[tuple[Chat, Response]]
    future: Future[Tensor] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.texts = [response.text for _, response in self.pairs]
        self.scores = [float("nan")] * len(self.pairs)
        self.missing = len(self.pairs)

    def add(self, index: int, score: float) -> None:
        """Note the score of one pair."""
        self.scores[index] = score
        self.missing -= 1


@dataclass(frozen=True, eq=False)
class _Row:
    """One text of a job."""

    ids: list[int]
    job: _Job
    index: int

    @property
    def chat(self) -> Chat:
        """The conversation, the same object for all candidates of a request."""
        return self.job.pairs[self.index][0]
