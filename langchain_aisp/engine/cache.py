"""Three ways to remember the keys and values of a prompt and of the rows that continue it.

A *store* is what one part of a wave owns: it is opened on a prompt, keeps chosen prefixes, advances by one token per
step and forgets rows. A *cache* is the way of a model: it prefills prompts, opens stores and runs steps.

* ``SlotCache``: the prompt once for all rows, rows of any length and of any request in one forward pass. It enters
  through transformers' attention registry; a model whose attention does not ask the registry cannot use it.
* ``ExpandedCache``: transformers' own ``DynamicCache``, the prompt copied to every row, one store per pass, all rows of
  a store equally long. For recurrent and hybrid models and for attention that bypasses the registry.
* ``NoCache``: the whole text again at every step. Slow and always right; the reference for the other two.

``choose_cache`` takes the first that gives the logits of the whole text on the model at hand.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

logger = logging.getLogger(__name__)

_LONGEST_TEXT = 1 << 20  # masks are read up to here
_COLUMN_BLOCK = 64  # rows' buffers grow by so many columns at a time


class Store(Protocol):
    """The remembered keys and values of some rows that share a prompt."""

    def select(self, rows: Tensor) -> None:
        """Keep only these rows [r] (indices into the present ones)."""


class Cache(Protocol):
    """How one model remembers; ``ragged`` tells whether rows of one store may have different lengths."""

    name: str
    ragged: bool
    device: torch.device

    def prefill(self, ids: Sequence[int]) -> Any:
        """Read a prompt (perhaps empty) once; what comes back is passed to ``open``. One forward pass at most."""

    def open(self, prompt: Any, chains: Sequence[Sequence[int]], parents: Tensor, kept: Tensor) -> Store:
        """Rows that continue the prompt.

        Args:
            prompt: What ``prefill`` returned.
            chains: Distinct token chains that follow the prompt; read here, each once.
            parents: [n] int64, the chain of each row.
            kept: [n] int64, how many tokens of its chain a row keeps.
        """

    def step(self, batch: Sequence[tuple[Any, Tensor, Tensor]], padding: int) -> Tensor:
        """Feed one token per row: (store, token ids [n], absolute positions [n]) for each store -> logits.

        ``padding`` extra rows are computed and left at the end. The logits are [rows, V]; when a hook on the head
        doubles its input's rows, they are doubled too.
        """


def decoder_config(model: PreTrainedModel) -> Any:
    """The text part of a configuration."""
    return model.config.get_text_config(decoder=True)


def _is_recurrent(model: PreTrainedModel) -> bool:
    """Whether some layers keep a state in place of keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its token ids."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.device


