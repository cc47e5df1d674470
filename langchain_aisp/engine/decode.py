"""Decoding: the rows of many waves, one token per step. Knows caches and the head, no queue, no thread, no method."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from llguidance import LLMatcher
from torch import Tensor, nn

from langchain_aisp import noise
from langchain_aisp.engine.cache import ROW_MULTIPLE, Cache, RaggedCache, RaggedStore
from langchain_aisp.engine.deviation import within
from langchain_aisp.engine.grammar import Grammars, Matchers
from langchain_aisp.engine.memory import ALTERNATIVES
from langchain_aisp.sampling import draw, largest
from langchain_aisp.types import FinishReason, Observable, Wave

if TYPE_CHECKING:
    from langchain_aisp.engine.graphs import StepGraphs

_IDLE_SHARE = 8  # one place in so many may be idle where giving up costs more than they do
_REASONS: tuple[FinishReason, ...] = ("stop", "length", "timeout")
_WITHOUT_MASKS: frozenset[Observable] = frozenset({"prelogits", "unchecked_alternatives"})

S = TypeVar("S")


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens a response may hold.

    Attributes:
        forbidden: [V] float32, ``-inf`` where a token may never be drawn, else 0.
        ends: [V] bool, True for tokens that end a response.
        decode: Token ids to text, for stop strings.
        grammars: Grammars as masks over these tokens.
    """

    forbidden: Tensor
    ends: Tensor
    decode: Callable[[Sequence[Sequence[int]]], list[str]]
    grammars: Grammars


