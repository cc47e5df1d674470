"""An engine on a local Hugging Face model: one thread that decodes the rows of all callers as one batch."""

from __future__ import annotations

import atexit
import logging
import re
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from langchain_aisp import noise
from langchain_aisp.engine.cache import decoder_config
from langchain_aisp.engine.choice import choose_cache
from langchain_aisp.engine.decode import Rows, SteeredHead, Vocabulary, decode_step, split, time_is_up
from langchain_aisp.engine.grammar import Grammars
from langchain_aisp.engine.graphs import StepGraphs, cuda_capture
from langchain_aisp.engine.loading import (
    adapter_weights,
    context_length,
    load_model,
    load_tokenizer,
    measure_head,
    output_head,
)
from langchain_aisp.engine.memory import free_bytes, working_bytes
from langchain_aisp.engine.packed import PackedProducts
from langchain_aisp.engine.prompt import PromptEncoder
from langchain_aisp.engine.remembered import RememberedPrompts
from langchain_aisp.engine.slots import SlotCache
from langchain_aisp.futures import fail, settle
from langchain_aisp.types import (
    Chat,
    ContextLengthError,
    Ended,
    FinishReason,
    Grammar,
    Prompt,
    Response,
    Rollouts,
    Sampling,
    Ticket,
    Wave,
    require,
)

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 30.0  # the thread leaves after so long without work, so that a forgotten engine frees its memory
_EXIT_SECONDS = 5.0
_MOST_REMEMBERED = 2 << 30  # bytes of prompts, unless asked otherwise
_USABLE = 0.8  # of the free memory; the rest is for what no plan counts, such as fragments and activations
_SPOKEN_MARKERS = re.compile(r"tool|function|python_tag|think|channel|message|\[ARGS\]", re.IGNORECASE)


