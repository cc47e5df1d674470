"""Steps by graphs against eager steps. Nothing is recorded: the stand-in for a graph runs the step itself again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.decode import SteeredHead
from langchain_aisp.engine.graphs import Bucket, StepGraphs
from langchain_aisp.engine.slots import SlotCache
from langchain_aisp.methods.published import GaussianSteering
from langchain_aisp.types import Grammar, Rollouts, Wave
from tests import tiny
from tests.architectures import BY_TITLE, VOCABULARY, build

CHAT = [
    {"role": "user", "content": "Where is my parcel? It was promised for Tuesday, and nobody tells me why it is late."}
]
EVERYTHING = frozenset({"base_logprobs", "alternatives", "scores", "prelogits"})


class Recorder:
    """Captures as CUDA would, with two warm-ups, but replays by running again; counts."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        for _ in range(2):
            run()

        def replay() -> None:
            self.replays += 1
            run()

        return replay


@pytest.fixture(scope="module")
def plain() -> TransformersEngine:
    return TransformersEngine(tiny.model(), tiny.tokenizer())


@pytest.fixture
def engine() -> TransformersEngine:
    return with_graphs(Recorder())


def with_graphs(capture: Callable[[Callable[[], None]], Callable[[], None]]) -> TransformersEngine:
    engine = TransformersEngine(tiny.model(), tiny.tokenizer())
    engine._graphs = StepGraphs(engine.cache, engine._head, engine.head.width, capture)
    return engine


def recorder(engine: TransformersEngine) -> Recorder:
    return engine._graphs._capture


def decode(engine: TransformersEngine, wave: Wave) -> Rollouts:
    return engine.submit(wave).future.result(timeout=60)


def plain_wave(engine: TransformersEngine, rows: int = 9, length: int = 90, **options: object) -> Wave:
    """Rows that end by and by; their columns outgrow the first bucket."""
    return tiny.wave(engine.encode(CHAT, seed=3), rows, length, **{"stop": ("a", "b", "c"), **options})


def children(parents: Rollouts, wave: Wave) -> Wave:
    """Rows that keep prefixes of several lengths."""
    parent = torch.arange(len(wave)) % 3
    cut = torch.minimum(torch.arange(len(wave)) * 2, parents.lengths[parent] - 1)
    return replace(wave, prefix=parents.tokens[parent], cut=cut)


def test_waves_that_decode_alone_say_the_same_by_graphs(engine, plain) -> None:
    wave = plain_wave(engine)
    parents = decode(plain, wave)
    assert torch.equal(decode(engine, wave).tokens, parents.tokens)
    branches = children(parents, wave)
    assert torch.equal(decode(engine, branches).tokens, decode(plain, branches).tokens)
    assert recorder(engine).replays > 60


@pytest.mark.parametrize("observe", [frozenset(), EVERYTHING])
def test_steering_and_observation_act_through_the_buffers(engine, plain, observe) -> None:
    steering = GaussianSteering(torch.full((12, 32), 0.3), 0.5)
    wave = plain_wave(engine, 6, 16, steering=steering, observe=observe)
    got, expected = decode(engine, wave), decode(plain, wave)
    assert torch.equal(got.tokens, expected.tokens)
    assert not torch.equal(got.tokens, decode(engine, replace(wave, steering=None)).tokens)
    for name, values in expected.observed.items():
        torch.testing.assert_close(got.observed[name], values, atol=1e-4, rtol=1e-4)


def test_forced_tokens_are_said_one_by_one_by_graphs(engine, plain) -> None:
    """They are not read in one pass there: the rows' keys would move."""
    key = '{"type": "object", "properties": {"customer_name": {"type": "integer"}}, "required": ["customer_name"]}'
    wave = tiny.wave(engine.encode(CHAT, seed=4), 8, 40, grammar=Grammar(f"start: %json {key}"))
    assert torch.equal(decode(engine, wave).tokens, decode(plain, wave).tokens)
    assert recorder(engine).replays >= 20


def test_each_bucket_is_recorded_once(engine) -> None:
    wave = plain_wave(engine)
    decode(engine, wave)
    used, captures = set(engine._graphs._known), recorder(engine).captures
    assert captures == len(used) > 2  # fewer rows, more columns
    decode(engine, wave)
    decode(engine, replace(wave, keys=wave.keys + 1))
    assert recorder(engine).captures == len(engine._graphs._known)
    assert {bucket.rows for bucket in engine._graphs._known} <= {4, 8, 16}
    assert used <= set(engine._graphs._known)