class SteeredHead:
    """The one place where pre-logits are seen and changed: a forward-pre-hook on the model's output embeddings."""

    def __init__(self, module: nn.Module) -> None:
        """Install the hook; it does nothing outside ``editing``."""
        self.module = module
        self.calls = 0
        self._edit: Callable[[Tensor], Tensor] | None = None
        self._handle = module.register_forward_pre_hook(self._hook)

    @contextmanager
    def editing(self, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Pass the head's input through ``edit``, which may return more rows than it got."""
        self._edit, self.calls = edit, 0
        try:
            yield
        finally:
            self._edit = None

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def gradient(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Gradient [r, D] of each token's log-probability by the pre-logits: W[token] - E_p W, up to a scaled tail."""
        weight = self.module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            message = f"scores need a head with floating-point weights, this one holds {type(weight).__name__}"
            raise TypeError(message)
        mean = logits.softmax(dim=-1).to(weight.dtype) @ weight
        return (weight[tokens] - mean).float()

    def _hook(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._edit is None:
            return None
        self.calls += 1
        return (self._edit(arguments[0]), *arguments[1:])


class Held:
    """A store whose rows go on in another wave. Going on changes it, so whoever takes it first has it alone."""

    def __init__(self, store: RaggedStore, places: Tensor, matchers: Sequence[LLMatcher]) -> None:
        """Hold a store in which the rows, in the order of their wave, have these places [c]; their matchers, if any."""
        self._store: RaggedStore | None = store
        self._places = places
        self.matchers = matchers

    def take(self, count: int) -> tuple[RaggedStore, Tensor, Tensor] | None:
        """The store with ``count`` places or more, those of its rows and the others; None if it is gone."""
        store, self._store = self._store, None
        if store is None:
            return None
        if len(store) < count:
            store.grow(count)
        taken = torch.zeros(len(store), dtype=torch.bool, device=self._places.device)
        taken[self._places] = True
        return store, self._places, (~taken).nonzero().squeeze(1)


class Rows:
    """Some rows of one wave while they are decoded.

    ``live`` lists the rows that hold a place in the batch. A row that ends keeps its place, idly, until a few places
    can be given up at once, since the last rows then move into them; or until the wave has enough, since then other
    rows take these places.
    """

    def __init__(
        self, wave: Wave, index: Tensor, cache: Cache, prompt: Any, vocabulary: Vocabulary, context: int, width: int
    ) -> None:
        """Lay out the rows ``index`` [n] of a wave and read what they keep.

        Args:
            wave: The wave.
            index: Which of its rows.
            cache: The model's way to remember.
            prompt: What ``cache.prefill`` made of all prompt tokens but the last.
            vocabulary: Allowed and ending tokens.
            context: Longest text of the model, in tokens.
            width: D, the width of the pre-logits.
        """
        device = cache.device
        self.wave, self.index, self.vocabulary = wave, index, vocabulary
        self.sampling = wave.sampling
        self.steering = _to(wave.steering, device)
        self.limit: int | Tensor = min(self.sampling.max_tokens, context - len(wave.prompt.ids))
        self.rows = index.to(device)
        self.cut = wave.cut[index].to(device)
        self.length = self.cut.clone()
        self.keys = wave.keys[index].to(device)
        self.uniforms = noise.uniform(self.keys)
        temperature = torch.tensor(self.sampling.temperature)
        self._choices = (  # tensors, so that a step makes none out of Python numbers
            (temperature if wave.temperatures is None else wave.temperatures[index]).to(device),
            torch.tensor(self.sampling.top_p, device=device),
            torch.tensor(self.sampling.top_k, device=device),
        )
        kept = torch.arange(self.keys.shape[1], device=device) < self.cut[:, None]
        given = wave.prefix[index].to(device)
        self.tokens = torch.where(kept, given, -1)
        self.script = given if wave.forced else None  # [n, L], what is said whatever is drawn; -1 after it
        if self.script is not None:
            self.limit = (self.script >= 0).sum(dim=1).clamp(max=self.limit)
        self.reason = torch.full_like(self.length, -1)  # index into _REASONS, -1 while the row is decoded
        self.told = torch.zeros_like(self.reason, dtype=torch.bool)  # which ends have been taken note of
        last = self.tokens.gather(1, (self.cut - 1).clamp(min=0)[:, None]).squeeze(1)
        self._end((self.cut > 0) & vocabulary.ends[last.clamp(min=0)], "stop")
        if self.sampling.stop:
            self._end_at_stop_strings((self.cut > 0).nonzero().squeeze(1))
        self._end(self.length >= self.limit, "length")
        if self.script is not None and not wave.observe and self.sampling.grammar is None and not self.sampling.stop:
            self._say_script(self.script)
        self._ragged = cache if isinstance(cache, RaggedCache) else None
        self.enough = wave.enough if len(index) == len(wave) else None
        self.live = (self.reason < 0).nonzero().squeeze(1)
        self.has_enough = self.enough != 0 and self._has_enough(len(self.live))
        self._going_on: Sequence[LLMatcher] = ()  # of the first rows
        self.store: Any = self._go_on(cache, prompt) or (
            self._open(cache, prompt, self.live) if len(self.live) else None
        )
        self.matchers = self._open_matchers()
        self.kl_left = self._nats_to_spend()
        self.masks_first = self._masks_first()
        self._may_skip = not (wave.forced or self.sampling.stop or "prelogits" in wave.observe)
        self.observed = self._room_for_observations(width)
        self.error: Exception | None = None  # a steering or grammar that raised spoils its own wave alone

    def __len__(self) -> int:
        """Places held in the batch."""
        return len(self.live)

    @property
    def room(self) -> int:
        """How many rows it has memory for."""
        return len(self) if self._ragged is None or self.store is None else self.store.room

    def choices(self) -> Sequence[Tensor]:
        """Temperature, top-p and top-k of the live rows, [r] each."""
        return [each[self.live] if each.dim() else each.expand(len(self)) for each in self._choices]

    @torch.inference_mode()
    def hold(self) -> Held | None:
        """What unfinished rows need in order to go on in another wave; None where the cache reads it again."""
        unfinished = self.reason[self.live] < 0
        places, others = unfinished.nonzero().squeeze(1), (~unfinished).nonzero().squeeze(1)
        if self._ragged is None or not len(places) or self.store.column == 0:
            return None
        if len(others):
            self.store.remember(others, self._chains(self.live[others]))
        places = places[self.live[places].argsort()]
        matchers = [] if self.matchers is None else [self.matchers.matchers[place] for place in places.tolist()]
        return Held(self.store, places, matchers)

    @property
    def unfinished(self) -> Tensor:
        """[n] bool, the rows that have not ended."""
        return self.reason < 0

    @property
    def position(self) -> Tensor:
        """[r] int64, the response position each live row is about to fill."""
        return self.length[self.live]

    @property
    def sampled_tokens(self) -> int:
        """Tokens decoded so far."""
        return int((self.length - self.cut).sum())

    @property
    def observes_base(self) -> bool:
        """Whether something is wanted of the unsteered logits."""
        return bool(self.wave.observe - {"prelogits"})

    @property
    def needs_both(self) -> bool:
        """Whether the unsteered logits are needed beside steered ones."""
        return self.steering is not None and (self.observes_base or self.kl_left is not None)

    def feed(self) -> tuple[Any, Tensor, Tensor]:
        """Store, next input tokens [r] and their absolute positions [r]."""
        stream = self._stream(self.live)
        position = self.position
        last = stream.gather(1, position[:, None]).squeeze(1)
        return self.store, last, len(self.wave.prompt.ids) - 1 + position

    def forbid(self, *logits: Tensor) -> None:
        """Set to ``-inf``, in place in [r, V] each, what is known of the live rows' next token before it is drawn."""
        if self.masks_first:
            forbidden = self._forbidden(range(len(self)), self._forced(), check=True)
            for each in logits:
                each.masked_fill_(forbidden, -torch.inf)
        elif self.matchers is None and bool((early := self.position < self.sampling.min_tokens).any()):
            for each in logits:  # a grammar says itself when a response may end
                each[early.nonzero(), self.vocabulary.ends.nonzero().T] = -torch.inf

    def _forbidden(self, places: Sequence[int], forced: Sequence[list[int]], *, check: bool) -> Tensor:
        """[a, V] bool, what rows in these places may not say: all but a forced token, or what breaks their grammar."""
        assert self.matchers is not None
        forbidden = self.matchers.forbidden(places, check=check)
        for row, place in enumerate(places) if any(forced) else ():
            if forced[place] and not forbidden[row, forced[place][0]]:
                forbidden[row] = True
                forbidden[row, forced[place][0]] = False
        return forbidden.to(self.live.device)

    def _forced(self) -> list[list[int]]:
        """For each live row, the tokens that its grammar leaves no choice of; a script may cut the text otherwise."""
        assert self.matchers is not None
        runs = self.matchers.forced(range(len(self)))
        if self.script is None or not any(runs):
            return runs
        said = self.script[self.live, self.position.clamp(max=self.script.shape[1] - 1)].tolist()
        return [run if run[:1] == [token] else [] for run, token in zip(runs, said, strict=True)]

    def see(self, hidden: Tensor) -> None:
        """Observe the model's own pre-logits [r, D] of the live rows, if they are wanted."""
        if "prelogits" in self.observed:
            active = self.reason[self.live] < 0
            live = self.live[active]
            self.observed["prelogits"][live, self.length[live]] = hidden[active].float()

    def offset(self, hidden: Tensor | None) -> Tensor:
        """What the wave's steering adds to the pre-logits [r, D] of the live rows; None will do for an open loop."""
        assert self.steering is not None
        position = self.position
        keys = self.keys[self.live].gather(1, position[:, None].clamp(max=self.keys.shape[1] - 1)).squeeze(1)
        seen = None if hidden is None or self.steering.open_loop else hidden.float()
        offset = self.steering.offset(self.rows[self.live], position, keys, seen)
        if not bool(offset.isfinite().all()):
            message = f"{type(self.steering).__name__} gave an offset that is not finite"
            raise FloatingPointError(message)
        return offset

    def within_budget(self, steered: Tensor, base: Tensor) -> Tensor:
        """The steered logits [r, V] of the live rows, as near to the unsteered ones as their KL budget asks."""
        if self.kl_left is None or self.error is not None:
            return steered
        left = self.kl_left[self.live]
        logits, kl = within(steered, base, left)
        active = self.reason[self.live] < 0
        live = self.live[active]
        self.kl_left[live] = (left - kl)[active].nextafter(left.new_zeros(()))  # rounding must not add to the budget
        self.observed["kl"][live, self.length[live]] = kl[active]
        return logits

    def accept(
        self, tokens: Tensor, logits: Tensor, base: Tensor | None, head: SteeredHead, *, skip: bool = True
    ) -> None:
        """Append one token per live row, observe what is wanted, end and drop rows.

        Args:
            tokens: [r], drawn from the logits.
            logits: [r, V] that rows draw from again where their grammar refuses the token.
            base: [r, V], the unsteered ones, to be observed.
            head: Knows the gradient.
            skip: Whether tokens that are forced may be read at once; a graph's keys cannot move.
        """
        active = self.reason[self.live] < 0
        live, tokens = self.live[active], tokens[active]
        position = self.length[live]
        if self.script is not None:
            tokens = self.script[live, position]
        seen = None if base is None else base[active]
        forced = None
        if self.matchers is not None and self.error is None:
            places = active.nonzero().squeeze(1)
            try:
                forced = self._forced()
                if seen is not None and not self.masks_first and self.wave.observe - _WITHOUT_MASKS:
                    seen.masked_fill_(self._forbidden(places.tolist(), forced, check=False), -torch.inf)
                tokens = self._obey(self.matchers, places, tokens, logits, seen, forced)
            except Exception as error:
                self.error = error
        if seen is not None:
            self._observe(live, position, tokens, seen, head)
        self.tokens[live, position] = tokens
        self.length[live] = position + 1
        ended = torch.zeros_like(self.reason, dtype=torch.bool)
        ended[live] = self.vocabulary.ends[tokens]
        self._end(ended, "stop")
        if self.sampling.stop:
            self._end_at_stop_strings(live)
        self._end(self.length >= self.limit, "length")
        if self._ragged is not None and self._may_skip and skip and forced is not None and self.error is None:
            self._skip(self._ragged, forced)
        self._give_up_places()

    def _obey(
        self,
        matchers: Matchers,
        places: Tensor,
        tokens: Tensor,
        logits: Tensor,
        seen: Tensor | None,
        forced: Sequence[list[int]],
    ) -> Tensor:
        """The tokens [a] of rows in these places: forced ones, and others for those that the grammar refuses.

        Where it refuses one, what is ``seen`` [a, V] is restricted to what it allows.
        """
        rows, said = places.tolist(), tokens.tolist()
        if any(forced) and not self.masks_first:
            said = [forced[row][0] if forced[row] else token for row, token in zip(rows, said, strict=True)]
            tokens = torch.tensor(said, device=tokens.device)
        refused = matchers.consume(rows, [[token] for token in said])
        if not refused:
            return tokens
        if self.script is not None or self.masks_first:
            message = (
                f"the grammar refuses the token {said[refused[0]]} at position {int(self.position[rows[refused[0]]])}"
            )
            raise RuntimeError(message)
        again = places[refused]
        forbidden = matchers.forbidden(again.tolist()).to(logits.device)
        keys = self.keys[self.live[again]].gather(1, self.position[again, None]).squeeze(1)
        uniforms = noise.uniform(noise.fold(keys, noise.REDRAWN_STREAM))
        choices = [each[again] for each in self.choices()]
        if seen is not None:
            seen[refused] = seen[refused].masked_fill(forbidden, -torch.inf)
        tokens = tokens.clone()
        tokens[refused] = draw(logits[again].masked_fill(forbidden, -torch.inf), uniforms, *choices)
        if matchers.consume(again.tolist(), tokens[refused, None].tolist()):
            raise RuntimeError("the grammar refuses a token that it had allowed")
        return tokens

    def _skip(self, cache: RaggedCache, forced: Sequence[list[int]]) -> None:
        """Read the rest of forced tokens in one pass, where that spares more rows a step than a step has rows."""
        if max(map(len, forced)) < 2:
            return
        going, counts = (self.reason[self.live] < 0).tolist(), self.length[self.live].tolist()
        limits = [self.limit] * len(going) if isinstance(self.limit, int) else self.limit[self.live].tolist()
        spared: dict[int, list[int]] = {}
        for place, run in enumerate(forced):
            if going[place] and len(run) > 1:
                spared.setdefault(min(len(run) - 1, limits[place] - counts[place]), []).append(place)
        for count, members in spared.items():
            if count * len(members) > len(self):
                self._say_at_once(cache, members, [forced[place][: count + 1] for place in members])

    def _say_at_once(self, cache: RaggedCache, places: list[int], runs: list[list[int]]) -> None:
        """Append runs of forced tokens, equally long, whose first token is there already."""
        assert self.matchers is not None
        device, at = self.live.device, torch.tensor(places, device=self.live.device)
        said, rows = torch.tensor(runs, device=device), self.live[at]
        where = self.length[rows][:, None] + torch.arange(said.shape[1] - 1, device=device)  # of all but the first
        cache.read(self.store, at, said[:, :-1], len(self.wave.prompt.ids) + where - 1)
        if self.matchers.consume(places, [run[1:] for run in runs]):
            self.error = RuntimeError("the grammar refuses tokens that it had said must follow")
        self.tokens[rows[:, None], where] = said[:, 1:]
        self.length[rows] += where.shape[1]
        if "alternatives" in self.observed:  # there are none; all else that is observed is 0 where nothing is chosen
            self.observed["alternatives"][rows[:, None], where, 0] = said[:, 1:].int()
            self.observed["alternative_logprobs"][rows[:, None], where, 1:] = -torch.inf
        self._end(self.length >= self.limit, "length")

    @torch.inference_mode()
    def cut_off(self) -> None:
        """End every row now: time is up."""
        self._end(torch.ones_like(self.reason, dtype=torch.bool), "timeout")
        self._give_up_places()

    def take_ended(self) -> list[int]:
        """The rows that have ended since this was asked last."""
        ended = (self.reason >= 0) & ~self.told
        self.told = self.told | ended
        rows: list[int] = ended.nonzero().flatten().tolist()
        return rows

    def written(self, rows: Sequence[int]) -> list[list[int]]:
        """Token ids of some rows so far."""
        lengths = self.length.tolist()
        return [self.tokens[row, : lengths[row]].tolist() for row in rows]

    def finish_reasons(self, rows: Sequence[int] | None = None) -> list[FinishReason]:
        """Why each of these rows ended, or of all; what is said of an unfinished one means nothing."""
        reasons = self.reason.tolist()
        return [_REASONS[reasons[row]] for row in (range(len(reasons)) if rows is None else rows)]

    def _stream(self, rows: Tensor) -> Tensor:
        """The last prompt token followed by the response so far, [r, L + 1]: what follows the prefilled prompt."""
        first = torch.full((len(rows), 1), self.wave.prompt.ids[-1], device=self.tokens.device)
        return torch.cat([first, self.tokens[rows]], dim=1)

    def _open(self, cache: Cache, prompt: Any, rows: Tensor) -> Any:
        longest, parents = maximal_chains(self._chains(rows))
        return cache.open(prompt, longest, torch.tensor(parents, device=rows.device), self.length[rows])

    def _chains(self, rows: Tensor) -> list[tuple[int, ...]]:
        """What was, or is to be, read of some rows after the prefilled prompt: all but their last token."""
        streams = zip(self._stream(rows).tolist(), self.length[rows].tolist(), strict=True)
        return [tuple(stream[:count]) for stream, count in streams]

    def _go_on(self, cache: Cache, prompt: Any) -> Any:
        """The store that the first rows come with, the others in places that are free there; None if there is none.

        Rows that have ended already get no place, and nothing of them is read.
        """
        count, whole = len(self.index), len(self.index) == len(self.wave)
        found = self.wave.held.take(len(self.live)) if whole and self.wave.held is not None else None
        if found is None:
            return None
        store, places, free = found
        assert self.wave.held is not None
        self._going_on = self.wave.held.matchers
        others = torch.arange(len(places), count, device=self.live.device)
        others = others[self.reason[others] < 0]
        if len(others):
            known, recalled = store.recall(self._chains(others))
            store.put(free[known], recalled)
            if unknown := sorted({*range(len(others))} - {*known}):
                store.put(free[unknown], self._open(cache, prompt, others[unknown]))
        live = self.live.new_full((len(store),), -1)
        live[places], live[free[: len(others)]] = torch.arange(len(places), device=live.device), others
        taken = _close_ranks(live >= 0)
        if len(taken) < len(store):
            store.select(taken)
        self.live = live[taken]
        return store

    def _has_enough(self, active: int) -> bool:
        """Whether the wave may come back while so many rows are still being decoded."""
        return self.enough is not None and len(self.index) - active >= self.enough

    def _masks_first(self) -> bool:
        """Whether the grammar has to restrict the distribution before anything is drawn from it.

        Elsewhere a token is drawn from all and, if the grammar refuses it, once more from what is allowed. It then has
        p(x) + (1 - A) p(x) / A = p(x) / A, where A is what is allowed in all: the same distribution, and as long as
        the model keeps to the grammar by itself no mask is ever made. Not so under top-k and top-p, which are to look
        at the allowed tokens only, and under a budget of nats.
        """
        narrowed = self.sampling.top_p < 1 or self.sampling.top_k > 0
        return self.matchers is not None and (narrowed or self.kl_left is not None)

    def _open_matchers(self) -> Matchers | None:
        if self.sampling.grammar is None:
            return None
        known, live = self._going_on, zip(self.live.tolist(), self.position.tolist(), strict=True)
        rows = [known[row] if row < len(known) else self.tokens[row, :count].tolist() for row, count in live]
        return self.vocabulary.grammars.open(self.sampling.grammar, rows)

    def _say_script(self, script: Tensor) -> None:
        """Say all of it at once: where nothing is observed and no text has to be looked at, the model is not needed."""
        positions = torch.arange(script.shape[1], device=script.device)
        ends = self.vocabulary.ends[script.clamp(min=0)] & (script >= 0) & (positions >= self.cut[:, None])
        first_end = torch.where(ends, positions, script.shape[1]).amin(dim=1)
        length = torch.minimum(first_end + 1, torch.as_tensor(self.limit, device=script.device))
        going = self.reason < 0
        self.length = torch.where(going, length, self.length)
        said = going[:, None] & (positions < self.length[:, None])
        self.tokens = torch.where(said, script, self.tokens)
        self._end(first_end < length, "stop")
        self._end(self.length >= self.limit, "length")

    def _end(self, ended: Tensor, reason: FinishReason) -> None:
        self.reason[ended & (self.reason < 0)] = _REASONS.index(reason)

    def _end_at_stop_strings(self, live: Tensor) -> None:
        longest = max(len(stop.encode()) for stop in self.sampling.stop) + 2  # a token holds a byte or more
        rows = [row for row in live.tolist() if self.reason[row] < 0]
        if not rows:
            return
        lengths = self.length.tolist()
        tails = [self.tokens[row, max(0, lengths[row] - longest) : lengths[row]].tolist() for row in rows]
        texts = self.vocabulary.decode(tails)
        for row, text in zip(rows, texts, strict=True):
            if any(stop in text for stop in self.sampling.stop):
                self.reason[row] = _REASONS.index("stop")

    def _give_up_places(self) -> None:
        active = self.reason[self.live] < 0
        count = int(active.sum())
        self.has_enough = self._has_enough(count)
        if count == 0:
            self.live, self.store = self.live[:0], None
        elif not self.has_enough and len(self.live) - count >= self._idle_at_most():
            if self.enough is not None:
                self.store.remember((gone := (~active).nonzero().squeeze(1)), self._chains(self.live[gone]))
            places = _close_ranks(active)
            self.live = self.live[places]
            self.store.select(places)
            if self.matchers is not None:
                self.matchers.select(places.tolist())

    def _idle_at_most(self) -> float:
        """So many idle places are given up.

        On a CPU an idle row costs nearly as much as another one. Elsewhere it costs little, and less than a graph that
        has to take the others anew.
        """
        if self._ragged is not None and self.rows.device.type == "cpu":
            return ROW_MULTIPLE
        return max(ROW_MULTIPLE, len(self) // _IDLE_SHARE) if self.enough is None else math.inf

    def _nats_to_spend(self) -> Tensor | None:
        """Nats [n] that each row may still be steered away from the model; None where nothing bounds or steers it."""
        left = self.wave.kl_left
        return None if left is None or self.steering is None else left[self.index].to(self.rows.device)

    def _room_for_observations(self, width: int) -> dict[str, Tensor]:
        rows, length = self.tokens.shape
        kept = min(ALTERNATIVES, len(self.vocabulary.ends))
        room = self.tokens.new_zeros
        wide: tuple[Observable, ...] = ("scores", "prelogits")
        observed: dict[str, Tensor] = {
            name: room((rows, length, width), dtype=torch.float32) for name in wide if name in self.wave.observe
        }
        if "base_logprobs" in self.wave.observe:
            observed["base_logprobs"] = room((rows, length), dtype=torch.float32)
        if self.wave.observe & {"alternatives", "unchecked_alternatives"}:
            observed["alternatives"] = room((rows, length, kept), dtype=torch.int32)
            observed["alternative_logprobs"] = room((rows, length, kept), dtype=torch.float32)
        if self.kl_left is not None:
            observed["kl"] = room((rows, length), dtype=torch.float32)
        return observed

    def _observe(self, live: Tensor, position: Tensor, tokens: Tensor, base: Tensor, head: SteeredHead) -> None:
        logprobs = base.log_softmax(dim=-1)
        if "base_logprobs" in self.observed:
            self.observed["base_logprobs"][live, position] = logprobs.gather(1, tokens[:, None]).squeeze(1)
        if "alternatives" in self.observed:
            values, ids = largest(logprobs, self.observed["alternatives"].shape[-1])
            self.observed["alternatives"][live, position] = ids.int()
            self.observed["alternative_logprobs"][live, position] = values
        if "scores" in self.observed:
            self.observed["scores"][live, position] = head.gradient(tokens, base)


def _close_ranks(active: Tensor) -> Tensor:
    """Of rows [n] the active ones [r], in new places: the last ones where others have ended, all others as before."""
    places = active.nonzero().squeeze(1)
    count = len(places)
    ranks = torch.arange(count, device=places.device)
    ranks[~active[:count]] = places[places >= count]
    return ranks


def maximal_chains(chains: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The chains that are no beginning of another one, and for each given chain which of them it begins."""
    longest: list[tuple[int, ...]] = []
    owner: dict[tuple[int, ...], int] = {}
    for chain in sorted(set(chains), key=len, reverse=True):
        parent = next((i for i, other in enumerate(longest) if other[: len(chain)] == chain), len(longest))
        if parent == len(longest):
            longest.append(chain)
        owner[chain] = parent
    return longest, [owner[chain] for chain in chains]


def split(wave: Wave, cache: Cache, most: int) -> list[Tensor]:
    """The wave's rows in parts that one store can hold: at most ``most`` rows, equally long ones if it must be."""
    rows = torch.arange(len(wave))
    groups = [rows] if cache.ragged else [rows[wave.cut == cut] for cut in wave.cut.unique().tolist()]
    return [part for group in groups for part in group.split(most)]


@torch.inference_mode()
def decode_step(cache: Cache, head: SteeredHead, batch: Sequence[Rows], graphs: StepGraphs | None = None) -> None:
    """Give every live row of the batch its next token: in one forward pass if the cache can, else one per part."""
    for together in [batch] if cache.ragged else [[rows] for rows in batch]:
        _forward(cache, head, together, graphs)


def _forward(cache: Cache, head: SteeredHead, batch: Sequence[Rows], graphs: StepGraphs | None) -> None:
    count = sum(map(len, batch))
    both = any(rows.needs_both for rows in batch)
    logits = None if graphs is None or len(batch) > 1 else _replay(graphs, batch[0], both)
    if logits is None:
        padding = -count % ROW_MULTIPLE if cache.ragged else 0
        with head.editing(lambda hidden: _steer(hidden, batch, both)):
            logits = cache.step([rows.feed() for rows in batch], padding)
    padding = len(logits) // (1 + both) - count
    vocabulary = batch[0].vocabulary
    logits = logits.float() + vocabulary.forbidden
    steered, base = logits[:count], logits[count + padding :][:count] if both else logits[:count]
    for rows, here in _places(batch):
        try:
            rows.forbid(*([steered[here], base[here]] if both else [steered[here]]))
        except Exception as error:
            rows.error = error
        if rows.kl_left is not None:
            steered[here] = rows.within_budget(steered[here], base[here])
    tokens = _draw(steered, batch)
    if int(tokens.max()) >= logits.shape[1]:  # what drawing from NaN gives
        message = "the model's logits are not numbers; load it in bfloat16 or float32, float16 overflows easily"
        raise FloatingPointError(message)
    for rows, here in list(_places(batch)):  # accepting drops rows
        seen = base[here] if rows.observes_base else None
        rows.accept(tokens[here], steered[here], seen, head, skip=graphs is None)


def _replay(graphs: StepGraphs, rows: Rows, both: bool) -> Tensor | None:
    """The logits of a step by a graph, None where there is none: steering that looks at the pre-logits acts amid it."""
    offset = None
    if rows.steering is not None:
        if not rows.steering.open_loop:
            return None
        try:
            offset = rows.offset(None)
        except Exception as error:
            rows.error = error
    found = graphs.step(*rows.feed(), offset, both)
    if found is None:
        return None
    logits, hidden = found
    rows.see(hidden)
    return logits


def _places(batch: Sequence[Rows]) -> Iterator[tuple[Rows, slice]]:
    """Each part with the places of its rows in the batch."""
    first = 0
    for rows in batch:
        yield rows, slice(first, first := first + len(rows))


def _steer(hidden: Tensor, batch: Sequence[Rows], both: bool) -> Tensor:
    """Add each part's offsets to the head's input [R, 1, D]; with ``both``, the unsteered rows follow."""
    steered = hidden
    for rows, here in _places(batch):
        last = hidden[here, -1]
        rows.see(last)
        if rows.steering is not None:
            if steered is hidden:
                steered = hidden.clone()
            try:
                steered[here, -1] = (last.float() + rows.offset(last)).to(hidden.dtype)
            except Exception as error:
                rows.error = error
    return torch.cat([steered, hidden]) if both else steered


def _draw(logits: Tensor, batch: Sequence[Rows]) -> Tensor:
    position = [rows.position.clamp(max=rows.uniforms.shape[1] - 1) for rows in batch]
    uniforms = [
        rows.uniforms[rows.live].gather(1, at[:, None]).squeeze(1) for rows, at in zip(batch, position, strict=True)
    ]

    temperature, top_p, top_k = (torch.cat(each) for each in zip(*(rows.choices() for rows in batch), strict=True))
    return draw(logits, torch.cat(uniforms), temperature, top_p, top_k)


def time_is_up(deadline: float | None) -> bool:
    """Whether a deadline on the monotonic clock has passed."""
    return deadline is not None and time.monotonic() >= deadline


def _to(value: S, device: torch.device) -> S:
    """A steering with its tensors, and those of the steerings in it, on the engine's device."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device)
    elif isinstance(value, tuple):
        moved = tuple(_to(part, device) for part in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _to(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        moved = dataclasses.replace(value, **fields)
    return cast(S, moved)
