"""Steps as CUDA graphs: recorded once per rounded shape, then started with one call instead of thousands.

A graph runs the same kernels on the same memory again. So a bucket, which is a shape that steps are rounded up to, has
buffers of its own for everything that changes: tokens, offsets of the steering, keys, and how many of them count.
Nothing here but ``cuda_capture`` needs a GPU: any other way to record a function serves, such as not to record it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from langchain_aisp.engine.slots import Layer, Scoring, SlotCache, SlotStore, attend_rows

if TYPE_CHECKING:
    from langchain_aisp.engine.decode import SteeredHead

logger = logging.getLogger(__name__)

Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Records a function, which may be called for it some times, and returns what does the same on the same memory."""

_FEWEST_ROWS = 4
_FEWEST_COLUMNS = 64
_WARM_UPS = 2  # libraries set themselves up in the first calls, which must not be recorded


def cuda_capture() -> Capture:
    """Records CUDA graphs, which share the memory of their intermediate results: only one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return capture


@dataclass(frozen=True)
class Bucket:
    """A shape that steps are rounded up to.

    Attributes:
        rows: Rows of a wave.
        columns: Tokens of each row, the new one included.
        prompt: Tokens of the prompt.
        both: Whether unsteered logits are wanted beside the steered ones.
    """

    rows: int
    columns: int
    prompt: int
    both: bool

    @classmethod
    def around(cls, rows: int, columns: int, prompt: int, both: bool) -> Bucket:
        """The smallest bucket that holds so many: powers of two, so that there are few."""
        return cls(
            _power_of_two(rows, _FEWEST_ROWS),
            _power_of_two(columns, _FEWEST_COLUMNS),
            _power_of_two(prompt, _FEWEST_COLUMNS),
            both,
        )


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


class StepGraphs:
    """The steps of one model by graphs, one graph per bucket, as long as a single store decodes.

    Stores of several prompts decode together without graphs: a graph would need a shape for every mixture.
    """

    def __init__(self, cache: SlotCache, head: SteeredHead, width: int, capture: Capture) -> None:
        """Record nothing yet.

        Args:
            cache: Runs the model.
            head: Where the offsets are added.
            width: D, the width of the pre-logits.
            capture: Records a step.
        """
        self._cache = cache
        self._head = head
        self._width = width
        self._capture = capture
        self._known: dict[Bucket, _BucketStep] = {}
        self._usable = True

    def step(
        self, store: SlotStore, ids: Tensor, positions: Tensor, offset: Tensor | None, both: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Feed one token per row of a store; the only one that decodes.

        Args:
            store: The rows.
            ids: [n] int64 tokens.
            positions: [n] int64.
            offset: [n, D] float32, added to the pre-logits; None for nothing.
            both: Whether unsteered logits are wanted, too.

        Returns:
            Logits [R, V], or [2 R, V] with the unsteered ones behind, R ≥ n, and the pre-logits [n, D] float32 before
            the offsets, both to be read before the next step; None when the model's steps cannot be recorded.
        """
        if not self._usable:
            return None
        bucket = Bucket.around(len(ids), store.column + 1, store.prompt.length, both)
        if bucket not in self._known:
            self._known[bucket] = _BucketStep(bucket, self._cache, self._head, self._width)
        step = self._known[bucket]
        step.set(store, ids, positions, offset)
        try:
            step.run(self._capture)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # such as a model that looks at a number before it goes on
            logger.warning("decoding goes on without CUDA graphs, a step could not be recorded: %s", error)
            self._usable = False
            self.clear()
            return None
        store.advance(1)
        return step.logits, step.hidden[: len(ids)]

    def clear(self) -> None:
        """Free all buffers and graphs; stores keep theirs."""
        self._known.clear()


