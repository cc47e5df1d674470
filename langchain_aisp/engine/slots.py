"""The prompt once for all rows, rows of any length and of any request in one forward pass.

The cache enters through transformers' attention registry; a model whose attention does not ask the registry cannot use
it. Before it serves a model it reads, in one pass that answers nothing, what each layer sees and whose keys it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache as TransformersCache

from langchain_aisp.engine.cache import ROW_MULTIPLE, Runner, Unsuited, decoder_config, input_device, is_recurrent
from langchain_aisp.engine.packed import Product

_LONGEST_TEXT = 1 << 20  # masks are read up to here
_COLUMN_BLOCK = 16  # rows' buffers grow by so many columns at a time
_MEMORY_BLOCK = 64  # and the memory of rows that have ended by so many
_SPARE_COLUMNS = 8  # so many columns that no row needs are put up with; to cut them off costs a copy of the others

# Prompts are read in pieces, so that a long one needs little room. On a CPU pieces have one size, but the last, and
# begin at its multiples: a token's keys then come out of products of one shape and have the same bits whatever was
# remembered of the prompt. Pieces that began anywhere differed (torch's attention sums in an order that depends on the
# number of queries and keys), and with them, now and then, somebody's answer. Experts differ still: their products have
# as many rows as tokens come to them.
_CPU_PIECE, _PIECE = 64, 2048
_PIECES_AT_ONCE = 8  # of so many prompts side by side


@dataclass(frozen=True)
class Layer:
    """What attention has to know of a layer.

    Attributes:
        source: The layer whose keys and values it attends to: itself, unless layers share them.
        window: How many tokens it sees, itself included; None for all.
    """

    source: int
    window: int | None


@dataclass(frozen=True)
class Scoring:
    """How a layer turns queries and keys into attention.

    Attributes:
        scaling: Factor of the scores.
        softcap: Scores are squashed into (-softcap, softcap), or None.
        sinks: [query heads] logits that take attention and give nothing, or None.
    """

    scaling: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether torch's own attention does the same."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True)
class _PromptKeys:
    """Keys and values of a prompt, one pair [heads, P, d] per layer that has its own; P may be 0."""

    length: int
    layers: Mapping[int, tuple[Tensor, Tensor]]

    def beginning(self, length: int) -> _PromptKeys:
        """The first tokens of the prompt; shares its memory."""
        return _PromptKeys(
            length, {i: (keys[:, :length], values[:, :length]) for i, (keys, values) in self.layers.items()}
        )


_NO_PROMPT = _PromptKeys(0, {})


class SlotStore:
    """Rows that share a prompt's keys and own the keys of what follows.

    Rows end together: row n's own tokens stand in the columns ``start[n] … column - 1``, so that a step writes one
    column for all rows and the mask of a row never changes while it lives.
    """

    reads_prompt = False

    def __init__(self, prompt: _PromptKeys, start: Tensor, column: int) -> None:
        """Rows whose own tokens start in the columns ``start`` [n] and end before ``column``."""
        self.prompt = prompt
        self.start = start  # [n]
        self.column = column
        self.ragged = bool((start != 0).any())
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [room, heads, capacity, d]
        self._memory: _RowMemory | None = None
        self._masks: dict[tuple[int, int | None], Tensor] = {}  # of one forward pass
        self._step_mask: Tensor | None = None  # of all steps until rows or columns change
        self._shown = -1  # the column that it shows last

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.start.shape[0])

    @property
    def room(self) -> int:
        """How many rows it has memory for."""
        return next((len(keys) for keys, _ in self.buffers.values()), len(self))

    def select(self, rows: Tensor) -> None:
        """Keep only these rows [r], see ``Store``.

        Where rows leave and the last ones take their places, only these are copied, and the memory stays; for good
        where others are to take their places, else until half of it is empty.
        """
        self.start = self.start[rows]
        self._step_mask = None
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        empty = self._memory is None and 2 * len(rows) < self.room
        if empty or bool((rows[moved] < len(rows)).any()):
            self.buffers = _chosen(self.buffers, rows)
            return
        if len(moved):
            for buffer in (part for pair in self.buffers.values() for part in pair):
                buffer.index_copy_(0, moved, buffer.index_select(0, rows[moved]))

    def grow(self, count: int) -> None:
        """Have ``count`` places; nobody is in the new ones."""
        self.start = torch.cat([self.start, self.start.new_full((count - len(self),), self.column)])
        more = count - self.room
        if more > 0:
            self.buffers = {
                layer: (self._with_more(keys, more), self._with_more(values, more))
                for layer, (keys, values) in self.buffers.items()
            }
        self.ragged = True
        self._step_mask = None

    def remember(self, places: Tensor, chains: Sequence[tuple[int, ...]]) -> None:
        """Keep the first keys of these rows [m], those of their chains, when others have taken their places."""
        if self._memory is None:
            self._memory = _RowMemory()
        self._memory.add(self, places, chains)

    def recall(self, chains: Sequence[tuple[int, ...]]) -> tuple[list[int], SlotStore]:
        """Which of the chains are known, as beginnings of what was remembered, and a store of rows with these."""
        known = {} if self._memory is None else self._memory.find(chains)
        kept = torch.tensor([len(chains[index]) for index in known], dtype=torch.int64, device=self.start.device)
        rows = torch.tensor(list(known.values()), dtype=torch.int64, device=self.start.device)
        return list(known), _rows_of({} if self._memory is None else self._memory.buffers, self.prompt, rows, kept)

    def put(self, places: Tensor, other: SlotStore) -> None:
        """Give some places [m] to the m rows of another store on this prompt; only their own keys are copied.

        Columns grow with every step, however short the rows are, so those that no row needs any more are cut off now
        and then.
        """
        start = self.start.clone()
        start[places] = self.column - other.column + other.start
        unused = int(start.min())  # negative where another row is longer than any of these was
        if unused < 0 or unused >= _SPARE_COLUMNS:
            self.buffers = {
                layer: (self._moved(keys, unused), self._moved(values, unused))
                for layer, (keys, values) in self.buffers.items()
            }
            start, self.column = start - unused, self.column - unused
        width = min(other.column, self.column)  # what is left of it belongs to no row
        for layer, pair in other.buffers.items():
            for mine, given in zip(self.buffers[layer], pair, strict=True):
                mine[places, :, self.column - width : self.column] = given[:, :, other.column - width : other.column]
        self.start = start
        self.ragged = bool((start != 0).any())
        self._step_mask = None

    def pick(self, places: Tensor) -> SlotStore:
        """A store of its own with copies of the rows in some places [m]."""
        picked = SlotStore(self.prompt, self.start[places], self.column)
        picked.buffers = _chosen(self.buffers, places)
        return picked

    def advance(self, tokens: int) -> None:
        """Count what a forward pass has written."""
        self.column += tokens
        self._masks.clear()

    def attend(
        self,
        index: int,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Attention of the new tokens to the prompt, to the row's own past and to themselves.

        Args:
            index: Index of the layer.
            layer: What is known of it.
            query: [n, query heads, q, d] for the last q of the new tokens of each row.
            key: [n, heads, new, d]; each head serves ``group`` query heads.
            value: [n, heads, new, dv].
            scoring: How the layer scores.

        Returns:
            [n, q, query heads, dv]
        """
        asked, new = query.shape[2], key.shape[2]
        if layer.source == index:
            self.write(index, key, value)
        keys, values = self.buffers[layer.source]
        rows, columns = len(self), self._columns(keys, new)
        if keys.shape[0] > rows or keys.shape[2] > columns:
            keys, values = keys[:rows, :, :columns], values[:rows, :, :columns]
        mask = self._mask(new, asked, layer.window, columns)
        if self.reads_prompt and scoring.plain:
            return _attend_piece(query, keys, values, mask, scoring.scaling)
        prompt = self.prompt.layers[layer.source] if self.prompt.length else None
        return attend_rows(query, keys, values, prompt, mask, scoring)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the new keys and values of all rows in the columns from ``column`` on, see ``attend``."""
        rows, new = len(self), key.shape[2]
        known = self.buffers.get(layer)
        if known is None or known[0].shape[2] < self.column + new:
            old_keys, old_values = known or (None, None)
            end = self.column + new
            known = self.buffers[layer] = (self._room(old_keys, key, end), self._room(old_values, value, end))
        for buffer, given in zip(known, (key, value), strict=True):
            mine = buffer if buffer.shape[0] == rows else buffer[:rows]
            mine.narrow(2, self.column, new).copy_(given)

    def _room(self, buffer: Tensor | None, new: Tensor, columns: int) -> Tensor:
        """A buffer of so many columns or some more, with what the present one holds."""
        capacity = self._capacity(columns)
        rows, filled = (len(new), 0) if buffer is None else (len(buffer), self.column)
        grown = new.new_empty(rows, new.shape[1], capacity, new.shape[3])
        if buffer is not None:
            grown[:, :, :filled] = buffer[:, :, :filled]
        grown[:, :, filled:] = 0  # not garbage: masked columns get weight 0, and 0 times NaN would be NaN
        return grown

    def _with_more(self, buffer: Tensor, rows: int) -> Tensor:
        return torch.cat([buffer, buffer.new_zeros(rows, *buffer.shape[1:])])

    def _moved(self, buffer: Tensor, left: int) -> Tensor:
        """The buffer with its columns so much further left; what leaves it there is lost."""
        column = self.column - left
        moved = buffer.new_zeros(*buffer.shape[:2], self._capacity(column + 1), buffer.shape[3])
        moved[:, :, max(0, -left) : column] = buffer[:, :, max(0, left) : self.column]
        return moved

    def _capacity(self, columns: int) -> int:
        """How many columns to make room for when so many are needed."""
        return _whole_blocks(columns)

    def _columns(self, buffer: Tensor, new: int) -> int:
        """How many columns a pass looks at: those that are filled, in a step on a CPU all there are.

        There a product with a part of each row's columns takes up to twice as long as one with them all.
        """
        return buffer.shape[2] if new == 1 and buffer.device.type == "cpu" else self.column + new

    def _mask(self, new: int, asked: int, window: int | None, columns: int) -> Tensor | None:
        """What is added to the scores, [n or 1, 1, 1, q, P + columns], or None when every key is visible."""
        longest = self.prompt.length + self.column + new
        if window is not None and longest <= window:
            window = None
        if window is None and new == 1:
            return self._mask_of_step(columns) if self.ragged or columns > self.column + new else None
        key = (asked, window)
        if key not in self._masks:
            self._masks[key] = self._build_mask(new, asked, window, columns)
        return self._masks[key]

    def _mask_of_step(self, columns: int) -> Tensor:
        """The mask of one new token that sees all before it: from step to step one more column is visible."""
        length = self.prompt.length
        if self._step_mask is None or self._step_mask.shape[-1] != length + columns:
            first = self.start if self.ragged else self.start[:1]
            own = torch.arange(-length, columns, device=first.device)
            hidden = (own >= 0) & (own < first[:, None]) | (own > self.column)
            self._step_mask = _hiding(hidden)[:, None, None, None]
        elif self._shown != self.column:  # the first layer of a step
            self._step_mask[..., length + self.column] = 0
        self._shown = self.column
        return self._step_mask

    def _build_mask(self, new: int, asked: int, window: int | None, columns: int) -> Tensor:
        device = self.start.device
        column = torch.arange(columns, device=device)
        first_own = self.start[:, None]  # [n, 1]
        own = self.prompt.length + column - first_own  # [n, columns] absolute positions, wrong before start
        prompt = torch.arange(self.prompt.length, device=device).expand(len(self), -1)
        keys = torch.cat([prompt, own], dim=1)[:, None, :]
        exists = torch.cat([torch.ones_like(prompt, dtype=torch.bool), column >= first_own], dim=1)[:, None, :]
        queries = own[:, self.column + new - asked : self.column + new, None]
        visible = exists & (keys <= queries)
        if window is not None:
            visible &= queries - keys < window
        return _hiding(~visible)[:, None, None]


def _chosen(buffers: Mapping[int, tuple[Tensor, Tensor]], rows: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Copies of some rows [r], with all their columns: whole rows are copied faster than parts of them."""
    return {
        layer: (keys.index_select(0, rows), values.index_select(0, rows)) for layer, (keys, values) in buffers.items()
    }