def test_shapes_are_rounded_up_to_few_buckets() -> None:
    assert Bucket.around(1, 1, 0, False) == Bucket(4, 64, 64, False)
    assert Bucket.around(9, 64, 65, True) == Bucket(16, 64, 128, True)
    assert Bucket.around(32, 65, 1000, False) == Bucket(32, 128, 1024, False)
    assert len({Bucket.around(rows, 70, 300, False) for rows in range(1, 257)}) == 7


def test_several_requests_decode_together_without_graphs_and_alone_with_them(engine, plain) -> None:
    waves = [plain_wave(engine, 6, 60, stop=(), min_tokens=60), plain_wave(engine, 3, 8, stop=(), min_tokens=8)]
    with engine._wake:
        tickets = [engine.submit(wave) for wave in waves]
    for ticket, wave in zip(tickets, waves, strict=True):
        assert torch.equal(ticket.future.result(timeout=60).tokens, decode(plain, wave).tokens)
    assert recorder(engine).replays == 52  # the first eight steps were shared


def test_steering_that_looks_at_the_pre_logits_decodes_without_graphs(engine, plain) -> None:
    class Negation:
        open_loop = False

        def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
            return -2 * hidden

    wave = plain_wave(engine, 3, 6, steering=Negation())
    assert torch.equal(decode(engine, wave).tokens, decode(plain, wave).tokens)
    assert recorder(engine).replays == 0


def test_a_model_whose_steps_cannot_be_recorded_decodes_without_graphs(plain, caplog) -> None:
    tries = []

    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        run()
        tries.append(1)
        message = "operation not permitted when stream is capturing"
        raise RuntimeError(message)

    engine = with_graphs(refuse)
    wave = plain_wave(engine, 5, 20)
    for _ in range(2):
        assert torch.equal(decode(engine, wave).tokens, decode(plain, wave).tokens)
    assert len(tries) == 1
    assert "without CUDA graphs, a step could not be recorded: operation not permitted" in caplog.text


def test_a_broken_steering_fails_its_wave_and_no_other(engine, plain) -> None:
    class Broken:
        open_loop = True

        def offset(self, *_: object) -> Tensor:
            message = "a bug in the steering"
            raise ValueError(message)

    with pytest.raises(ValueError, match="a bug in the steering"):
        decode(engine, plain_wave(engine, 3, 6, steering=Broken()))
    wave = plain_wave(engine, 3, 6)
    assert torch.equal(decode(engine, wave).tokens, decode(plain, wave).tokens)


def test_graphs_are_refused_where_there_is_no_cuda() -> None:
    with pytest.raises(ValueError, match="cuda_graphs=True needs a model on a CUDA device, .* is on cpu"):
        TransformersEngine(tiny.model(), tiny.tokenizer(), cuda_graphs=True)


# windows, caps with windows, sinks with windows, shared keys, latent keys, one head of keys
@pytest.mark.parametrize("title", ["Mistral", "Gemma 2", "gpt-oss", "Gemma 4", "DeepSeek-V3", "GPT-BigCode"])
@torch.inference_mode()
def test_every_kind_of_attention_gives_the_same_logits_by_graphs(title: str) -> None:
    model = build(BY_TITLE[title])
    cache, head = SlotCache(model), SteeredHead(model.get_output_embeddings())
    graphs = StepGraphs(cache, head, head.module.in_features, Recorder())
    prompt, chains = [7, 31, 12, 90, 44, 7, 65, 23], [[11, 80, 35, 52, 99], [11, 80, 4]]
    parents, kept = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([5, 3, 1, 0, 2])
    rows = {2: torch.tensor([0, 4, 2, 3]), 4: torch.tensor([3, 1])}  # the last row moves; some are copied
    read = cache.prefill(prompt)
    eager, graphed = (cache.open(read, chains, parents, kept) for _ in range(2))
    positions = len(prompt) + kept
    for step in range(7):
        if step in rows:
            eager.select(rows[step])
            graphed.select(rows[step])
            positions = positions[rows[step]]
        ids = torch.randint(3, VOCABULARY, (len(positions),), generator=torch.Generator().manual_seed(step))
        expected = cache.step([(eager, ids, positions)], 0)
        logits, hidden = graphs.step(graphed, ids, positions, torch.zeros(len(ids), head.module.in_features), False)
        error = (logits[: len(ids)] - expected).abs().max() / expected.std()
        assert error < 1e-4, f"step {step}"
        assert hidden.shape == (len(ids), head.module.in_features)
        positions = positions + 1
