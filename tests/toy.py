"""A toy world with known answers: an engine in a page of plain torch, and rewards whose best text is known.

The engine honours the semantics of ``langchain_aisp.types`` to the letter, so whatever a method gets wrong about waves
and rollouts shows here. Values that the contract leaves undefined are NaN or -1, so that nobody reads them unnoticed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from langchain_aisp.align import Aligned, Budget, Check, Score, search
from langchain_aisp.noise import fold, normal, request_key, uniform
from langchain_aisp.sampling import draw
from langchain_aisp.types import (
    Chat,
    Ended,
    Head,
    Method,
    Problem,
    Prompt,
    Response,
    Rollouts,
    Sampling,
    Ticket,
    Wave,
)

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
END = 0
"""The end token; token i > 0 is the letter ``ALPHABET[i - 1]``."""

NO_LIMIT = Budget()
CHAT: Chat = [{"role": "user", "content": "Say something."}]


@dataclass
class ToyEngine:
    """A language model whose pre-logits are a hash, and so known exactly.

    Attributes:
        letters: Letters it can say; with the end token, V = letters + 1.
        width: D.
        scale: Standard deviation of each pre-logit; 0 makes every letter follow the head's bias alone.
        remembers: Whether the pre-logits depend on all tokens before a position, or on the position alone.
        end_bias: Added to the end token's logit.
        alternatives: K.
        threaded: Decode on a thread instead of inside ``submit``.
        clock: What a deadline is compared with before every step.
        waves: Every wave submitted so far.
        deadlines: Their deadlines.
    """

    letters: int = 9
    width: int = 8
    scale: float = 1.0
    remembers: bool = True
    end_bias: float = 0.0
    alternatives: int = 4
    threaded: bool = False
    clock: Callable[[], float] = time.monotonic
    waves: list[Wave] = field(default_factory=list)
    deadlines: list[float | None] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "toy"

    @cached_property
    def weight(self) -> Tensor:
        """The head, [V, D]."""
        return normal(fold(7, torch.arange(self.letters + 1)), self.width)

    @property
    def head(self) -> Head:
        centred = self.weight - self.weight.mean(dim=0)
        return Head(self.width, float(centred.square().sum(dim=1).mean().sqrt()), len(centred))

    def encode(self, chat: Chat, *, tools: Any = (), seed: int = 0, continue_last: bool = False) -> Prompt:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in chat)
        ids = tuple(ord(letter) for letter in text) + (() if continue_last else (ord("\n"),))
        return Prompt(chat, ids, request_key(seed, ids))

    def submit(self, wave: Wave, *, deadline: float | None = None, ended: Ended | None = None) -> Ticket[Rollouts]:
        self.waves.append(wave)
        self.deadlines.append(deadline)
        future: Future[Rollouts] = Future()
        cancelled = threading.Event()
        work = partial(fulfil, future, partial(self._told, wave, deadline, cancelled, ended))
        if self.threaded:
            threading.Thread(target=work, daemon=True).start()
        else:
            work()
        return Ticket(future, cancelled.set)

    def _told(self, wave: Wave, deadline: float | None, cancelled: threading.Event, ended: Ended | None) -> Rollouts:
        """Decode, and tell of all rows when the last one has ended."""
        rollouts = self.decode(wave, deadline, cancelled)
        if ended is not None:
            ended(rollouts.responses)
        return rollouts

    def decode(self, wave: Wave, deadline: float | None = None, cancelled: threading.Event | None = None) -> Rollouts:
        """Decode every row, each from its own cut, one token per step."""
        rows_of_wave, most = wave.keys.shape
        tokens = torch.where(torch.arange(most) < wave.cut.unsqueeze(1), wave.prefix, -1)
        lengths = wave.cut.clone()
        limits = ((wave.prefix >= 0).sum(dim=1) if wave.forced else torch.full_like(lengths, most)).tolist()
        reasons = [
            self.reason(row[:length].tolist(), wave, limit)
            for row, length, limit in zip(tokens, lengths, limits, strict=True)
        ]
        observed = self.blank(wave)
        enough = rows_of_wave if wave.enough is None else wave.enough
        warm = torch.full((rows_of_wave,), wave.sampling.temperature)
        temperatures = warm if wave.temperatures is None else wave.temperatures
        said = 0
        while None in reasons and (rows_of_wave - reasons.count(None) < enough or enough == said == 0):
            said += 1
            if cancelled is not None and cancelled.is_set():
                raise CancelledError
            if deadline is not None and self.clock() >= deadline:
                reasons = [reason or "timeout" for reason in reasons]
                break
            rows = torch.tensor([row for row in range(rows_of_wave) if reasons[row] is None])
            positions = lengths[rows]
            keys = wave.keys[rows, positions]
            hidden = self.prelogits(wave.prompt, tokens[rows], positions)
            steered = hidden
            if wave.steering is not None:
                seen = None if wave.steering.open_loop else hidden
                steered = hidden + wave.steering.offset(rows, positions, keys, seen)
            drawn = self.draw(self.logits(steered, positions, wave.sampling), keys, temperatures[rows], wave.sampling)
            if wave.forced:
                drawn = wave.prefix[rows, positions]
            self.observe(observed, rows, positions, hidden, self.logits(hidden, positions, wave.sampling), drawn)
            tokens[rows, positions] = drawn
            lengths[rows] += 1
            for row in rows.tolist():
                reasons[row] = self.reason(tokens[row, : lengths[row]].tolist(), wave, limits[row])
        responses = tuple(
            Response(self.text(row[:length].tolist(), wave.sampling.stop), reason)  # type: ignore[arg-type]
            for row, length, reason in zip(tokens, lengths, reasons, strict=True)
            if reason is not None
        )
        unfinished = torch.tensor([reason is None for reason in reasons]) if None in reasons else None
        return Rollouts(tokens, lengths, responses, int((lengths - wave.cut).sum()), observed, unfinished)

    def prelogits(self, prompt: Prompt, tokens: Tensor, positions: Tensor) -> Tensor:
        """Pre-logits [r, D] at the positions [r] that the tokens [r, L] are about to fill."""
        history = torch.full_like(positions, request_key(0, prompt.ids))
        if not self.remembers:
            return self.scale * normal(fold(history, positions), self.width)
        for position in range(int(positions.max())):
            history = torch.where(position < positions, fold(history, tokens[:, position]), history)
        return self.scale * normal(history, self.width)

    def logits(self, prelogits: Tensor, positions: Tensor, sampling: Sampling) -> Tensor:
        """Logits [r, V] with the end token forbidden where it is too early; bit-equal in any batch."""
        logits = (prelogits.unsqueeze(1) * self.weight).sum(dim=-1)
        logits[:, END] += self.end_bias
        logits[positions < sampling.min_tokens, END] = -torch.inf
        return logits

    def draw(self, logits: Tensor, keys: Tensor, temperature: Tensor, sampling: Sampling) -> Tensor:
        """One token [r] per row."""
        rows = len(logits)
        top_p = torch.full((rows,), sampling.top_p)
        return draw(logits, uniform(keys), temperature, top_p, torch.full((rows,), sampling.top_k))

    def blank(self, wave: Wave) -> dict[str, Tensor]:
        """What the wave asked to observe, before anything is decoded."""
        rows, most = wave.keys.shape
        blanks = {
            "base_logprobs": torch.full((rows, most), torch.nan),
            "alternatives": torch.full((rows, most, self.alternatives), -1),
            "alternative_logprobs": torch.full((rows, most, self.alternatives), torch.nan),
            "scores": torch.full((rows, most, self.width), torch.nan),
            "prelogits": torch.full((rows, most, self.width), torch.nan),
        }
        asked = set(wave.observe) | ({"alternative_logprobs"} if "alternatives" in wave.observe else set())
        return {name: blank for name, blank in blanks.items() if name in asked}

    def observe(
        self,
        observed: dict[str, Tensor],
        rows: Tensor,
        positions: Tensor,
        hidden: Tensor,
        logits: Tensor,
        drawn: Tensor,
    ) -> None:
        """Fill in what was asked for at the positions just decoded, from what is unsteered: [r, D] and [r, V]."""
        logprobs = logits.log_softmax(dim=-1)
        best = logprobs.topk(self.alternatives, dim=-1)
        seen = {
            "base_logprobs": logprobs.gather(1, drawn.unsqueeze(1)).squeeze(1),
            "alternatives": best.indices,
            "alternative_logprobs": best.values,
            "scores": self.weight[drawn] - logprobs.exp() @ self.weight,
            "prelogits": hidden,
        }
        for name, tensor in observed.items():
            tensor[rows, positions] = seen[name]

    def reason(self, tokens: Sequence[int], wave: Wave, limit: int) -> str | None:
        """Why a row that may have ``limit`` tokens ends after these; None while it goes on."""
        text = self.text(tokens, ())
        if (tokens and tokens[-1] == END) or any(stop in text for stop in wave.sampling.stop):
            return "stop"
        return "length" if len(tokens) == limit else None

    def text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The letters of the tokens, up to the first stop string."""
        text = "".join(ALPHABET[token - 1] for token in tokens if token != END)
        return text[: min((text.index(word) for word in stop if word in text), default=len(text))]