def _hiding(hidden: Tensor) -> Tensor:
    """What is added to scores to hide keys: so much that nothing is left, but a number."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, torch.finfo(torch.float32).min / 2)


def _whole_blocks(columns: int, block: int = _COLUMN_BLOCK) -> int:
    return -(-columns // block) * block


class _RowMemory:
    """Keys of rows that have ended, as others may begin as they did; the least recently used ones leave first.

    It keeps as many as its store has ever had room for.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values [most, heads, capacity, d]
        self._most = 0
        self._chains: dict[int, tuple[int, ...]] = {}  # row -> chain, the least recently used first

    def add(self, store: SlotStore, places: Tensor, chains: Sequence[tuple[int, ...]]) -> None:
        """Copy the chains' columns of some rows."""
        self._most = max(self._most, store.room)
        rows, longest = [self._place_for(chain) for chain in chains], max(map(len, chains))
        first = store.start[places].tolist()
        for layer, pair in store.buffers.items():
            mine = self._room(layer, pair, longest)
            for buffer, given in zip(mine, pair, strict=True):
                for row, place, start, chain in zip(rows, places.tolist(), first, chains, strict=True):
                    buffer[row, :, : len(chain)] = given[place, :, start : start + len(chain)]

    def find(self, chains: Sequence[tuple[int, ...]]) -> dict[int, int]:
        """For each chain that is known, by its index, a row that begins with it."""
        found: dict[int, int] = {}
        for index, chain in enumerate(chains):
            row = next((row for row, known in self._chains.items() if known[: len(chain)] == chain), None)
            if row is not None:
                self._chains[row] = self._chains.pop(row)  # used last
                found[index] = row
        return found

    def _place_for(self, chain: tuple[int, ...]) -> int:
        row = len(self._chains) if len(self._chains) < self._most else next(iter(self._chains))
        self._chains.pop(row, None)
        self._chains[row] = chain
        return row

    def _room(self, layer: int, like: tuple[Tensor, Tensor], columns: int) -> tuple[Tensor, Tensor]:
        known = self.buffers.get(layer)
        if known is None or len(known[0]) < self._most or known[0].shape[2] < columns:
            columns = max(_whole_blocks(columns, _MEMORY_BLOCK), 0 if known is None else known[0].shape[2])
            grown = [each.new_empty(self._most, each.shape[1], columns, each.shape[3]) for each in like]
            for old, new in zip(known or (), grown, strict=False):
                new[: len(old), :, : old.shape[2]] = old
            self.buffers[layer] = (grown[0], grown[1])
        return self.buffers[layer]


