"""The LangChain chat model: it turns a call into a request, a search's outcome into a message, and nothing else.

Every way of calling it, invoke, batch, stream and their asynchronous twins, runs through ``_steps`` or ``_asteps``.
"""

from __future__ import annotations

import difflib
import secrets
import threading
import uuid
import warnings
import weakref
from asyncio import to_thread
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import AliasChoices, ConfigDict, Field, SecretStr, field_validator, model_validator

from langchain_aisp.align import Budget, Iteration
from langchain_aisp.calling import (
    CALL_OPTIONS,
    StructuredMethod,
    format_tools,
    plan,
    structured,
)
from langchain_aisp.committing import Block
from langchain_aisp.demo import LANGUAGE_MODEL_PATH, REWARD_MODEL_PATH
from langchain_aisp.logprobs import MOST_ALTERNATIVES, Logprobs
from langchain_aisp.messages import to_chat
from langchain_aisp.methods import AISP
from langchain_aisp.profile import ABILITIES, ResolvedProfile, context_length
from langchain_aisp.progress import areport, report
from langchain_aisp.request import Outcome, Request, chunk, result
from langchain_aisp.rewards import ClassifierReward, as_reward
from langchain_aisp.types import ContextLengthError, Engine, Reward, Sampling, require

if TYPE_CHECKING:
    from langchain_aisp.engine import TransformersEngine

DEMO = "demo"

PER_CALL = frozenset(
    """budget commit_every grounded_answers grounded_arguments kl_budget logprobs max_tokens method min_base_logprob
    model n reward seed temperature timeout top_k top_logprobs top_p""".split()
)
"""Fields that ``invoke`` and its siblings accept for one call, besides ``stop``."""

_LANGCHAINS_OWN = frozenset(("stream", "ls_structured_output_format", "structured_output_format"))
"""Arguments by which LangChain speaks to itself."""


