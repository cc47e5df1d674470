"""A reward model behind HTTP: vLLM, text-embeddings-inference, or anything that speaks like one of them."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import chain, groupby
from random import Random
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

import torch
from torch import Tensor

from langchain_aisp.futures import gather
from langchain_aisp.rewards.asking import Settled
from langchain_aisp.rewards.base import RewardError, check_scores, shorten
from langchain_aisp.rewards.conversation import with_answer
from langchain_aisp.rewards.fingerprint import stable_fingerprint
from langchain_aisp.rewards.foreign import last_user_text, settled_fingerprint, without_control_tokens
from langchain_aisp.rewards.threads import background_loop
from langchain_aisp.types import Chat, Response, Ticket, require

if TYPE_CHECKING:
    import httpx

Api: TypeAlias = Literal["vllm-classify", "vllm-score", "tei-predict", "tei-rerank"]
Pair: TypeAlias = tuple[Chat, Response]


@dataclass(frozen=True, eq=False)
class RemoteReward(Settled):
    """Scores candidates with a reward model that a server runs.

    ====================  ================================================================================
    ``api``               What is sent, and what it is for
    ====================  ================================================================================
    ``"vllm-classify"``   ``POST /classify``: the conversation with the answer as ``messages``, which the server
                          renders with the model's own chat template, one candidate per request; with ``render``
                          as texts, many per request. For reward models and classifiers.
    ``"vllm-score"``      ``POST /score``: ``queries`` and ``documents``, pairwise. For cross-encoders.
    ``"tei-predict"``     ``POST /predict``: pairs of question and answer; with ``render`` single texts. For reward
                          models and classifiers.
    ``"tei-rerank"``      ``POST /rerank``: one question and its answers. For cross-encoders.
    ====================  ================================================================================

    The formats are those of vLLM's documentation of its pooling models (0.15 and later; earlier servers do not know
    ``use_activation`` and answer probabilities) and of the OpenAPI description of text-embeddings-inference 1.7. Raw
    scores are asked for, without a sigmoid, so that good candidates do not all score 1. Of a model with several
    labels the reward is the log-probability of ``label``.

    Control tokens of the usual chat templates are split in all texts, so that a candidate cannot forge a turn. A
    server that uses others is not protected from them.

    Attributes:
        url: Address of the server; the api's path is added unless the address ends with it.
        api: What the server speaks.
        model: Name of the model, for vLLM.
        label: With several labels the one that counts: its index for vLLM, its name for text-embeddings-inference.
        query: Finds the question in a conversation, for the apis that compare it with the answer.
        render: Makes the text that the model was trained on out of a conversation and an answer; see above.
        headers: Sent with every request, such as ``{"Authorization": "Bearer …"}``. They are part of a pickle.
        batch_size: Most candidates per request.
        max_concurrency: Most requests at the same time.
        timeout: Most seconds for one request; None sets no limit.
        retries: Further tries after a failed connection, a timeout, or a status 408, 425, 429, 500, 502, 503 or 504.
        backoff_seconds: Wait before the first retry, doubled for each further one, times a random factor from 0.5
            to 1.5; a server's ``Retry-After`` is waited for if it is longer.
        longest_wait_seconds: No wait is longer; a server that asks for more is an error.
        seed: Of the random factors.
        name: For error messages.
        fingerprint: Identity for cache keys. Unless given, a hash of address and settings, or one of this process if
            a function has no stable description; pass one that changes when the server's model does.
    """

    url: str
    api: Api = "vllm-classify"
    _: KW_ONLY
    model: str | None = None
    label: int | str | None = None
    query: Callable[[Chat], str] = last_user_text
    render: Callable[[Chat, str], str] | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    batch_size: int = 32
    max_concurrency: int = 8
    timeout: float | None = 60.0
    retries: int = 4
    backoff_seconds: float = 0.5
    longest_wait_seconds: float = 60.0
    seed: int = 0
    name: str = "remote"
    fingerprint: str = ""
    _line: _Line = field(init=False, repr=False)
    _random: Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Reject what could only fail later, in the middle of a search."""
        require(self.api in get_args(Api), f"api is one of {get_args(Api)}, got {self.api!r}")
        known = urlsplit(self.url).scheme in ("http", "https")
        require(known, f"url must begin with http:// or https://, got {self.url!r}")
        indices = self.api.startswith("vllm")
        fits = self.label is None or isinstance(self.label, int if indices else str)
        require(fits, f"label must be {'an index' if indices else 'a name'} with {self.api}, got {self.label!r}")
        require(self.model is None or indices, f"{self.api} serves one model, got model={self.model!r}; leave it out")
        takes_texts = self.render is None or self.api in ("vllm-classify", "tei-predict")
        require(takes_texts, f"{self.api} compares a question and an answer and takes no render; see query")
        for setting in ("batch_size", "max_concurrency"):
            require(getattr(self, setting) >= 1, f"{setting} must be at least 1, got {getattr(self, setting)}")
        for setting in ("retries", "backoff_seconds", "longest_wait_seconds"):
            require(getattr(self, setting) >= 0, f"{setting} must not be negative, got {getattr(self, setting)}")
        require(self.timeout is None or self.timeout > 0, f"timeout must be positive or None, got {self.timeout}")
        object.__setattr__(self, "_line", _Line(self.headers, self.max_concurrency))
        object.__setattr__(self, "_random", Random(self.seed))
        object.__setattr__(self, "fingerprint", self.fingerprint or self._derived_fingerprint())

    @property
    def waits(self) -> bool:
        """It waits for its server: rows are scored as soon as they end."""
        return True

    @property
    def address(self) -> str:
        """Where requests go."""
        path, address = _APIS[self.api].path, self.url.rstrip("/")
        return address if address.endswith(path) else address + path

    def submit(self, pairs: Sequence[Pair], *, loop: AbstractEventLoop | None = None) -> Ticket[Tensor]:
        """Start the requests, on the package's own event loop.

        Args:
            pairs: Conversations and candidates; only the text of a candidate is sent.
            loop: Not needed: one loop keeps the connections of all callers, and no caller's loop waits.

        Returns:
            A ticket for [len(pairs)] float32. Its errors are ``RewardError``.
        """
        texts = [response.text for _, response in pairs]
        answers = [
            asyncio.run_coroutine_threadsafe(self._scores(batch), background_loop()) for batch in self._batches(pairs)
        ]
        return gather(answers, lambda batches: check_scores(self.name, [*chain.from_iterable(batches)], texts))

    def question(self, chat: Chat) -> str:
        """What the server is told that the answer is to."""
        return without_control_tokens(self.query(chat))

    def rendered(self, pairs: Sequence[Pair]) -> list[str]:
        """The texts that ``render`` makes; only what it adds itself may hold control tokens."""
        assert self.render is not None
        return [self.render([_cleaned(message) for message in chat], _said(response)) for chat, response in pairs]

    def _batches(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """The pairs in their order, as many per request as the api takes."""
        size = 1 if self.api == "vllm-classify" and self.render is None else self.batch_size
        alike = groupby(pairs, lambda pair: self.query(pair[0]) if self.api == "tei-rerank" else None)
        groups = [list(group) for _, group in alike]
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    async def _scores(self, batch: Sequence[Pair]) -> list[Any]:
        """What the server answers for a batch; what it answers is checked later, how much and where is checked here."""
        api = _APIS[self.api]
        answer = await self._post({**api.body(self, batch), **({"model": self.model} if self.model else {})}, batch)
        try:
            return api.read(answer, len(batch), self.label)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            problem = f"got an answer from {self.address} that it cannot read, {told} in {shorten(repr(answer))}"
            raise self._error(problem, _REMEDY_FOR_ANSWER, batch) from error

    async def _post(self, body: Mapping[str, Any], batch: Sequence[Pair]) -> Any:
        """The server's JSON; asks again while that makes sense."""
        for attempt in range(self.retries + 1):
            try:
                return await self._line.post(self.address, body, self.timeout)
            except _Failure as failure:
                wait = max(self._backoff(attempt), failure.retry_after)
                too_long = wait > self.longest_wait_seconds
                if attempt == self.retries or too_long or not failure.passes:
                    tries = f", in {attempt + 1} tries" if attempt else ""
                    asks = f", and asks to wait {wait:.0f} seconds" if too_long and failure.passes else ""
                    raise self._error(f"{failure.problem}{tries}{asks}", failure.remedy, batch) from failure
            await asyncio.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _backoff(self, attempt: int) -> float:
        """Seconds before the next try: doubled each time, and scattered, so that many callers do not come together."""
        doubled: float = self.backoff_seconds * 2**attempt
        return min(doubled * self._random.uniform(0.5, 1.5), self.longest_wait_seconds)

    def _error(self, problem: str, remedy: str, batch: Sequence[Pair]) -> RewardError:
        return RewardError(self.name, problem, remedy, batch[0][1].text)

    def _derived_fingerprint(self) -> str:
        settings = repr((self.address, self.api, self.model, self.label))
        functions: list[Callable[..., Any]] = [self.query] if self.render is None else [self.query, self.render]
        return settled_fingerprint("remote", settings, *map(_described, functions))


@dataclass(frozen=True)
class _Speech:
    """How one kind of server is spoken to: path, request for a batch, scores in the answer."""

    path: str
    body: Callable[[RemoteReward, Sequence[Pair]], dict[str, Any]]
    read: Callable[[Any, int, Any], list[Any]]


def _classify_body(reward: RemoteReward, batch: Sequence[Pair]) -> dict[str, Any]:
    if reward.render is not None:
        return {"input": reward.rendered(batch), "use_activation": False}
    [(chat, response)] = batch
    messages = with_answer(chat, response.text)
    return {"messages": [_cleaned(message) for message in messages], "use_activation": False}


def _score_body(reward: RemoteReward, batch: Sequence[Pair]) -> dict[str, Any]:
    questions, answers = [reward.question(chat) for chat, _ in batch], [_said(response) for _, response in batch]
    return {"queries": questions, "documents": answers, "use_activation": False}


def _predict_body(reward: RemoteReward, batch: Sequence[Pair]) -> dict[str, Any]:
    if reward.render is not None:
        return {"inputs": [[text] for text in reward.rendered(batch)], "raw_scores": True}
    return {"inputs": [[reward.question(chat), _said(response)] for chat, response in batch], "raw_scores": True}


def _rerank_body(reward: RemoteReward, batch: Sequence[Pair]) -> dict[str, Any]:
    return {"query": reward.question(batch[0][0]), "texts": [_said(answer) for _, answer in batch], "raw_scores": True}


def _read_classify(answer: Any, count: int, label: int | None) -> list[Any]:
    items = _in_order(answer["data"], count)
    return [_of_label(dict(enumerate(item["probs"])), label) for item in items]


def _read_score(answer: Any, count: int, label: int | None) -> list[Any]:
    return [item["score"] for item in _in_order(answer["data"], count)]


def _read_predict(answer: Any, count: int, label: str | None) -> list[Any]:
    if len(answer) != count:
        raise ValueError(f"{len(answer)} scores for {count} candidates")
    return [_of_label({item["label"]: item["score"] for item in items}, label) for items in answer]


def _read_rerank(answer: Any, count: int, label: str | None) -> list[Any]:
    return [item["score"] for item in _in_order(answer, count)]


def _in_order(items: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The items by their index, of which each must be there once."""
    places = {item["index"]: item for item in items}
    if len(items) != count or set(places) != set(range(count)):
        raise ValueError(f"{len(items)} scores, at {sorted(places)}, for {count} candidates")
    return [places[place] for place in range(count)]


def _of_label(scores: Mapping[Any, float], label: int | str | None) -> float:
    """The score of a model with one label; with several, the log-probability of the one that counts."""
    if label is None and len(scores) == 1:
        return next(iter(scores.values()))
    if label not in scores:
        raise ValueError(f"label {label!r} is not one of {list(scores)}")
    if len(scores) == 1:
        return scores[label]
    logits = torch.tensor(list(scores.values()), dtype=torch.float64)
    return float(logits.log_softmax(dim=0)[list(scores).index(label)])


_APIS: dict[Api, _Speech] = {
    "vllm-classify": _Speech("/classify", _classify_body, _read_classify),
    "vllm-score": _Speech("/score", _score_body, _read_score),
    "tei-predict": _Speech("/predict", _predict_body, _read_predict),
    "tei-rerank": _Speech("/rerank", _rerank_body, _read_rerank),
}


class _Line:
    """The connections to a server, and the gate that bounds how many requests are under way."""

    def __init__(self, headers: Mapping[str, str], most: int) -> None:
        _httpx()  # a missing library is told of at once
        self._headers, self._most = dict(headers), most
        self._opened: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient, asyncio.Semaphore] | None = None

    async def post(self, address: str, body: Mapping[str, Any], timeout: float | None) -> Any:
        """The JSON that the server answers; raises ``_Failure``."""
        client, gate = self._open()
        async with gate:
            try:
                async with asyncio.timeout(timeout):
                    response = await client.post(address, json=body)
            except TimeoutError as error:
                raise _Failure(
                    f"got no answer from {address} within {timeout:g} seconds", _REMEDY_FOR_TIMEOUT
                ) from error
            except _httpx().TransportError as error:
                told = str(error) or type(error).__name__
                raise _Failure(f"could not reach {address}: {told}", _REMEDY_FOR_CONNECTION) from error
        return _json(response)

    def _open(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """Client and gate of the running loop; after a fork the package has a new loop."""
        loop = asyncio.get_running_loop()
        if self._opened is None or self._opened[0] is not loop:
            client = _httpx().AsyncClient(headers=self._headers, timeout=None)
            self._opened = loop, client, asyncio.Semaphore(self._most)
        return self._opened[1:]


class _Failure(Exception):
    """A request that brought no answer: what happened, what to do, whether and when another try may succeed."""

    def __init__(self, problem: str, remedy: str, *, passes: bool = True, retry_after: float = 0.0) -> None:
        super().__init__(problem)
        self.problem, self.remedy, self.passes, self.retry_after = problem, remedy, passes, retry_after


def _httpx() -> ModuleType:
    try:
        import httpx
    except ImportError as error:
        raise ImportError("RemoteReward needs httpx: pip install 'langchain-aisp[remote]'") from error
    return httpx


def _json(response: httpx.Response) -> Any:
    """The JSON of a response; raises ``_Failure`` for another status than 200 or another content."""
    if response.status_code != 200:
        problem = f"got status {response.status_code} from {response.url}: {shorten(response.text)!r}"
        remedy = _REMEDIES.get(response.status_code, _REMEDY_FOR_STATUS)
        passes = response.status_code in _PASSING
        raise _Failure(problem, remedy, passes=passes, retry_after=_retry_after(response.headers))
    try:
        return response.json()
    except ValueError as error:
        problem = f"got an answer from {response.url} that is no JSON: {shorten(response.text)!r}"
        raise _Failure(problem, "Check url: another program may listen there.", passes=False) from error


def _retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float:
    """Seconds that a server asks to wait, as a number or as a date (RFC 9110, 10.2.3); 0 for none."""
    asked = headers.get("retry-after", "")
    if asked.strip().isdecimal():
        return float(asked)
    try:
        until = parsedate_to_datetime(asked)
    except ValueError:
        return 0.0
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds())


def _cleaned(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without control tokens in its text, whether that is a string or blocks."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": without_control_tokens(content)}
    blocks = [
        {**block, "text": without_control_tokens(block["text"])} if block.get("type") == "text" else block
        for block in content or ()
    ]
    return {**message, "content": blocks} if blocks else dict(message)


def _said(response: Response) -> str:
    return without_control_tokens(response.text)


def _described(function: Callable[..., Any]) -> str | None:
    return "last user text" if function is last_user_text else stable_fingerprint(function)


_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REMEDY_FOR_ANSWER = "Check url and api; for a model with several labels, pass the label that counts."
_REMEDY_FOR_TIMEOUT = "Raise timeout, or lower batch_size and max_concurrency."
_REMEDY_FOR_CONNECTION = "Check that the server runs and that url is its address."
_REMEDY_FOR_STATUS = "The server's log may say more."
_REMEDY_FOR_LOAD = "Wait until the server is free, lower max_concurrency, or raise retries."
_REMEDIES = {
    400: "The server's words say what it did not like; a text may be too long for its model.",
    401: "Pass headers={'Authorization': 'Bearer …'} with a key that the server accepts.",
    403: "Pass headers={'Authorization': 'Bearer …'} with a key that the server accepts.",
    404: "Check url, api and model: the server does not know one of them.",
    413: "Lower batch_size.",
    422: "The server's words say what it did not like; a text may be too long for its model.",
    424: "The server's model is of another kind; try another api.",
    429: _REMEDY_FOR_LOAD,
    503: _REMEDY_FOR_LOAD,
}