def _rows_of(source: Mapping[int, tuple[Tensor, Tensor]], prompt: _PromptKeys, rows: Tensor, kept: Tensor) -> SlotStore:
    """A store of rows [n] that own the first ``kept`` [n] columns of some rows of a source."""
    column = int(kept.max()) if len(kept) else 0
    store = SlotStore(prompt, column - kept, column)
    if column > 0:
        columns = (torch.arange(column, device=kept.device) - store.start[:, None]).clamp_(min=0)
        for layer, (keys, values) in source.items():
            store.buffers[layer] = (
                keys.transpose(1, 2)[rows[:, None], columns].transpose(1, 2).contiguous(),
                values.transpose(1, 2)[rows[:, None], columns].transpose(1, 2).contiguous(),
            )
    return store


class _PromptStore(SlotStore):
    """A prompt while it is read piece by piece: one row that begins with what is known of it."""

    reads_prompt = True

    def __init__(self, known: _PromptKeys, length: int, device: torch.device) -> None:
        """Make room for ``length`` columns, those of the ``known`` beginning filled."""
        super().__init__(_NO_PROMPT, torch.zeros(1, dtype=torch.int64, device=device), 0)
        self._length = length
        for layer, (keys, values) in known.layers.items():
            self.write(layer, keys[None], values[None])
        self.column = known.length

    def keys_of(self, length: int) -> _PromptKeys:
        """What was read of the prompt, padding left out."""
        return _PromptKeys(
            length, {i: (keys[0, :, :length], values[0, :, :length]) for i, (keys, values) in self.buffers.items()}
        )

    def _capacity(self, columns: int) -> int:
        return self._length