class AISPChatModel(BaseChatModel):
    """A chat model that searches for the answer its reward likes best, by importance sampling on pre-logits.

    Weights are loaded at the first call, once per process: copies, pickles and ``configurable_fields`` share them.
    The same request with the same seed gives the same answer, alone or among others. ``response_metadata`` of an
    answer tells its reward, what the search cost, why it stopped and, as ``trace``, what each iteration brought.
    ``usage_metadata`` counts the prompt and the returned answer alone.

    A stream cannot show an answer before the search has chosen it: it brings one empty chunk per iteration, with its
    line of the trace, and then the answer. The same lines, with the best text so far, go out as custom events
    ``aisp_iteration`` to callbacks and to LangGraph's ``stream_mode="custom"``.

    With ``logprobs=True``, ``response_metadata["logprobs"]["content"]`` lists ``token``, ``bytes``, ``logprob`` and
    ``top_logprobs`` of each token of the answer, as in ``ChatOpenAI``; thoughts, calls and their marks are among them.
    The log-probabilities are those of the model by itself: without perturbation, before any grammar, ``top_p`` and
    ``top_k``, at temperature 1. They cost one pass over the answer and about √T steps for its T tokens, after the
    search, which pays nothing; ``seconds`` and ``timeout`` do not count them.

    With ``min_base_logprob`` the answer is one that the model by itself finds likely enough; where none was found, it
    is the likeliest, and ``stopped`` is "infeasible". ``response_metadata["base_logprob"]`` tells how likely it is;
    with ``kl_budget``, ``response_metadata["kl"]`` tells how far it was steered.

    ``invoke`` and its siblings take ``stop``, ``model``, ``reward``, ``method``, ``budget``, ``kl_budget``,
    ``min_base_logprob``, ``max_tokens``, ``temperature``, ``top_p``, ``top_k``, ``seed``, ``timeout``, ``logprobs``,
    ``top_logprobs``, ``grounded_arguments`` and ``grounded_answers`` for a single call.

    Example:
        ```python
        from langchain_aisp import AISP, AISPChatModel

        chat = AISPChatModel(model="demo", method=AISP(samples=128), max_tokens=64)
        message = chat.invoke("My parcel is late")
        print(message.content, message.response_metadata["reward"])
        ```
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(default=None, validation_alias=AliasChoices("model", "model_name"))
    """Hub id or path of a causal language model, or "demo" for the small one that comes with the package."""

    engine: Any = Field(default=None, exclude=True)
    """A live engine instead of ``model``; such a chat model can be copied but not pickled."""

    reward: Any = None
    """What is maximised: a reward, or a function ``(chat, responses) -> scores``. Only "demo" brings its own."""

    method: Any = Field(default_factory=AISP)
    """The search, with its own settings: ``AISP(...)``, ``BestOfN(...)`` or another method."""

    budget: Budget = Budget()
    """What one answer may cost, whatever the method plans, and how far it may part from the model."""

    kl_budget: float | None = None
    """Nats by which steering may part an answer from the model; the tighter of this and the budget's holds."""

    min_base_logprob: float | None = None
    """Log-probability in nats, a sum over all tokens, that the model by itself must give an answer, at most 0; the
    tighter of this and the budget's holds. See ``Budget``."""

    max_tokens: int = 256
    """Longest answer, in tokens."""

    temperature: float = 1.0
    """Sampling temperature; 0 takes the likeliest token, so that plain samples are all the same."""

    top_p: float = 1.0
    """Share of the probability mass that may be drawn, the likeliest tokens first; 1 keeps every token."""

    top_k: int = 0
    """Likeliest tokens that may be drawn; 0 keeps every token."""

    stop: list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    """Strings that end an answer; they are not part of it."""

    seed: int | None = 0
    """Equal seeds give equal answers; None draws a new seed for every call, which the metadata tell."""

    timeout: float | None = Field(default=None, validation_alias=AliasChoices("timeout", "request_timeout"))
    """Seconds after which the best answer so far is returned; the tighter of this and the budget's holds."""

    commit_every: int | None = None
    """Tokens per block when an answer is committed, and streamed, block by block; None streams it once it is whole.

    The reward must understand unfinished texts, see ``as_reward(..., partial=True)``; there is no promise against plain
    samples, and neither ``response_format``, tools nor ``n`` are possible. ``invoke`` gives the same answer."""

    n: int = 1
    """Generations per call in ``generate``: the answer and the next best distinct responses, as many as were found."""

    logprobs: bool | None = None
    """Whether ``response_metadata`` tells the log-probability of each token of the answer."""

    top_logprobs: int | None = None
    """Likeliest tokens that are told beside each token of the answer, at most 20; needs ``logprobs=True``."""

    grounded_arguments: bool | None = None
    """Whether strings and numbers in calls are taken from the conversation; ``None`` means for ``"demo"`` only."""

    grounded_answers: bool | None = None
    """Whether texts that follow tools' results take names and numbers from the conversation, so that none is invented;
    ``None`` means for ``"demo"`` only.

    Names are words with capitals that do not open a sentence, so this is not for languages that capitalise all nouns.
    """

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    dtype: str | torch.dtype = "auto"
    """Precision of the weights; "auto" is float32 on a CPU and the checkpoint's own elsewhere."""

    device: str = "auto"
    """Where the weights live; "auto" takes a GPU if there is one."""

    quantization: Any = None
    """"int8", "nf4" or a quantization config of transformers; None leaves the weights as they are."""

    adapter: str | dict[str, float] | None = None
    """Path or id of a PEFT adapter, or several with a weight each: ``{path: weight}``."""

    chat_template: str | None = None
    """Jinja template to use instead of the tokenizer's."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    streaming: bool | None = None
    """Whether ``invoke`` goes through ``stream``; the answer is the same."""

    max_retries: int | None = None
    """Accepted because all chat models have it; a local model has nothing to retry."""

    api_key: SecretStr | None = None
    """Accepted because all chat models have it; for gated models set ``HF_TOKEN`` in the environment."""

    @model_validator(mode="before")
    @classmethod
    def _warn_of_unknown_arguments(cls, values: dict[str, Any]) -> dict[str, Any]:
        known = {*cls.model_fields, "model_name", "stop_sequences", "request_timeout"}
        for name in values.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Settings of the search go into method=AISP(...)."
            warnings.warn(f"AISPChatModel has no argument {name!r}; it is ignored. {hint}", stacklevel=2)
        return values

    @model_validator(mode="before")
    @classmethod
    def _look_up_profile_again(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``configurable_fields`` builds a model from the fields of another, whose profile need not fit."""
        return {**values, "profile": None} if isinstance(values.get("profile"), ResolvedProfile) else values

    @field_validator("reward")
    @classmethod
    def _wrap_reward(cls, reward: Any) -> Reward | None:
        """Wrap a function once, so that every call sees one reward with one fingerprint."""
        return None if reward is None else as_reward(reward)

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: Any) -> Any:
        require(
            not isinstance(method, type) and hasattr(method, "propose"),
            f"method must be a method such as AISP(samples=256) or BestOfN(samples=256), got {method!r}",
        )
        return method

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: Any) -> Any:
        require(
            engine is None or (not isinstance(engine, type) and hasattr(engine, "submit")),
            f"engine must be a live engine such as TransformersEngine.from_pretrained(...), got {engine!r}; "
            "the id or path of a model goes into model=",
        )
        return engine

    @model_validator(mode="after")
    def _check_request(self) -> Self:
        require(
            (self.model is None) != (self.engine is None),
            f"Give either model= (a hub id, a path or 'demo') or engine= (a live engine); got model={self.model!r} "
            f"and {'no engine' if self.engine is None else 'an engine'}.",
        )
        require(
            self.reward is not None or self.model == DEMO,
            f"{self.model_name!r} needs a reward to search for: a function such as "
            "reward=lambda chat, responses: [-len(text) for text in responses], or "
            "ClassifierReward.from_pretrained(...). "
            "Only model='demo' has its own.",
        )
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        top = self.top_logprobs or 0
        require(0 <= top <= MOST_ALTERNATIVES, f"top_logprobs must be from 0 to {MOST_ALTERNATIVES}, got {top}")
        require(
            top == 0 or bool(self.logprobs),
            f"top_logprobs={top} needs logprobs=True, got logprobs={self.logprobs}; top_logprobs=0 asks for none",
        )
        _ = self._sampling, self._budget  # they say at once what nobody can follow
        return self

    @property
    def model_name(self) -> str:
        """What the user calls the model."""
        return str(self.engine.name if self.model is None else self.model)

    def bind_tools(
        self,
        tools: Sequence[Any],
        *,
        tool_choice: Any = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools; every call it makes follows the tool's schema.

        A reward that sees texts only cannot judge a call. Then the model's own likeliest answer decides whether this
        turn is a call. For a text the search goes on among texts; a call is the likeliest of some, with its
        log-probability for a reward (``reward_name`` says so). A reward that sees responses judges both:
        ``GroundedCalls``, ``CoveringCalls``, ``CompleteCalls``, and those made by ``as_call_reward(fn)`` and
        ``as_reward(fn, sees="response")``. Where texts have a reward of their own (``text=``), the model decides the
        kind, and the search goes on among that kind.

        Args:
            tools: Functions, Pydantic classes, LangChain tools or schemas; none unbinds nothing and binds nothing.
            tool_choice: "auto" (also None), "none" (also False), "any" or "required" (also True), a tool's name, or a
                dict of the OpenAI or Anthropic API.
            strict: Accepted; calls follow their schema anyway.
            parallel_tool_calls: False allows one call per answer.
            response_format: What an answer that is no call looks like, see ``with_structured_output``.
            kwargs: Further options of a call, such as ``temperature``.
        """
        given = {
            "tool_choice": tool_choice,
            "parallel_tool_calls": parallel_tool_calls,
            "response_format": response_format,
        }
        named = {name: value for name, value in given.items() if value is not None}
        return self.bind(tools=format_tools(tools, strict), **named, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: StructuredMethod = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        tools: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answer in the form of a schema; every candidate of the search follows it, and the best one is returned.

        Args:
            schema: A Pydantic class (version 2 or 1), a TypedDict class or a JSON schema.
            method: "json_schema" writes the object as the answer's text, "function_calling" as a call of a tool of
                that name, "json_mode" as "json_schema", or any JSON object where there is no schema.
            include_raw: Return a dict with ``raw``, ``parsed`` and ``parsing_error`` and do not raise.
            strict: Accepted; answers follow the schema anyway.
            tools: Tools that may be called besides.
            kwargs: Options of a call, such as ``max_tokens``.

        Raises:
            ValueError: A method or schema that cannot be followed.
            OutputParserException: At the call: no response was complete within ``max_tokens``.
        """
        model = cast(BaseChatModel, self._for_one_call(None, kwargs))
        return structured(model, schema, method, include_raw, strict, tools)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(messages, stop, kwargs)
        return result(request, list(self._steps(request, run_manager)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = await to_thread(self._request, messages, stop, kwargs)
        async with aclosing(self._asteps(request, run_manager)) as steps:
            return result(request, [step async for step in steps])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        request = self._request(messages, stop, kwargs)
        with closing(self._steps(request, run_manager)) as steps:
            for step in steps:
                yield chunk(request, step)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[ChatGenerationChunk]:
        request = await to_thread(self._request, messages, stop, kwargs)  # the first one loads the weights
        async with aclosing(self._asteps(request, run_manager)) as steps:
            async for step in steps:
                yield chunk(request, step)

    def _steps(
        self, request: Request, run_manager: CallbackManagerForLLMRun | None
    ) -> Generator[Iteration | Block | Outcome]:
        """The search, each iteration told to whoever listens."""
        with _langchain_errors(), closing(request.iterate()) as steps:
            for step in steps:
                if isinstance(step, Iteration):
                    report(step, run_manager)
                yield step

    async def _asteps(
        self, request: Request, run_manager: AsyncCallbackManagerForLLMRun | None
    ) -> AsyncGenerator[Iteration | Block | Outcome]:
        """``_steps`` for an event loop."""
        with _langchain_errors():
            async with aclosing(request.aiterate()) as steps:
                async for step in steps:
                    if isinstance(step, Iteration):
                        await areport(step, run_manager)
                    yield step

    def _request(self, messages: Sequence[BaseMessage], stop: list[str] | None, options: Mapping[str, Any]) -> Request:
        """What one call asks for; loads the weights if nobody has yet."""
        chat = to_chat(messages)
        model = self._for_one_call(stop, options)
        engine = model._live_engine()
        return Request(
            model_name=model.model_name,
            engine=engine,
            reward=_demo_reward() if model.reward is None else model.reward,
            method=model.method,
            chat=chat,
            speech=plan(
                engine,
                chat,
                {name: options[name] for name in options.keys() & CALL_OPTIONS},
                grounded_arguments=model._takes_arguments,
                grounded_answers=model._takes_answers,
            ),
            sampling=model._sampling,
            seed=secrets.randbits(32) if model.seed is None else model.seed,
            budget=model._budget,
            n=model.n,
            logprobs=Logprobs.of(engine, model.top_logprobs or 0) if model.logprobs else None,
            commit_every=model.commit_every,
        )

    def _for_one_call(self, stop: list[str] | None, options: Mapping[str, Any]) -> Self:
        """This model with the options of one call, which are checked like those of the constructor."""
        options = {name: value for name, value in options.items() if name not in _LANGCHAINS_OWN | CALL_OPTIONS}
        if unknown := sorted(options.keys() - PER_CALL):
            possible = ", ".join(sorted(PER_CALL | CALL_OPTIONS | {"stop"}))
            raise TypeError(f"AISPChatModel knows no option {', '.join(unknown)} of a call. Possible are {possible}.")
        if stop is not None:
            options["stop"] = stop
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **options}) if options else self

    def _live_engine(self) -> Engine:
        if self.model is None:
            return cast(Engine, self.engine)
        from langchain_aisp.engine import TransformersEngine  # seconds, so only where a model is loaded

        return TransformersEngine.shared(
            self.model,
            revision=self.revision,
            dtype=self.dtype,
            device=self.device,
            quantization=self.quantization,
            adapter=self.adapter,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def _sampling(self) -> Sampling:
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop or ()),
        )

    @property
    def _takes_arguments(self) -> bool:
        """Whether arguments are taken from the conversation."""
        return self.model == DEMO if self.grounded_arguments is None else self.grounded_arguments

    @property
    def _takes_answers(self) -> bool:
        """Whether names and numbers of answers are taken from it; no grammar holds for what is sent block by block."""
        unasked = self.model == DEMO and self.commit_every is None
        return unasked if self.grounded_answers is None else self.grounded_answers

    @property
    def _budget(self) -> Budget:
        """The budget, tightened by the fields that say the same."""
        budget = self.budget
        return replace(
            budget,
            seconds=_tighter(min, budget.seconds, self.timeout),
            kl_budget=_tighter(min, budget.kl_budget, self.kl_budget),
            min_base_logprob=_tighter(max, budget.min_base_logprob, self.min_base_logprob),
        )

    @property
    def _llm_type(self) -> str:
        return "aisp"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that an answer depends on; LangChain's caches take it as their key."""
        return {
            "model": self.model_name,
            "engine": None if self.engine is None else _engine_identity(self.engine),
            "revision": self.revision,
            "dtype": str(self.dtype),
            "device": self.device,
            "quantization": None if self.quantization is None else repr(self.quantization),
            "adapter": self.adapter,
            "chat_template": self.chat_template,
            "method": repr(self.method),
            "reward": None if self.reward is None else self.reward.fingerprint,
            "sampling": repr(self._sampling),
            "budget": repr(self._budget),
            "seed": self.seed,
            "n": self.n,
            "commit_every": self.commit_every,
            "grounded_arguments": self._takes_arguments,
            "grounded_answers": self._takes_answers,
            "logprobs": self.top_logprobs or 0 if self.logprobs else None,
        }

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """The parameters of one call, its options folded in: a function's ``repr`` would be no key for a cache."""
        speech = {name: kwargs[name] for name in sorted(kwargs.keys() & CALL_OPTIONS)}
        return {**self._for_one_call(stop, kwargs).asdict(), **speech}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        return str(sorted(self._get_invocation_params(stop, **kwargs).items()))

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "aisp"
        params.setdefault("ls_model_name", self.model_name)
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text alone, by the model's own tokenizer."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return cast("TransformersEngine", self._live_engine()).token_ids(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of a conversation as the model would read it, by its own tokenizer and chat template.

        A part of a conversation that the template refuses by itself, such as a lone result of a tool, is counted by
        its texts.
        """
        if not messages:
            return 0
        engine, chat = cast("TransformersEngine", self._live_engine()), to_chat(messages)
        speech = plan(engine, chat, {"tools": format_tools(tools or (), None)})
        try:
            return len(engine.tokenize(speech.chat, tools=speech.tools))
        except ValueError:
            return sum(engine.count_tokens(turn["content"]) for turn in chat)

    def _resolve_model_profile(self) -> ModelProfile:
        if self.engine is not None:
            length = getattr(self.engine, "context_length", None)
        else:
            length = context_length(str(LANGUAGE_MODEL_PATH) if self.model == DEMO else str(self.model), self.revision)
        limits = {} if length is None else {"max_input_tokens": length, "max_output_tokens": self.max_tokens}
        return cast(ModelProfile, ResolvedProfile(ABILITIES, name=self.model_name, **limits))

    def __getstate__(self) -> dict[Any, Any]:
        """Pickle settings, never weights."""
        if self.engine is not None:
            raise TypeError(
                f"A chat model with a live engine ({self.model_name}) cannot be pickled. Build it with model= instead "
                "of engine=: then every process loads the weights once, by itself."
            )
        return super().__getstate__()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy settings and share what holds weights."""
        memo = {} if memo is None else memo
        memo.update({id(part): part for part in (self.engine, self.reward)})
        return super().__deepcopy__(memo)


@contextmanager
def _langchain_errors() -> Iterator[None]:
    """Raise what LangChain's middleware knows how to handle."""
    try:
        yield
    except ContextLengthError as error:
        raise ContextOverflowError(str(error)) from error


def _tighter(choose: Callable[..., float], *limits: float | None) -> float | None:
    """The one of the limits that is chosen; None where there is no limit."""
    given = [limit for limit in limits if limit is not None]
    return choose(given) if given else None


@lru_cache(maxsize=1)
def _demo_reward() -> Reward:
    return ClassifierReward.from_pretrained(str(REWARD_MODEL_PATH))


_identities: dict[int, str] = {}
_identities_lock = threading.Lock()


def _engine_identity(engine: Engine) -> str:
    """Tells live engines of one name apart; an address alone would not, since it is used again."""
    with _identities_lock:
        if id(engine) not in _identities:
            _identities[id(engine)] = uuid.uuid4().hex
            weakref.finalize(engine, _identities.pop, id(engine))
        return _identities[id(engine)]