@dataclass
class ToyReward:
    """A reward given by a function of the response; it remembers what it was asked.

    Attributes:
        score: The reward of a response.
        scored: Every response scored so far.
        loops: The event loop given with each request.
    """

    score: Callable[[Response], float]
    scored: list[Response] = field(default_factory=list)
    loops: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "toy"

    @property
    def fingerprint(self) -> str:
        return "toy"

    def submit(self, pairs: Sequence[tuple[Chat, Response]], *, loop: Any = None) -> Ticket[Tensor]:
        self.loops.append(loop)
        self.scored += [response for _, response in pairs]
        future: Future[Tensor] = Future()
        fulfil(future, lambda: torch.tensor([self.score(response) for _, response in pairs], dtype=torch.float32))
        return Ticket(future)


def fulfil(future: Future[Any], work: Callable[[], Any]) -> None:
    """Put the outcome of some work into a future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def spells(word: str) -> Callable[[Response], float]:
    """Counts the positions at which a text has the word's letter: at most ``len(word)``, reached by the word."""
    return lambda response: float(sum(a == b for a, b in zip(response.text, word, strict=False)))


def counts(letter: str) -> Callable[[Response], float]:
    """Counts a letter."""
    return lambda response: float(response.text.count(letter))


def problem(engine: ToyEngine, sampling: Sampling, seed: int = 0) -> Problem:
    """The toy chat as a problem."""
    return Problem(engine.encode(CHAT, seed=seed), sampling, engine.head)


