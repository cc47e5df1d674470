"""What an engine asks of a cache, and the two plain ones.

A *store* is what one part of a wave owns: it is opened on a prompt, keeps chosen prefixes, advances by one token per
step and forgets rows. A *cache* is the way of a model: it prefills prompts, opens stores and runs steps.

* ``SlotCache`` (``slots.py``): the prompt once for all rows, rows of any length and of any request in one forward pass.
* ``ExpandedCache``: transformers' own ``DynamicCache``, the prompt copied to every row, one store per pass, all rows of
  a store equally long. For recurrent and hybrid models and for attention that bypasses the registry.
* ``NoCache``: the whole text again at every step. Slow and always right; the reference for the other two.

``choose_cache`` (``choice.py``) takes the first that gives the logits of the whole text on the model at hand.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

ROW_MULTIPLE = 4  # a CPU's matrix products give a row the same bits for any count of rows from four on


class Unsuited(Exception):
    """The cache does not fit the model; the message completes «… because»."""


class Store(Protocol):
    """The remembered keys and values of some rows that share a prompt."""

    def select(self, rows: Tensor) -> None:
        """Keep only these rows [r] (indices into the present ones), in this order."""


class RaggedStore(Store, Protocol):
    """A store whose rows may have different lengths, so that one may take another's place."""

    column: int

    @property
    def room(self) -> int:
        """How many rows it has memory for, its places or more."""

    def grow(self, count: int) -> None:
        """Have ``count`` places; nobody is in the new ones."""

    def remember(self, places: Tensor, chains: Sequence[tuple[int, ...]]) -> None:
        """Keep what was read of the chains that rows in these places [m] begin with; the newest and most used of it."""

    def recall(self, chains: Sequence[tuple[int, ...]]) -> tuple[list[int], Self]:
        """Which of the chains need not be read again, and a store of rows that begin with them."""

    def put(self, places: Tensor, other: Self) -> None:
        """Give some places [m] to the m rows of another store on the same prompt."""

    def __len__(self) -> int:
        """Number of places."""


class Cache(Protocol):
    """How one model remembers.

    Attributes:
        name: Short name for logs.
        ragged: Whether rows of one store may have different lengths; then its stores are ``RaggedStore``.
        divisible: Whether what was read of a prompt serves its beginnings, too.
        device: Where the model wants its token ids.
    """

    name: str
    ragged: bool
    divisible: bool
    device: torch.device

    def prefill(self, ids: Sequence[int], begun: Any = None, common: int = 0) -> Any:
        """Read a prompt (perhaps empty) once; what comes back is passed to ``open``.

        Args:
            ids: The prompt.
            begun: What ``prefill`` returned for a prompt that begins with the same ``common`` tokens, all of it unless
                the cache is divisible. Those tokens need not be read again. It stays as it is.
            common: Number of those tokens.
        """

    def size(self, prompt: Any) -> int:
        """Bytes that what ``prefill`` returned takes."""

    def row_bytes(self, prompt: int, response: int) -> int:
        """Bytes that a row will take in a store once it has so many tokens; what rows share is not counted."""

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


@runtime_checkable
class RaggedCache(Cache, Protocol):
    """A cache with ragged stores, some of whose rows may read more than one token."""

    def read(self, store: Any, places: Tensor, ids: Tensor, positions: Tensor) -> None:
        """Let the rows in some places [m] of a store read the tokens ids [m, q] at positions [m, q]."""


def decoder_config(model: PreTrainedModel) -> Any:
    """The text part of a configuration."""
    return model.config.get_text_config(decoder=True)


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether some layers keep a state in place of keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model wants its token ids."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.device


class Runner:
    """Calls a model with those of the usual arguments that its ``forward`` knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Look up what the model's ``forward`` takes."""
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
    divisible = False

    def __init__(self, model: PreTrainedModel, most: int | None = None) -> None:
        """Take a model whose ``forward`` accepts a transformers cache; raise ``Unsuited`` otherwise.

        Args:
            model: The model.
            most: Tokens that may follow a filled cache in one pass, None for any number. Recurrent layers often start
                anew when more than one comes.
        """
        self._run = Runner(model)
        self._model = model
        self._most = most
        self.device = input_device(model)
        if self._run.cache_argument is None:
            raise Unsuited("its forward accepts no transformers cache")
        if most is None and is_recurrent(model) and model.dtype != torch.float32:
            raise Unsuited("its recurrent layers may start anew on several tokens, which only float32 would show")
        self._first_token_bytes, self._token_bytes = self._measure()

    @torch.inference_mode()
    def _measure(self) -> tuple[int, int]:
        """Bytes of a text of one token, the state of recurrent layers with it, and of each further token."""
        one, two = (self.size(self.prefill([0] * length)) for length in (1, 2))
        return one, two - one

    def prefill(self, ids: Sequence[int], begun: tuple[int, Any] | None = None, common: int = 0) -> tuple[int, Any]:
        """Read a prompt (perhaps empty) from its token ``common`` on, see ``Cache``.

        Other pieces than the whole round differently: what was remembered may move a logit's last bits.
        """
        if begun is None or self._most == 1:  # a recurrent layer that starts anew: sooner the whole than one by one
            cache, common = DynamicCache(config=self._model.config), 0
        else:
            cache = copy.deepcopy(begun[1])
        if len(ids) > common:
            positions = torch.arange(common, len(ids), device=self.device)
            self._run(torch.tensor([ids[common:]], device=self.device), positions[None], cache)
        return len(ids), cache

    def size(self, prompt: tuple[int, Any]) -> int:
        """Bytes that a prompt takes."""
        return sum(_bytes_of(layer) for layer in prompt[1].layers)

    def row_bytes(self, prompt: int, response: int) -> int:
        """Bytes of a row with its own copy of the prompt; sliding windows may keep less."""
        return self._first_token_bytes + (prompt + response) * self._token_bytes

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


def _bytes_of(layer: Any) -> int:
    """Bytes of all tensors that a layer of a transformers cache holds, states of recurrent ones too."""
    held = [part for value in vars(layer).values() for part in (value.values() if isinstance(value, dict) else [value])]
    return sum(part.nbytes for part in held if isinstance(part, Tensor))


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
    divisible = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Take any model."""
        self._run = Runner(model)
        self.device = input_device(model)

    def prefill(self, ids: Sequence[int], begun: tuple[int, ...] | None = None, common: int = 0) -> tuple[int, ...]:
        """Nothing is read yet."""
        return tuple(ids)

    def size(self, prompt: tuple[int, ...]) -> int:
        """Bytes that a prompt takes."""
        return sys.getsizeof(prompt)

    def row_bytes(self, prompt: int, response: int) -> int:
        """Only token ids stay; what reading a text takes for a moment nobody knows."""
        return 8 * (prompt + response)

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