class _BucketStep:
    """The buffers of one bucket and what runs on them. In a forward pass it stands for the store that it holds."""

    def __init__(self, bucket: Bucket, cache: SlotCache, head: SteeredHead, width: int) -> None:
        self._bucket = bucket
        self._cache = cache
        self._head = head
        self._replay: Callable[[], None] | None = None
        self._ids, self._positions, self._start = torch.zeros(
            3, bucket.rows, 1, dtype=torch.int64, device=cache.device
        ).unbind()
        self._column, self._prompt_length = torch.zeros(2, 1, dtype=torch.int64, device=cache.device).unbind()
        self._offset = torch.zeros(bucket.rows, width, device=cache.device)
        self._own = {
            layer: (_room(key, bucket.rows, bucket.columns), _room(value, bucket.rows, bucket.columns))
            for layer, (key, value) in cache.token.items()
        }
        self._prompt = {
            layer: (_room(key, 1, bucket.prompt)[0], _room(value, 1, bucket.prompt)[0])
            for layer, (key, value) in cache.token.items()
        }
        self._held: dict[int, tuple[Tensor, Tensor]] | None = None
        self._masks: dict[int | None, Tensor] = {}
        self.hidden = torch.zeros_like(self._offset)
        self.logits = torch.empty(0, device=cache.device)

    def set(self, store: SlotStore, ids: Tensor, positions: Tensor, offset: Tensor | None) -> None:
        """Fill in what the next step reads."""
        if not self._holds(store):
            self._take(store)
        self._start[: len(store), 0] = store.start  # rows may have moved in this memory
        count = len(ids)
        self._ids[:count, 0], self._positions[:count, 0] = ids, positions
        self._column.fill_(store.column)
        self._offset[:count] = 0 if offset is None else offset

    def run(self, capture: Capture) -> None:
        """Do the step that is set; the first time, record it before."""
        if self._replay is None:
            self._replay = capture(self._step)
        self._replay()

    def _holds(self, store: SlotStore) -> bool:
        """Whether the store lives in this memory; one that has grown or lost many rows since lives elsewhere."""
        if self._held is None or store.buffers is not self._held:
            return False
        return all(store.buffers[layer][0].data_ptr() == keys.data_ptr() for layer, (keys, _) in self._own.items())

    def _take(self, store: SlotStore) -> None:
        """Copy the store's keys and values and let it live here."""
        self._prompt_length.fill_(store.prompt.length)
        for layer, pair in store.prompt.layers.items():
            for buffer, part in zip(self._prompt[layer], pair, strict=True):
                buffer[:, : store.prompt.length] = part
        rows, columns = len(store), store.column
        for layer, pair in self._own.items():
            for which, buffer in enumerate(pair):
                buffer.zero_()  # masked columns get weight 0, and 0 times what may be left there would be NaN
                if columns:
                    buffer[:rows, :, :columns] = store.buffers[layer][which][:rows, :, :columns]
        self._held = {layer: (keys[: len(store)], values[: len(store)]) for layer, (keys, values) in self._own.items()}
        store.buffers = self._held

    def _step(self) -> None:
        """What is recorded: reads and writes nothing but the buffers, and may be done again."""
        with self._head.editing(self._steer):
            logits = self._cache.forward([self], self._ids, self._positions)[:, -1]
        if not self.logits.numel():  # in a warm-up, thus outside the memory that graphs share
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)

    def _steer(self, hidden: Tensor) -> Tensor:
        """Note the pre-logits [R, 1, D] and add the offsets."""
        last = hidden[:, -1].float()
        self.hidden.copy_(last)
        steered = (last + self._offset).to(hidden.dtype)[:, None]
        return torch.cat([steered, hidden]) if self._bucket.both else steered

    def __len__(self) -> int:
        """Number of rows, padding included."""
        return self._bucket.rows

    def attend(
        self,
        index: int,
        layer: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """See ``SlotStore.attend``: the same over all columns, those that do not count yet masked."""
        if layer.source == index:
            self.write(index, key, value)
        keys, values = self._own[layer.source]
        prompt, mask = self._prompt[layer.source], self._mask(layer.window)
        return attend_rows(query, keys, values, prompt, mask, scoring)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See ``SlotStore.write``."""
        for buffer, new in zip(self._own[layer], (key, value), strict=True):
            buffer.index_copy_(2, self._column, new)

    def advance(self, tokens: int) -> None:
        """Forget the masks of the pass; the store itself counts tokens."""
        self._masks.clear()

    def _mask(self, window: int | None) -> Tensor:
        """What is added to the scores, [R, 1, 1, 1, P + columns]."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window)
        return self._masks[window]

    def _build_mask(self, window: int | None) -> Tensor:
        device = self._start.device
        columns = torch.arange(self._bucket.columns, device=device)
        prompt = torch.arange(self._bucket.prompt, device=device).expand(len(self), -1)
        exists = torch.cat([prompt < self._prompt_length, (columns >= self._start) & (columns <= self._column)], dim=1)
        if window is not None:
            keys = torch.cat([prompt, self._prompt_length + columns - self._start], dim=1)  # absolute positions
            exists &= self._prompt_length + self._column - self._start - keys < window
        mask = torch.zeros(exists.shape, device=device).masked_fill(~exists, torch.finfo(torch.float32).min / 2)
        return mask[:, None, None, None]


def _room(token: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros [rows, heads, columns, d] for keys or values like those of one token [1, heads, 1, d]."""
    return token.new_zeros(rows, token.shape[1], columns, token.shape[3])