def play(
    method: Method[Any],
    engine: ToyEngine,
    score: Callable[[Response], float],
    sampling: Sampling,
    *,
    seed: int = 0,
    budget: Budget = NO_LIMIT,
    partial: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Any, Any]]:
    """Drive a search by hand: yields each of its requests with the answer given; the last is ``(Aligned, None)``."""
    steps = search(method, problem(engine, sampling, seed), budget, partial=partial, whole=partial, clock=clock)
    answer: Any = None
    try:
        while True:
            request = steps.send(answer)
            answer = None
            if isinstance(request, Wave):
                answer = engine.decode(request)
            elif isinstance(request, Check):
                answer = engine.decode(request.wave)
            elif isinstance(request, Score):
                answer = torch.tensor([score(response) for _, response in request.pairs])
            yield request, answer
    except StopIteration as end:
        yield end.value, None


def outcome(played: Iterator[tuple[Any, Any]]) -> Aligned:
    """How a played search ended."""
    *_, (aligned, _) = played
    assert isinstance(aligned, Aligned)
    return aligned


def waves_of(method: Method[Any], **settings: Any) -> list[tuple[Wave, Rollouts]]:
    """A whole search for "badge" in ten letters, as its waves and what was decoded for them."""
    played = play(method, ToyEngine(), spells("badge"), Sampling(max_tokens=10), **settings)
    return [(request, answer) for request, answer in played if isinstance(request, Wave)]