class TransformersEngine:
    """Decodes waves on a causal language model of Hugging Face transformers.

    The model must end in one linear head (``get_output_embeddings()``); the perturbations enter through a hook on it.
    Rows of all callers decode together, each prompt is read once and remembered, finished rows leave the batch.

    Attributes:
        name: Id or path of the model.
        model: The transformers model; the engine's thread uses it while waves are in flight.
        tokenizer: Its tokenizer.
        head: Width of the pre-logits, spread of the head and size of its vocabulary.
        context_length: Longest prompt plus answer, in tokens.
        cache: How the model remembers keys and values, see ``engine.cache``.
        adapters: Ids or paths of PEFT adapters that ``from_pretrained`` has added, and the weight of each.
        packed: On a CPU, the weights laid out for products of few rows, see ``engine.packed``.
        max_rows: Most rows that decode at once, fewer when the free memory holds fewer; halved when it runs out still.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        chat_template: str | None = None,
        max_rows: int = 256,
        remembered_bytes: int | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Take a loaded model and its tokenizer.

        Args:
            model: A causal language model with one linear head.
            tokenizer: Its tokenizer.
            name: For metadata; default is the model's own name or path.
            chat_template: A Jinja chat template that replaces the tokenizer's.
            max_rows: Most rows that decode at once.
            remembered_bytes: Most memory for the keys of prompts, least recently used ones leave first; by default an
                eighth of what is free, at most 2 GiB. The newest prompt stays in any case.
            cuda_graphs: Record the steps of a wave that decodes alone as CUDA graphs. Experimental.

        Raises:
            ValueError: The model has no single linear head, there is no chat template, or its steps cannot be graphs.
        """
        require(max_rows >= 1, f"max_rows must be at least 1, got {max_rows}")
        require(
            remembered_bytes is None or remembered_bytes >= 0,
            f"remembered_bytes must not be negative, got {remembered_bytes}; None takes a share of the free memory",
        )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.chat_template = chat_template or _own_template(tokenizer, self.name)
        self._encoder = PromptEncoder(tokenizer, self.chat_template, self.name)
        self.adapters: Mapping[str, float] = {}
        self.max_rows = max_rows
        self.context_length = context_length(model)
        self._head = SteeredHead(output_head(model))
        self.head = measure_head(model, self._head)
        self.cache = choose_cache(model)
        self.packed = PackedProducts(model, self.cache.products if isinstance(self.cache, SlotCache) else ())
        self._graphs = self._make_graphs() if cuda_graphs else None
        self._vocabulary = self._make_vocabulary()
        self._prompts = RememberedPrompts(_share(self.cache.device, remembered_bytes))
        self._waiting: deque[_Job] = deque()
        self._batch: list[tuple[_Job, Rows]] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._heads: int = getattr(decoder_config(model), "num_attention_heads", None) or 1  # Mamba has none
        self._free: int | None = None  # bytes, when last nothing was in flight
        _engines.add(self)

    @classmethod
    def from_pretrained(
        cls,
        model_id_or_path: str,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        quantization: str | Any | None = None,
        adapter: str | Mapping[str, float] | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        max_rows: int = 256,
        remembered_bytes: int | None = None,
        cuda_graphs: bool = False,
    ) -> Self:
        """Load a model from the Hugging Face hub or a folder.

        Args:
            model_id_or_path: Hub id, folder, or ``demo`` for the model that ships with the package.
            revision: Branch, tag or commit on the hub.
            dtype: ``auto`` (float32 on a CPU, the checkpoint's own elsewhere) or a torch dtype or its name.
            device: ``auto`` (cuda, else mps, else cpu) or a torch device.
            quantization: ``int8`` or ``nf4`` (bitsandbytes), or a transformers quantization config.
            adapter: Id or path of a PEFT adapter to load on top, or several with a weight each: ``{path: weight}``.
            chat_template: A Jinja chat template that replaces the tokenizer's.
            trust_remote_code: Run code that the repository brings. Off unless you ask for it.
            max_rows: Most rows that decode at once.
            remembered_bytes: Most memory for the keys of prompts; by default a share of what is free.
            cuda_graphs: Record the steps of a wave that decodes alone as CUDA graphs. Experimental.

        Raises:
            ValueError: The model cannot be steered or has no chat template.
        """
        path = resolve(model_id_or_path)
        model = load_model(
            path,
            revision=revision,
            dtype=dtype,
            device=device,
            quantization=quantization,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
        engine = cls(
            model,
            tokenizer,
            name=model_id_or_path,
            chat_template=chat_template,
            max_rows=max_rows,
            remembered_bytes=remembered_bytes,
            cuda_graphs=cuda_graphs,
        )
        engine.adapters = adapter_weights(adapter)
        return engine

    @classmethod
    def shared(cls, model_id_or_path: str, **options: Any) -> TransformersEngine:
        """The process's one engine for these arguments of ``from_pretrained``, loaded at the first call."""
        key = (cls, model_id_or_path, *sorted((name, repr(value)) for name, value in options.items()))
        with _shared_lock:
            lock = _shared_locks.setdefault(key, threading.Lock())
        with lock:  # two callers that want the same model load it once; others need not wait
            if key not in _shared or _shared[key]._closed:
                _shared[key] = cls.from_pretrained(model_id_or_path, **options)
            return _shared[key]

    def __repr__(self) -> str:
        """Name, class, cache and device."""
        return f"TransformersEngine({self.name!r}, {type(self.model).__name__}, {self.cache.name}, {self.cache.device})"

    def __copy__(self) -> Self:
        """A live engine is shared, not copied."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A live engine is shared, not copied."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled."""
        message = (
            f"a live TransformersEngine ({self.name}) cannot be pickled; give the chat model model={self.name!r} "
            "instead of engine=, then it loads the model again where it is unpickled"
        )
        raise TypeError(message)

    # -- text and tokens ----------------------------------------------------------------------------------------------

    def encode(
        self, chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), seed: int = 0, continue_last: bool = False
    ) -> Prompt:
        """Tokenise a conversation; whatever its texts spell stays text, see ``templating``.

        Args:
            chat: Role/content dicts.
            tools: Tools that the chat template tells the model of, in the form of the OpenAI API.
            seed: Any integer; with the tokens it makes the request's noise key.
            continue_last: Continue the last message instead of answering it.

        Raises:
            ContextLengthError: No room is left for an answer.
            ValueError: The chat template refuses the conversation.
        """
        ids = tuple(self.tokenize(chat, tools=tools, continue_last=continue_last))
        require(len(ids) > 0, "the chat template made no tokens of the conversation; is it empty?")
        if len(ids) >= self.context_length:
            message = (
                f"the conversation has {len(ids)} tokens, but {self.name} holds {self.context_length} with the answer: "
                "shorten or summarise the conversation, or take a model with a longer context"
            )
            raise ContextLengthError(message)
        return Prompt(chat, ids, noise.request_key(seed, ids))

    def tokenize(
        self, chat: Chat, *, tools: Sequence[Mapping[str, Any]] = (), continue_last: bool = False
    ) -> list[int]:
        """Token ids of a conversation as the model reads it, however long; see ``encode``."""
        return self._encoder.encode(chat, tools, continue_last)

    @cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """Tokens that were added to the tokenizer's vocabulary, such as markers of tool calls, and their ids."""
        return dict(self.tokenizer.get_added_vocab())

    def prompt_end(self, chat: Chat) -> str:
        """The last few words of the prompt: some templates open a block of thoughts there."""
        return str(self.tokenizer.decode(self.tokenize(chat)[-16:], skip_special_tokens=False))

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, no special ones added."""
        return len(self.token_ids(text))

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text, no special ones added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _make_vocabulary(self) -> Vocabulary:
        size = self.head.vocabulary
        ends = end_tokens(self.model, self.tokenizer)
        forbidden = torch.zeros(size)
        forbidden[len(self.tokenizer) :] = -torch.inf
        for token, content in self.tokenizer.added_tokens_decoder.items():
            if content.special and token < size and not _SPOKEN_MARKERS.search(content.content):
                forbidden[token] = -torch.inf
        is_end = torch.zeros(size, dtype=torch.bool)
        is_end[[token for token in ends if token < size]] = True
        forbidden[is_end] = 0
        device = self.cache.device
        grammars = Grammars(self.tokenizer, forbidden == 0, is_end.nonzero().flatten().tolist())
        return Vocabulary(forbidden.to(device), is_end.to(device), self._decode, grammars)

    def _make_graphs(self) -> StepGraphs:
        device, cache = self.cache.device, self.cache
        require(device.type == "cuda", f"cuda_graphs=True needs a model on a CUDA device, {self.name} is on {device}")
        if not isinstance(cache, SlotCache):
            message = f"cuda_graphs=True needs the slot cache, {self.name} decodes with the cache {cache.name!r}"
            raise ValueError(message)  # a model that cannot, not a wrong type
        return StepGraphs(cache, self._head, self.head.width, cuda_capture())

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(
            [list(row) for row in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    # -- waves --------------------------------------------------------------------------------------------------------

    def submit(self, wave: Wave, *, deadline: float | None = None, ended: Ended | None = None) -> Ticket[Rollouts]:
        """Start decoding a wave.

        Args:
            wave: What to decode.
            deadline: On the clock of ``time.monotonic``; rows still being decoded then are cut off.
            ended: Is told what rows say as soon as they end, perhaps twice where memory ran out; by this engine's
                thread, which it must not hold up.

        Returns:
            A ticket; cancelling it takes the wave's rows out of the batch before the next step.
        """
        require(not self._closed, f"the engine of {self.name} is closed")
        job = _Job(wave, deadline, ended, split(wave, self.cache, self.max_rows), *self._demand(wave))
        with self._wake:
            self._waiting.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name=f"aisp-{self.name}", daemon=True)
                self._thread.start()
            self._wake.notify()
        return Ticket(job.future)

    def allowed(self, grammar: Grammar, tokens: Tensor, choices: Tensor) -> Tensor:
        """Which choices [r, L, K] may stand in place of responses' tokens [r, L], on the CPU; see ``types.Engine``.

        Where the text can go on in one way only, no other token may, even if it cuts that text differently.

        Raises:
            ValueError: The grammar cannot be compiled.
        """
        return self._vocabulary.grammars.allowed(grammar, tokens, choices)

    def close(self) -> None:
        """Stop the thread, abandon what is in flight and take the hook off the model."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._join()
        self._head.remove()

    def _join(self, seconds: float | None = None) -> None:
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(seconds)

    def __enter__(self) -> Self:
        """Close the engine when the scope ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()

    def _serve(self) -> None:
        """The engine's thread: admit, decode a step, hand out what is done, until nothing comes any more."""
        while self._wait_for_work():
            try:
                with self.packed.installed():
                    self._serve_once()
            except torch.OutOfMemoryError as error:
                self._make_do_with_less(error)
            except Exception as error:  # the callers get it; the thread must outlive a broken wave
                self._fail(error)

    def _serve_once(self) -> None:
        self._admit()
        self._drop_abandoned()
        if self._batch:
            decode_step(self.cache, self._head, [rows for _, rows in self._batch], self._graphs)
            self._hand_out()

    def _wait_for_work(self) -> bool:
        with self._wake:
            if not self._waiting and not self._batch and not self._closed:
                self._wake.wait(_IDLE_SECONDS)
            if self._waiting or self._batch:
                if not self._closed:
                    return True
                self._fail(RuntimeError(f"the engine of {self.name} was closed"))
            self._thread = None
            return False

    def _admit(self) -> None:
        """Let waiting rows in, first come first served, while there are places and memory."""
        while (taken := self._take()) is not None:
            job, part = taken
            if not job.future.cancelled():
                self._read_ahead(job)
                self._start(job, part)

    def _read_ahead(self, first: _Job) -> None:
        """Read a prompt together with those of all who wait, each once; whoever is let in finds his."""
        if not isinstance(self.cache, SlotCache) or not self.cache.reads_together:
            return
        with self._wake:
            jobs = [job for job in (first, *self._waiting) if not job.read_ahead]
        for job in jobs:
            job.read_ahead = True
        if len(jobs) < 2:
            return
        try:
            with torch.inference_mode():
                self._prompts.read_together(self.cache, [job.wave.prompt.ids[:-1] for job in jobs])
        except Exception as error:  # it is told to whom it concerns when each is read alone
            logger.info("prompts are not read together: %s", error)

    def _take(self) -> tuple[_Job, Tensor] | None:
        """The part that is to decode next, as much of it as there is room for; None when it has to wait."""
        with self._wake:
            if not self._waiting:
                return None
            job = self._waiting[0]
            part = job.parts[0]
            room = len(part) if job.future.cancelled() else self._room(job)
            if room < len(part):
                if self._batch:
                    return None
                job.parts.popleft()
                job.parts.extendleft(reversed(part.split(max(1, room))))
            part = job.parts.popleft()
            if not job.parts:
                self._waiting.popleft()
        return job, part

    def _room(self, job: _Job) -> int:
        """How many more rows like the job's there is room for; may be negative."""
        places = self.max_rows - sum(len(rows) for _, rows in self._batch)
        if not self._batch:  # only now do rows in flight take nothing of what is free
            self._free = free_bytes(self.cache.device)
        if self._free is None:
            return places
        promised = sum(other.prompt_bytes + rows.room * other.row_bytes for other, rows in self._batch)
        return min(places, int((_USABLE * self._free - promised - job.prompt_bytes) // job.row_bytes))

    def _demand(self, wave: Wave) -> tuple[int, int]:
        """Bytes that the wave's prompt takes and each of its rows takes at most."""
        prompt = len(wave.prompt.ids)
        response = min(wave.sampling.max_tokens, self.context_length - prompt)
        working = working_bytes(wave, self.head, self._heads, prompt + response)
        keys = self.cache.row_bytes(prompt, response)
        remembered = keys if wave.enough is not None else 0  # of rows that have ended, as others may begin like them
        return self.cache.row_bytes(0, prompt), keys + remembered + working

    def _start(self, job: _Job, part: Tensor) -> None:
        """Read the prompt and the kept prefixes of some rows and put them into the batch."""
        try:
            with torch.inference_mode():
                prompt = self._prompts.read(self.cache, job.wave.prompt.ids[:-1])
                rows = Rows(job.wave, part, self.cache, prompt, self._vocabulary, self.context_length, self.head.width)
        except torch.OutOfMemoryError:
            job.parts.append(part)
            with self._wake:
                if job not in self._waiting:
                    self._waiting.appendleft(job)
            raise
        except Exception as error:
            fail(job.future, error)
        else:
            self._batch.append((job, rows))

    def _drop_abandoned(self) -> None:
        self._batch = [(job, rows) for job, rows in self._batch if not job.future.cancelled()]
        for job, rows in self._batch:
            if time_is_up(job.deadline):
                rows.cut_off()
        self._hand_out()

    def _hand_out(self) -> None:
        """Take finished parts out of the batch; the last part of a wave makes its rollouts."""
        for job, rows in self._batch:
            if rows.error is not None:
                fail(job.future, rows.error)
            elif job.ended is not None:
                self._tell(job.ended, rows)
        self._batch = [(job, rows) for job, rows in self._batch if rows.error is None]
        finished = [(job, rows) for job, rows in self._batch if rows.has_enough or not len(rows)]
        if finished:
            self._batch = [(job, rows) for job, rows in self._batch if len(rows) and not rows.has_enough]
        for job, rows in finished:
            job.finished.append(rows)
            if sum(len(done.index) for done in job.finished) == len(job.wave):
                settle(job.future, partial(self._rollouts, job))

    def _tell(self, ended: Ended, rows: Rows) -> None:
        """Tell of the rows that have just ended."""
        if places := rows.take_ended():
            ended(self._responses(rows.written(places), rows.finish_reasons(places), rows.sampling))

    def _rollouts(self, job: _Job) -> Rollouts:
        parts = job.finished
        order = torch.cat([rows.index for rows in parts]).argsort()
        tokens = _gather([rows.tokens for rows in parts], order)
        lengths = _gather([rows.length for rows in parts], order)
        reasons = [reason for rows in parts for reason in rows.finish_reasons()]
        unfinished = _gather([rows.unfinished for rows in parts], order)
        ended = (~unfinished).nonzero().squeeze(1).tolist()
        counts, said = lengths.tolist(), tokens.tolist()
        written, why = [said[row][: counts[row]] for row in ended], [reasons[order[row]] for row in ended]
        return Rollouts(
            tokens,
            lengths,
            self._responses(written, why, job.wave.sampling),
            sum(rows.sampled_tokens for rows in parts),
            {name: _gather([rows.observed[name] for rows in parts], order) for name in parts[0].observed},
            unfinished if len(ended) < len(tokens) else None,
            parts[0].hold() if self._graphs is None else None,  # a graph has keys of its own
        )

    def _responses(
        self, rows: Sequence[list[int]], reasons: Sequence[FinishReason], sampling: Sampling
    ) -> tuple[Response, ...]:
        """What the rows say; a reader gets to see control tokens too."""
        if not rows:  # of which a tokenizer makes one text
            return ()
        reader = sampling.reader
        texts = self._decode(rows) if reader is None else self._decode_all(rows)
        trimmed = zip([_trim(text, sampling.stop) for text in texts], reasons, strict=True)
        return tuple(Response(*each) if reader is None else reader.read(*each) for each in trimmed)

    def _decode_all(self, rows: Sequence[list[int]]) -> list[str]:
        """Texts with control tokens written out, but for the ends."""
        ends = set(self._vocabulary.ends.nonzero().flatten().tolist())
        said = [row[:-1] if row and row[-1] in ends else row for row in rows]
        return self.tokenizer.batch_decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _make_do_with_less(self, error: torch.OutOfMemoryError) -> None:
        """Halve the rows that decode at once and start the rows in flight again: waves are values, nothing is lost."""
        largest = max((len(rows.index) for _, rows in self._batch), default=self.max_rows)
        if self.max_rows == 1:
            self._fail(error)
            return
        self.max_rows = max(1, min(self.max_rows, largest) // 2)
        warnings.warn(
            f"out of memory: {self.name} now decodes at most {self.max_rows} rows at once; fewer samples per wave, "
            "shorter answers or a quantized model need less",
            ResourceWarning,
            stacklevel=1,
        )
        logger.warning("out of memory, at most %d rows at once from now on", self.max_rows)
        jobs = list(dict.fromkeys([job for job, _ in self._batch] + list(self._waiting)))
        for job, rows in self._batch:
            job.parts.append(rows.index)
        self._batch.clear()
        self._prompts.clear()
        if self._graphs is not None:
            self._graphs.clear()
        for job in jobs:
            job.parts = deque(piece for part in job.parts for piece in part.split(self.max_rows))
        with self._wake:
            self._waiting = deque(jobs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _fail(self, error: Exception) -> None:
        """Give an error to all callers that wait for rows in the batch, or for anything when the engine closes."""
        jobs = [job for job, _ in self._batch] + (list(self._waiting) if self._closed else [])
        self._batch.clear()
        if self._closed:
            self._waiting.clear()
        for job in jobs:
            fail(job.future, error)


class _Job:
    """A wave on its way through the engine: parts that wait, parts that are done."""

    def __init__(
        self,
        wave: Wave,
        deadline: float | None,
        ended: Ended | None,
        parts: Sequence[Tensor],
        prompt_bytes: int,
        row_bytes: int,
    ) -> None:
        self.wave = wave
        self.prompt_bytes = prompt_bytes
        self.row_bytes = row_bytes
        self.deadline = deadline
        self.ended = ended
        self.future: Future[Rollouts] = Future()
        self.parts = deque(parts)
        self.finished: list[Rows] = []
        self.read_ahead = False


_engines: weakref.WeakSet[TransformersEngine] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Let every engine finish the step it is in: a thread killed inside torch takes the process down with it."""
    engines = list(_engines)
    for engine in engines:
        with engine._wake:
            engine._closed = True
            engine._wake.notify()
    for engine in engines:
        engine._join(_EXIT_SECONDS)


_shared: dict[Any, TransformersEngine] = {}
_shared_lock = threading.Lock()
_shared_locks: dict[Any, threading.Lock] = {}


def _share(device: torch.device, wanted: int | None) -> int:
    """Bytes for remembered prompts."""
    if wanted is not None:
        return wanted
    free = free_bytes(device)
    return _MOST_REMEMBERED if free is None else min(_MOST_REMEMBERED, free // 8)


def resolve(model_id_or_path: str) -> str:
    """The folder of the embedded model for ``demo``, everything else as it is."""
    if model_id_or_path != "demo":
        return model_id_or_path
    from langchain_aisp.demo import LANGUAGE_MODEL_PATH

    return str(LANGUAGE_MODEL_PATH)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: the generation config's, the model's and the tokenizer's."""
    configured = [
        getattr(model.generation_config, "eos_token_id", None),
        getattr(decoder_config(model), "eos_token_id", None),
        tokenizer.eos_token_id,
    ]
    found: set[int] = set()
    for value in configured:
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found


def _own_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        message = (
            f"the tokenizer of {name} has no chat template, so messages cannot be turned into a prompt; pass "
            "chat_template= with a Jinja template (base models often use plain 'Human:' and 'Assistant:' turns)"
        )
        raise ValueError(message)
    return str(template)


def _gather(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Rows of all parts in the wave's order, on the CPU, as ordinary tensors."""
    return torch.cat([part.cpu() for part in parts])[order].clone() if len(parts) > 1 else parts[0].cpu().clone()


def _trim(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