class _Runner:
    """Calls a model with those of the usual arguments that its ``forward`` knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._parameters = set(inspect.signature(model.forward).parameters)
        self.cache_argument = next((a for a in ("past_key_values", "cache_params") if a in self._parameters), None)

    def __call__(self, ids: Tensor, positions: Tensor, cache: Any = None, logits: int = 1) -> Any:
        """Read ids [n, q] at positions [n, q]; logits of the last tokens are computed, 0 means of all."""
        cached = cache is not None
        arguments: dict[str, Any] = {"position_ids": positions, "logits_to_keep": logits, "use_cache": cached}
        if self.cache_argument is not None:
            arguments[self.cache_argument] = cache
        known = {name: value for name, value in arguments.items() if name in self._parameters}
        return self.model(input_ids=ids, return_dict=True, **known)


# ---------------------------------------------------------------------------------------------------------------------
# The prompt once for all rows


@dataclass(frozen=True)
class _Layer:
    """What attention has to know of a layer.

    Attributes:
        source: The layer whose keys and values it attends to: itself, unless layers share them.
        window: How many tokens it sees, itself included; None for all.
    """

    source: int
    window: int | None


@dataclass(frozen=True)
class _PromptKeys:
    """Keys and values of a prompt, one pair [heads, P, d] per layer that has its own; P may be 0."""

    length: int
    layers: Mapping[int, tuple[Tensor, Tensor]]


class SlotStore:
    """Rows that share a prompt's keys and own the keys of what follows.

    Rows end together: row n's own tokens stand in the columns ``start[n] … column - 1``, so that a step writes one
    column for all rows and the mask of a row never changes while it lives.
    """

    def __init__(self, prompt: _PromptKeys, start: Tensor, column: int) -> None:
        """Rows whose own tokens start in the columns ``start`` [n] and end before ``column``."""
        self.prompt = prompt
        self.start = start  # [n]
        self.column = column
        self.ragged = bool((start != 0).any())
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [n, heads, capacity, d]
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    @property
    def fresh(self) -> bool:
        """Whether nothing has been read yet."""
        return self.prompt.length == self.column == 0

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.start.shape[0])

    def select(self, rows: Tensor) -> None:
        """Keep only these rows [r]."""
        self.start = self.start[rows]
        self._masks.clear()
        for layer, (keys, values) in self.buffers.items():
            self.buffers[layer] = (self._copy(keys, rows), self._copy(values, rows))

    def advance(self, tokens: int) -> None:
        """Count what a forward pass has written."""
        self.column += tokens
        self._masks.clear()

    def attend(
        self,
        index: int,
        layer: _Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of the new tokens to the prompt, to the row's own past and to themselves.

        Args:
            index: Index of the layer.
            layer: What is known of it.
            query: [n, query heads, q, d] for the last q of the new tokens of each row.
            key: [n, heads, new, d]; each head serves ``group`` query heads.
            value: [n, heads, new, dv].
            scaling: Factor of the scores.
            softcap: Scores are squashed into (-softcap, softcap), or None.
            sinks: [query heads] logits that take attention and give nothing, or None.

        Returns:
            [n, q, query heads, dv]
        """
        rows, query_heads, asked, _ = query.shape
        heads, new = key.shape[1], key.shape[2]
        if layer.source == index:
            self._write(index, key, value)
        if self.fresh and asked == new and softcap is None and sinks is None:
            return self._attend_fresh(query, key, value, scaling, layer.window)
        keys, values = (part[:, :, : self.column + new] for part in self.buffers[layer.source])
        query = (query * scaling).reshape(rows, heads, -1, query.shape[-1])  # queries of a group beside each other
        scores = query @ keys.transpose(2, 3)
        if self.prompt.length:
            prompt_keys, prompt_values = self.prompt.layers[layer.source]
            scores = torch.cat([_times_shared(query, prompt_keys.transpose(1, 2)), scores], dim=-1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = _weights(scores, self._mask(new, asked, layer.window), sinks, asked).to(value.dtype)
        out = weights[..., self.prompt.length :] @ values
        if self.prompt.length:
            out = out + _times_shared(weights[..., : self.prompt.length], prompt_values)
        return out.reshape(rows, query_heads, asked, -1).transpose(1, 2)

    def _attend_fresh(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """A prompt is read with torch's own attention, which needs no room for the scores of a long one."""
        whole = window is None or key.shape[2] <= window
        mask = None if whole else self._mask(key.shape[2], key.shape[2], window)
        if mask is not None:
            mask = mask[:, 0].to(query.device, query.dtype)
        out = scaled_dot_product_attention(
            query, key, value, mask, is_causal=whole, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the new keys and values of all rows in the columns from ``column`` on."""
        end = self.column + key.shape[2]
        keys, values = (
            self._room(buffer, new, end)
            for buffer, new in zip(self.buffers.get(layer, (None, None)), (key, value), strict=True)
        )
        keys[:, :, self.column : end] = key
        values[:, :, self.column : end] = value
        self.buffers[layer] = (keys, values)

    def _room(self, buffer: Tensor | None, new: Tensor, columns: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= columns:
            return buffer
        capacity = -(-columns // _COLUMN_BLOCK) * _COLUMN_BLOCK
        # Zeros, not garbage: masked columns get weight 0, and 0 times NaN would be NaN.
        grown = new.new_zeros(new.shape[0], new.shape[1], capacity, new.shape[3])
        if buffer is not None:
            grown[:, :, : self.column] = buffer[:, :, : self.column]
        return grown

    def _copy(self, buffer: Tensor, rows: Tensor) -> Tensor:
        kept = buffer.new_zeros(len(rows), *buffer.shape[1:])
        kept[:, :, : self.column] = buffer[rows, :, : self.column]
        return kept

    def _mask(self, new: int, asked: int, window: int | None) -> Tensor | None:
        """What is added to the scores, [n, 1, 1, q, P + columns], or None when every key is visible."""
        longest = self.prompt.length + self.column + new
        if window is not None and longest <= window:
            window = None
        if window is None and new == 1 and not self.ragged:
            return None
        key = (asked, window)
        if key not in self._masks:
            self._masks[key] = self._build_mask(new, asked, window)
        return self._masks[key]

    def _build_mask(self, new: int, asked: int, window: int | None) -> Tensor:
        device = self.start.device
        columns = torch.arange(self.column + new, device=device)
        first_own = self.start[:, None]  # [n, 1]
        own = self.prompt.length + columns - first_own  # [n, columns] absolute positions, wrong before start
        prompt = torch.arange(self.prompt.length, device=device).expand(len(self), -1)
        keys = torch.cat([prompt, own], dim=1)[:, None, :]
        exists = torch.cat([torch.ones_like(prompt, dtype=torch.bool), columns >= first_own], dim=1)[:, None, :]
        queries = own[:, -asked:, None]
        visible = exists & (keys <= queries)
        if window is not None:
            visible &= queries - keys < window
        mask = torch.zeros(visible.shape, device=device).masked_fill_(~visible, torch.finfo(torch.float32).min / 2)
        return mask[:, None, None]


def _times_shared(rows: Tensor, shared: Tensor) -> Tensor:
    """[n, heads, q, a] times [heads, a, b] in one product, so that the n rows read what they share once."""
    count, heads, asked, _ = rows.shape
    product = rows.transpose(0, 1).reshape(heads, count * asked, -1) @ shared
    return product.view(heads, count, asked, -1).transpose(0, 1)


def _weights(scores: Tensor, mask: Tensor | None, sinks: Tensor | None, asked: int) -> Tensor:
    """Softmax of the scores [n, heads, group * q, keys] in float32; sinks take their share and are dropped."""
    grouped = scores.view(*scores.shape[:2], -1, asked, scores.shape[-1])  # [n, heads, group, q, keys]
    if mask is not None:
        grouped = grouped + mask.to(scores.device, scores.dtype)
    if sinks is None:
        weights = grouped.softmax(dim=-1, dtype=torch.float32)
    else:
        extra = sinks.to(scores.dtype).view(1, *grouped.shape[1:3], 1, 1).expand(*grouped.shape[:-1], 1)
        weights = torch.cat([grouped, extra], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return weights.flatten(2, 3)


class _Attention(Protocol):
    """Who answers when a model's layer asks for attention."""

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Tensor:
        """Attention [rows, q, query heads, dv] of one layer."""


@dataclass(frozen=True)
class _Pass:
    """One forward pass of the stores whose rows it carries, in order."""

    layers: Sequence[_Layer]
    stores: Sequence[SlotStore]

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Tensor:
        scaling = options.get("scaling")
        known = {
            "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "softcap": options.get("softcap"),
            "sinks": options.get("s_aux"),
        }
        outputs, first = [], 0
        for store in self.stores:
            rows = slice(first, first := first + len(store))
            outputs.append(store.attend(index, self.layers[index], query[rows], key[rows], value[rows], **known))
        if first < query.shape[0]:  # padding rows attend to nothing
            outputs.append(value.new_zeros(query.shape[0] - first, query.shape[2], query.shape[1], value.shape[-1]))
        return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)


@dataclass(frozen=True)
class _Visible:
    """What a model takes for its attention mask while it is read: the rule (batch, head, query, key) -> bool itself."""

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def window(self, longest: int, device: torch.device) -> int | None:
        """The sliding window, None for all; ``_Unsuited`` when the rule is neither, up to the longest text."""
        zero = torch.zeros((), dtype=torch.int64, device=device)
        queries = torch.tensor([1, longest // 2, longest - 2, longest - 1], device=device)[:, None]
        keys = torch.arange(longest, device=device)[None]
        visible = self.rule(zero, zero, queries, keys).expand(len(queries), longest)
        window = int(visible[-1].sum())
        if not torch.equal(visible, (keys <= queries) & (queries - keys < window)):
            raise _Unsuited("a layer sees neither all tokens before it nor a sliding window of them")
        return None if window == longest else window


class _Reading:
    """A forward pass that answers nothing but notes what the layers are."""

    _OPTIONS = frozenset({"scaling", "softcap", "s_aux", "sliding_window", "dropout", "position_ids"})

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.layers: dict[int, _Layer] = {}
        self._keys: dict[int, Tensor] = {}
        self._windows: dict[_Visible, int | None] = {}

    def attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Tensor:
        given = {name for name, option in options.items() if not (option is None or isinstance(option, bool))}
        if given - self._OPTIONS:
            raise _Unsuited(f"its attention has the options {sorted(given - self._OPTIONS)}, which no store knows")
        if index in self.layers:
            raise _Unsuited("it runs a layer twice in one pass")
        if not isinstance(mask, _Visible):
            raise _Unsuited("it makes its attention masks itself")
        if mask not in self._windows:
            self._windows[mask] = mask.window(self.longest, key.device)
        source = next((other for other, known in self._keys.items() if known is key), index)
        self.layers[index] = _Layer(source, self._windows[mask])
        self._keys[index] = key
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


_ANSWERS: ContextVar[_Attention] = ContextVar("langchain_aisp_attention")


def _ask(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """The function that models call through transformers' attention registry."""
    return _ANSWERS.get().attend(module.layer_idx, query, key, value, attention_mask, options), None


def _keep_rule(*, mask_function: Any, **_: Any) -> _Visible:
    return _Visible(mask_function)


# Models prepare no mask for a name that has no mask function: stores make their own.
_DECODING, _READING = "aisp_decoding", "aisp_reading"
AttentionInterface.register(_DECODING, _ask)
AttentionInterface.register(_READING, _ask)
AttentionMaskInterface.register(_READING, _keep_rule)


class _PassThrough(TransformersCache):
    """Stands where a model expects its cache; the attention function does the remembering."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise _Unsuited("it asks its cache for the length of the text, and rows of a pass have many")


class SlotCache:
    """The prompt once for all rows, in one forward pass for all stores."""

    name = "slots"
    ragged = True

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model whose attention asks transformers' registry; raise ``_Unsuited`` otherwise."""
        if _is_recurrent(model):
            raise _Unsuited("it has recurrent layers")
        self._run = _Runner(model)
        self._model = model
        self.device = input_device(model)
        self._layers = self._read_layers()

    @torch.inference_mode()
    def _read_layers(self) -> list[_Layer]:
        config = decoder_config(self._model)
        reading = _Reading(min(getattr(config, "max_position_embeddings", None) or _LONGEST_TEXT, _LONGEST_TEXT))
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        try:
            with _attention(self._model, _READING, reading):
                self._run(token, token, _PassThrough())
        except (AttributeError, TypeError) as error:  # a _Visible is no tensor
            raise _Unsuited(f"it works on its attention mask itself: {error}") from error
        if sorted(reading.layers) != list(range(config.num_hidden_layers)):
            asked = f"{len(reading.layers)} of its {config.num_hidden_layers} layers"
            raise _Unsuited(f"{asked} ask transformers' attention registry")
        return [reading.layers[index] for index in range(config.num_hidden_layers)]

    def prefill(self, ids: Sequence[int]) -> _PromptKeys:
        """Read a prompt (perhaps empty) once."""
        if not ids:
            return _PromptKeys(0, {})
        store = self._read_chains(_PromptKeys(0, {}), [ids])
        layers = {i: (keys[0, :, : len(ids)], values[0, :, : len(ids)]) for i, (keys, values) in store.buffers.items()}
        return _PromptKeys(len(ids), {i: (k.contiguous(), v.contiguous()) for i, (k, v) in layers.items()})

    def open(self, prompt: _PromptKeys, chains: Sequence[Sequence[int]], parents: Tensor, kept: Tensor) -> SlotStore:
        """Rows that continue the prompt by ``kept`` tokens of their chains, see ``Cache``."""
        column = int(kept.max())
        store = SlotStore(prompt, column - kept, column)
        if column > 0:
            source = self._read_chains(prompt, chains)
            columns = (torch.arange(column, device=self.device) - store.start[:, None]).clamp_(min=0)
            rows = parents[:, None]
            for layer, (keys, values) in source.buffers.items():
                store.buffers[layer] = (
                    keys.transpose(1, 2)[rows, columns].transpose(1, 2).contiguous(),
                    values.transpose(1, 2)[rows, columns].transpose(1, 2).contiguous(),
                )
        return store

    def _read_chains(self, prompt: _PromptKeys, chains: Sequence[Sequence[int]]) -> SlotStore:
        """One forward pass over all chains, padded at their ends, where nothing looks."""
        longest = max(map(len, chains))
        ids = torch.tensor([[*chain, *[0] * (longest - len(chain))] for chain in chains], device=self.device)
        positions = prompt.length + torch.arange(longest, device=self.device).expand(len(chains), -1)
        store = SlotStore(prompt, torch.zeros(len(chains), dtype=torch.int64, device=self.device), 0)
        self._forward([store], ids, positions)
        return store

    def step(self, batch: Sequence[tuple[SlotStore, Tensor, Tensor]], padding: int) -> Tensor:
        """Feed one token per row of all stores in one forward pass, see ``Cache``."""
        filler = torch.zeros(padding, dtype=torch.int64, device=self.device)
        ids = torch.cat([*(ids for _, ids, _ in batch), filler])
        positions = torch.cat([*(positions for _, _, positions in batch), filler])
        logits = self._forward([store for store, _, _ in batch], ids[:, None], positions[:, None])
        return logits[:, -1]

    def _forward(self, stores: Sequence[SlotStore], ids: Tensor, positions: Tensor) -> Tensor:
        with _attention(self._model, _DECODING, _Pass(self._layers, stores)):
            logits: Tensor = self._run(ids, positions, _PassThrough()).logits
        for store in stores:
            store.advance(ids.shape[1])
        return logits


@contextmanager
def _attention(model: PreTrainedModel, name: str, answers: _Attention) -> Iterator[None]:
    """Let the model's attention go through a registered function, for one forward pass."""
    configs = {id(c): c for c in (model.config, decoder_config(model), *(_submodule_configs(model)))}.values()
    before = [(config, config._attn_implementation) for config in configs]
    token = _ANSWERS.set(answers)
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        _ANSWERS.reset(token)


def _submodule_configs(model: PreTrainedModel) -> list[Any]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return [decoder.config] if isinstance(decoder, PreTrainedModel) else []


# ---------------------------------------------------------------------------------------------------------------------
# transformers' own cache, the prompt copied to every row


class ExpandedStore:
    """Equally long rows in one transformers cache."""

    def __init__(self, cache: Any) -> None:
        """Take a filled transformers cache."""
        self.cache = cache

    def select(self, rows: Tensor) -> None:
        """Keep only these rows [r]."""
        self.cache.reorder_cache(rows)


class ExpandedCache:
    """One forward pass per store, on a ``DynamicCache``."""

    name = "expanded"
    ragged = False

    def __init__(self, model: PreTrainedModel, most: int | None = None) -> None:
        """Take a model whose ``forward`` accepts a transformers cache; raise ``_Unsuited`` otherwise.

        Args:
            model: The model.
            most: Tokens that may follow a filled cache in one pass, None for any number. Recurrent layers often start
                anew when more than one comes.
        """
        self._run = _Runner(model)
        self._model = model
        self._most = most
        self.device = input_device(model)
        if self._run.cache_argument is None:
            raise _Unsuited("its forward accepts no transformers cache")
        if most is None and _is_recurrent(model) and model.dtype != torch.float32:
            raise _Unsuited("its recurrent layers may start anew on several tokens, which only float32 would show")

    def prefill(self, ids: Sequence[int]) -> tuple[int, Any]:
        """Read a prompt (perhaps empty) once."""
        cache = DynamicCache(config=self._model.config)
        if ids:
            self._run(torch.tensor([ids], device=self.device), torch.arange(len(ids), device=self.device)[None], cache)
        return len(ids), cache

    def open(
        self, prompt: tuple[int, Any], chains: Sequence[Sequence[int]], parents: Tensor, kept: Tensor
    ) -> ExpandedStore:
        """Rows that continue the prompt by equally many tokens of their chains, see ``Cache``."""
        length, cache = prompt
        cache = copy.deepcopy(cache)
        count = int(kept[0])
        if count:
            if length:
                cache.reorder_cache(torch.zeros(len(chains), dtype=torch.int64, device=self.device))
            self._read_chains(cache, length, torch.tensor([list(c[:count]) for c in chains], device=self.device))
        if count or length:
            cache.reorder_cache(parents)
        return ExpandedStore(cache)

    def _read_chains(self, cache: Any, length: int, ids: Tensor) -> None:
        positions = (length + torch.arange(ids.shape[1], device=self.device)).expand_as(ids)
        most = self._most or ids.shape[1]
        for part, places in zip(ids.split(most, dim=1), positions.split(most, dim=1), strict=True):
            self._run(part, places, cache)

    def step(self, batch: Sequence[tuple[ExpandedStore, Tensor, Tensor]], padding: int) -> Tensor:
        """Feed one token per row of the one store; ``padding`` is not for caches that are not ragged."""
        [(store, ids, positions)] = batch
        logits: Tensor = self._run(ids[:, None], positions[:, None], store.cache).logits
        return logits[:, -1]


# ---------------------------------------------------------------------------------------------------------------------
# Nothing remembered


class PlainStore:
    """Equally long rows as token ids [n, length]."""

    def __init__(self, ids: Tensor) -> None:
        """Take the texts read so far."""
        self.ids = ids

    def select(self, rows: Tensor) -> None:
        """Keep only these rows [r]."""
        self.ids = self.ids[rows]


class NoCache:
    """The whole text again at every step."""

    name = "none"
    ragged = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Take any model."""
        self._run = _Runner(model)
        self.device = input_device(model)

    def prefill(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Nothing is read yet."""
        return tuple(ids)

    def open(
        self, prompt: tuple[int, ...], chains: Sequence[Sequence[int]], parents: Tensor, kept: Tensor
    ) -> PlainStore:
        """Rows of prompt and kept tokens, equally many for all."""
        count = int(kept[0])
        rows = torch.tensor([[*prompt, *chain[:count]] for chain in chains], dtype=torch.int64, device=self.device)
        return PlainStore(rows[parents])

    def step(self, batch: Sequence[tuple[PlainStore, Tensor, Tensor]], padding: int) -> Tensor:
        """Append one token per row of the one store and read all texts again."""
        [(store, ids, _)] = batch
        store.ids = torch.cat([store.ids, ids[:, None]], dim=1)
        positions = torch.arange(store.ids.shape[1], device=self.device).expand_as(store.ids)
        logits: Tensor = self._run(store.ids, positions).logits
        return logits[:, -1]


# ---------------------------------------------------------------------------------------------------------------------
# Which of them a model can use


class _Unsuited(Exception):
    """The cache does not fit the model; the message completes «… because»."""


def choose_cache(model: PreTrainedModel) -> Cache:
    """The first cache that gives the same logits as no cache at all; the log says why others were passed over."""
    name = type(model).__name__
    for kind, make in _KINDS.items():
        try:
            cache = make(model)
            _try_out(cache, model)
        except Exception as error:  # an architecture may fail in any way here, and the next cache then serves it
            logger.info("%s cannot use %s: %s", name, kind, str(error) or type(error).__name__)
        else:
            return cache
    logger.warning("%s decodes without a cache, which is slow", name)
    return NoCache(model)


_KINDS: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "slots": SlotCache,
    "a copied cache": ExpandedCache,
    "a copied cache that reads one token at a time": partial(ExpandedCache, most=1),
}


@dataclass(frozen=True)
class _Trial:
    """Rows that every cache has to decode as the model itself does; small token ids, which any vocabulary has."""

    prompt: tuple[int, ...]
    chains: tuple[tuple[int, ...], ...]
    parents: tuple[int, ...]
    kept: tuple[int, ...]
    fed: tuple[tuple[int, ...], ...]  # per row, the tokens of three steps; the first row leaves before the last

    def text(self, row: int) -> tuple[int, ...]:
        """All tokens of a row."""
        return (*self.prompt, *self.chains[self.parents[row]][: self.kept[row]], *self.fed[row])

    def steps(self, step: int) -> list[tuple[int, int]]:
        """The rows that take part in a step and the position of the token that each is fed."""
        return [(row, len(self.text(row)) - 3 + step) for row in range(int(step == 2), len(self.parents))]


_TRIALS = (
    _Trial((3, 5, 4, 6), ((7, 2), (8, 5)), (1, 0, 1, 0), (2, 2, 2, 2), ((4, 9, 3), (5, 8, 4), (2, 2, 3), (4, 9, 7))),
    _Trial((9, 3), ((4, 6, 7),), (0, 0), (3, 3), ((2, 6, 8), (5, 6, 3))),
)
_RAGGED_TRIALS = (replace(_TRIALS[0], kept=(2, 1, 2, 0)), _TRIALS[1])


def _try_out(cache: Cache, model: PreTrainedModel) -> None:
    """Raise ``_Unsuited`` when two parts that decode by turns get other logits than their whole texts at once."""
    trials = _RAGGED_TRIALS if cache.ragged else _TRIALS
    expected, got = _read_whole(_Runner(model), trials, cache.device), _decode_trials(cache, trials)
    error = float((got - expected).abs().max() / expected.std().clamp(min=1e-6))
    if not error <= (1e-3 if model.dtype == torch.float32 else 0.15):  # a NaN is no agreement either
        raise _Unsuited(f"its logits are off by {error:.2g} standard deviations")


@torch.inference_mode()
def _read_whole(run: _Runner, trials: Sequence[_Trial], device: torch.device) -> Tensor:
    texts = [trial.text(row) for trial in trials for row in range(len(trial.parents))]
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=device)
    logits: Tensor = run(ids, torch.arange(longest, device=device).expand_as(ids), logits=0).logits.float()
    firsts = [sum(len(trial.parents) for trial in trials[:i]) for i in range(len(trials))]
    places = [
        (first + row, at)
        for step in range(3)
        for first, trial in zip(firsts, trials, strict=True)
        for row, at in trial.steps(step)
    ]
    return torch.stack([logits[row, at] for row, at in places])


@torch.inference_mode()
def _decode_trials(cache: Cache, trials: Sequence[_Trial]) -> Tensor:
    tensor = partial(torch.tensor, device=cache.device)
    stores = [cache.open(cache.prefill(t.prompt), t.chains, tensor(t.parents), tensor(t.kept)) for t in trials]
    logits = []
    for step in range(3):
        batch = []
        for store, trial in zip(stores, trials, strict=True):
            if step == 2:
                store.select(tensor(range(1, len(trial.parents))))
            rows, places = zip(*trial.steps(step), strict=True)
            batch.append((store, tensor([trial.fed[row][step] for row in rows]), tensor(places)))
        for together in [batch] if cache.ragged else [[one] for one in batch]:
            logits.append(cache.step(together, 0).float())
    return torch.cat(logits)
