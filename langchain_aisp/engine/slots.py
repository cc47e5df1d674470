"""The prompt once for all rows, rows of any length and of any request in one forward pass.

The cache enters through transformers' attention registry; a model whose attention does not ask the registry cannot use
it. Before it serves a model it reads, in one pass that answers nothing, what each layer sees and whose keys it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache

from langchain_aisp.engine.cache import Runner, Unsuited, decoder_config, input_device, is_recurrent

_LONGEST_TEXT = 1 << 20  # masks are read up to here
_COLUMN_BLOCK = 64  # rows' buffers grow by so many columns at a time


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
        """The sliding window, None for all; ``Unsuited`` when the rule is neither, up to the longest text."""
        zero = torch.zeros((), dtype=torch.int64, device=device)
        queries = torch.tensor([1, longest // 2, longest - 2, longest - 1], device=device)[:, None]
        keys = torch.arange(longest, device=device)[None]
        visible = self.rule(zero, zero, queries, keys).expand(len(queries), longest)
        window = int(visible[-1].sum())
        if not torch.equal(visible, (keys <= queries) & (queries - keys < window)):
            raise Unsuited("a layer sees neither all tokens before it nor a sliding window of them")
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
            raise Unsuited(f"its attention has the options {sorted(given - self._OPTIONS)}, which no store knows")
        if index in self.layers:
            raise Unsuited("it runs a layer twice in one pass")
        if not isinstance(mask, _Visible):
            raise Unsuited("it makes its attention masks itself")
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
        raise Unsuited("it asks its cache for the length of the text, and rows of a pass have many")


class SlotCache:
    """The prompt once for all rows, in one forward pass for all stores."""

    name = "slots"
    ragged = True

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model whose attention asks transformers' registry; raise ``Unsuited`` otherwise."""
        if is_recurrent(model):
            raise Unsuited("it has recurrent layers")
        self._run = Runner(model)
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
            raise Unsuited(f"it works on its attention mask itself: {error}") from error
        if sorted(reading.layers) != list(range(config.num_hidden_layers)):
            asked = f"{len(reading.layers)} of its {config.num_hidden_layers} layers"
            raise Unsuited(f"{asked} ask transformers' attention registry")
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