def _attend_piece(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Torch's own attention, which needs no room for the scores of a long prompt; returns [1, q, query heads, dv]."""
    group = query.shape[1] // keys.shape[1]
    if group > 1 and query.device.type != "cpu":  # there kernels that take masks know no groups
        keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
    grouped = query.shape[1] != keys.shape[1]
    visible = None if mask is None else mask[:, 0].to(query.device, query.dtype)
    out = scaled_dot_product_attention(query, keys, values, visible, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2)


def attend_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prompt: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """Attention of rows to a prompt that they share and to what each of them has for itself.

    Args:
        query: [n, query heads, q, d].
        keys: [n, heads, columns, d].
        values: [n, heads, columns, dv].
        prompt: Keys [heads, P, d] and values [heads, P, dv], None for no prompt.
        mask: Added to the scores, [n, 1, 1, q, P + columns]; None when every key is visible.
        scoring: How the layer scores.

    Returns:
        [n, q, query heads, dv]
    """
    rows, query_heads, asked, width = query.shape
    heads = keys.shape[1]
    query = (query * scoring.scaling).reshape(rows, heads, -1, width)  # queries of a group beside each other
    scores = _times_own(query, keys.transpose(2, 3))
    if prompt is not None:
        scores = torch.cat([_times_shared(query, prompt[0].transpose(1, 2)), scores], dim=-1)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = _weights(scores, mask, scoring.sinks, asked).to(values.dtype)
    shared = 0 if prompt is None else prompt[0].shape[1]
    out = _times_own(weights[..., shared:], values)
    if prompt is not None:
        out = out.add_(_times_shared(weights[..., :shared], prompt[1]))
    if asked == 1:  # which leaves the numbers where they are
        return out.view(rows, 1, query_heads, -1)
    return out.reshape(rows, query_heads, asked, -1).transpose(1, 2)


def _times_own(rows: Tensor, own: Tensor) -> Tensor:
    """[n, heads, q, a] times [n, heads, a, b]; past ``matmul``, which takes longer to find out that it is this."""
    count, heads, asked, _ = rows.shape
    return torch.bmm(rows.flatten(0, 1), own.flatten(0, 1)).view(count, heads, asked, -1)


def _times_shared(rows: Tensor, shared: Tensor) -> Tensor:
    """[n, heads, q, a] times [heads, a, b] in one product, so that the n rows read what they share once."""
    count, heads, asked, width = rows.shape
    product = torch.bmm(rows.transpose(0, 1).reshape(heads, count * asked, width), shared)
    return product.view(heads, count, asked, -1).transpose(0, 1)


def _weights(scores: Tensor, mask: Tensor | None, sinks: Tensor | None, asked: int) -> Tensor:
    """Softmax of the scores [n, heads, group * q, keys] in float32; sinks take their share and are dropped.

    The mask is added in place.
    """
    if mask is None and sinks is None:
        return scores.softmax(dim=-1, dtype=torch.float32)
    grouped = scores.view(*scores.shape[:2], -1, asked, scores.shape[-1])  # [n, heads, group, q, keys]
    if mask is not None:
        grouped = grouped.add_(mask.to(scores.device, scores.dtype))
    if sinks is None:
        weights = grouped.softmax(dim=-1, dtype=torch.float32)
    else:
        extra = sinks.to(scores.dtype).view(1, *grouped.shape[1:3], 1, 1).expand(*grouped.shape[:-1], 1)
        weights = torch.cat([grouped, extra], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return weights.flatten(2, 3)


class _Attention(Protocol):
    """Who answers when a model's layer asks for attention."""

    def answer(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Tensor:
        """Attention [rows, q, query heads, dv] of one layer."""


class Attending(Protocol):
    """Rows in a forward pass: a store, or the buffers of a graph."""

    def __len__(self) -> int:
        """Number of rows."""

    def attend(
        self,
        index: int,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """See ``SlotStore.attend``."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See ``SlotStore.write``."""

    def advance(self, tokens: int) -> None:
        """Count what a forward pass has written."""


@dataclass(frozen=True)
class Pass:
    """What the rows of one forward pass remember, store after store."""

    layers: Sequence[Layer]
    stores: Sequence[Attending]

    def answer(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Mapping[str, Any]
    ) -> Tensor:
        """What a model's layer that asks the registry gets."""
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self.attend(index, query, key, value, Scoring(scaling, options.get("softcap"), options.get("s_aux")))

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attention of one layer, see ``SlotStore.attend``."""
        if len(self.stores) == 1 and len(self.stores[0]) == query.shape[0]:
            return self.stores[0].attend(index, self.layers[index], query, key, value, scoring).contiguous()
        layer = self.layers[index]
        *parts, (padding, *_) = self._parts(query, key, value)
        outputs = [
            store.attend(index, layer, own_query, own_key, own_value, scoring)
            for store, (own_query, own_key, own_value) in zip(self.stores, parts, strict=True)
        ]
        if padding.shape[0]:  # it attends to nothing
            outputs.append(value.new_zeros(padding.shape[0], query.shape[2], query.shape[1], value.shape[-1]))
        return torch.cat(outputs)

    def keep(self, index: int, key: Tensor, value: Tensor) -> None:
        """Remember what one layer would attend to, [n, heads, new, d] each, and answer nothing."""
        *parts, _ = self._parts(key, value)
        for store, (own_key, own_value) in zip(self.stores, parts, strict=True):
            store.write(index, own_key, own_value)

    def _parts(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """What belongs to each store, and what to none."""
        counts = [len(store) for store in self.stores]
        counts.append(rows[0].shape[0] - sum(counts))
        return zip(*(each.split_with_sizes(counts) for each in rows), strict=True)


@dataclass(frozen=True)
class _SideBySide(Pass):
    """Pieces of several prompts in one row, one after the other; so many tokens belong to each store."""

    counts: Sequence[int]

    def attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        layer = self.layers[index]
        *parts, _ = self._parts(query, key, value)
        outputs = [
            store.attend(index, layer, own_query, own_key, own_value, scoring)
            for store, (own_query, own_key, own_value) in zip(self.stores, parts, strict=True)
        ]
        return torch.cat(outputs, dim=1)

    def _parts(self, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(each.split_with_sizes([*self.counts, 0], dim=2) for each in rows), strict=True)


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
        self.layers: dict[int, Layer] = {}
        self.token: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> its own key and value of one token
        self._keys: dict[int, Tensor] = {}
        self._windows: dict[_Visible, int | None] = {}

    def answer(
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
        if source == index:
            self.token[index] = (key, value)
        self.layers[index] = Layer(source, self._windows[mask])
        self._keys[index] = key
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])


_ANSWERS: ContextVar[_Attention] = ContextVar("langchain_aisp_attention")


def _ask(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """The function that models call through transformers' attention registry."""
    return _ANSWERS.get().answer(module.layer_idx, query, key, value, attention_mask, options), None


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


class Decoder(Protocol):
    """A model's layers past its modules; ``FusedDecoder`` says what the methods do."""

    @property
    def products(self) -> Sequence[Product]:
        """What it multiplies with."""

    @property
    def applies(self) -> bool:
        """Whether this pass can go past them."""

    def logits(self, ids: Tensor, positions: Tensor, rows: Pass) -> Tensor:
        """Logits of the last tokens."""

    def read(self, ids: Tensor, positions: Tensor, rows: Pass) -> None:
        """Keys and values only."""


class SlotCache:
    """The prompt once for all rows, in one forward pass for all stores."""

    name = "slots"
    ragged = True
    divisible = True

    def __init__(self, model: PreTrainedModel, decoder: Decoder | None = None) -> None:
        """Take a model whose attention asks transformers' registry; raise ``Unsuited`` otherwise.

        Args:
            model: The model.
            decoder: Runs the model's layers in its stead where it can.
        """
        if is_recurrent(model):
            raise Unsuited("it has recurrent layers")
        self.decoder = decoder
        self.products = () if decoder is None else decoder.products
        self._run = Runner(model)
        self._model = model
        self.device = input_device(model)
        self._on_cpu = self.device.type == "cpu"
        self._layers, self.token = self._read_layers()  # layer -> key and value [1, heads, 1, d] of some token
        self._token_bytes = sum(part.nbytes for pair in self.token.values() for part in pair)

    @torch.inference_mode()
    def _read_layers(self) -> tuple[list[Layer], dict[int, tuple[Tensor, Tensor]]]:
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
        return [reading.layers[index] for index in range(config.num_hidden_layers)], reading.token

    def prefill(self, ids: Sequence[int], begun: _PromptKeys | None = None, common: int = 0) -> _PromptKeys:
        """Read a prompt (perhaps empty) from its token ``common`` on, see ``Cache``."""
        if not ids:
            return _NO_PROMPT
        first = common - common % _CPU_PIECE if self._on_cpu else common
        if begun is not None and common == len(ids) and (first == common or begun.length == common):
            return begun.beginning(common)
        store, *pieces = self._pieces(ids, _NO_PROMPT if begun is None else begun.beginning(first))
        for part, places in zip(*pieces, strict=True):
            self._read([store], part[None], places[None])
        return store.keys_of(len(ids))

    @property
    def reads_together(self) -> bool:
        """Whether to read several prompts at once takes less time than one after the other."""
        return self.decoder is not None

    def prefill_together(self, prompts: Sequence[Sequence[int]]) -> list[_PromptKeys]:
        """Read several prompts piece by piece side by side, so that products have more rows.

        Each gets the keys that ``prefill`` would give it: only products see the others, to which a row is a row.
        """
        if self.decoder is None or not self.decoder.applies or not all(prompts):
            return [self.prefill(ids) for ids in prompts]
        found = [self._pieces(ids, _NO_PROMPT) for ids in prompts]
        stores = [store for store, *_ in found]
        for pieces in zip_longest(*(zip(parts, places, strict=True) for _, parts, places in found)):
            beside = [(store, *piece) for store, piece in zip(stores, pieces, strict=True) if piece is not None]
            for first in range(0, len(beside), _PIECES_AT_ONCE):
                some, parts, places = zip(*beside[first : first + _PIECES_AT_ONCE], strict=True)
                rows = _SideBySide(self._layers, some, [len(part) for part in parts])
                self.decoder.read(torch.cat(parts)[None], torch.cat(places)[None], rows)
                for store, part in zip(some, parts, strict=True):
                    store.advance(len(part))
        return [store.keys_of(len(ids)) for store, ids in zip(stores, prompts, strict=True)]

    def _pieces(
        self, ids: Sequence[int], known: _PromptKeys
    ) -> tuple[_PromptStore, Sequence[Tensor], Sequence[Tensor]]:
        """A store that knows the beginning of a prompt, and the rest in pieces: token ids and their positions."""
        end = _whole_blocks(len(ids), ROW_MULTIPLE) if self._on_cpu else len(ids)
        positions = torch.arange(end, device=self.device).clamp(max=len(ids) - 1)  # padding may pass the longest text
        padded = torch.tensor([*ids, *[0] * (end - len(ids))], device=self.device)
        piece = _CPU_PIECE if self._on_cpu else _PIECE
        first = known.length
        return _PromptStore(known, end, self.device), padded[first:].split(piece), positions[first:].split(piece)

    def size(self, prompt: _PromptKeys) -> int:
        """Bytes that a prompt takes."""
        return sum(part.untyped_storage().nbytes() for pair in prompt.layers.values() for part in pair)

    def row_bytes(self, prompt: int, response: int) -> int:
        """Bytes of a row's own columns."""
        return _whole_blocks(response) * self._token_bytes

    def open(self, prompt: _PromptKeys, chains: Sequence[Sequence[int]], parents: Tensor, kept: Tensor) -> SlotStore:
        """Rows that continue the prompt by ``kept`` tokens of their chains, see ``Cache``."""
        source = self._read_chains(prompt, chains).buffers if int(kept.max()) > 0 else {}
        return _rows_of(source, prompt, parents, kept)

    def _read_chains(self, prompt: _PromptKeys, chains: Sequence[Sequence[int]]) -> SlotStore:
        """One forward pass over all chains, padded at their ends, where nothing looks."""
        longest = max(map(len, chains))
        ids = torch.tensor([[*chain, *[0] * (longest - len(chain))] for chain in chains], device=self.device)
        positions = prompt.length + torch.arange(longest, device=self.device).expand(len(chains), -1)
        store = SlotStore(prompt, torch.zeros(len(chains), dtype=torch.int64, device=self.device), 0)
        self._read([store], ids, positions)
        return store

    def read(self, store: SlotStore, places: Tensor, ids: Tensor, positions: Tensor) -> None:
        """Let the rows in some places [m] read several tokens each, see ``RaggedCache``."""
        rows = store.pick(places)
        self._read([rows], ids, positions)
        store.put(places, rows)

    def step(self, batch: Sequence[tuple[SlotStore, Tensor, Tensor]], padding: int) -> Tensor:
        """Feed one token per row of all stores in one forward pass, see ``Cache``."""
        filler = torch.zeros(padding, dtype=torch.int64, device=self.device)
        ids = torch.cat([*(ids for _, ids, _ in batch), filler])
        positions = torch.cat([*(positions for _, _, positions in batch), filler])
        logits = self.forward([store for store, _, _ in batch], ids[:, None], positions[:, None])
        return logits[:, -1]

    def forward(self, stores: Sequence[Attending], ids: Tensor, positions: Tensor) -> Tensor:
        """One pass of the model over tokens [n, q] of all stores' rows; logits of the last one, [n, 1, V]."""
        rows = Pass(self._layers, stores)
        if self.decoder is not None and self.decoder.applies:
            logits = self.decoder.logits(ids, positions, rows)
        else:
            logits = self._run_modules(ids, positions, rows)
        for store in stores:
            store.advance(ids.shape[1])
        return logits

    def _read(self, stores: Sequence[Attending], ids: Tensor, positions: Tensor) -> None:
        """A pass whose logits nobody wants."""
        if self.decoder is None or not self.decoder.applies:
            self.forward(stores, ids, positions)
            return
        self.decoder.read(ids, positions, Pass(self._layers, stores))
        for store in stores:
            store.advance(ids.shape[1])

    def _run_modules(self, ids: Tensor, positions: Tensor, rows: Pass) -> Tensor:
        with _attention(self._model, _DECODING, rows):
            logits: Tensor = self._run(ids, positions, _PassThrough()).logits
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
