"""The fast caches against their plain twin, which reads every text again: ``NoCache``."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from langchain_aisp.engine import decode, slots
from langchain_aisp.engine.cache import ExpandedCache, NoCache
from langchain_aisp.engine.choice import choose_cache
from langchain_aisp.engine.slots import SlotCache
from tests.architectures import BY_TITLE, VOCABULARY, build, configuration

PROMPT = [7, 31, 12, 90, 44, 7, 65, 23]
CHAINS = [[11, 80, 35, 52, 99], [11, 80, 4]]
PARENTS = [0, 1, 0, 1, 0]
KEPT = [5, 3, 1, 0, 2]

# grouped heads, windows, caps with windows, sinks with windows, shared keys, latent keys, one head of keys
KINDS = ["Llama", "Mistral", "Gemma 2", "gpt-oss", "Gemma 4", "DeepSeek-V3", "GPT-BigCode"]
every_kind = pytest.mark.parametrize("title", KINDS)


@pytest.fixture(scope="module")
def model_of():
    models: dict[str, PreTrainedModel] = {}

    def make(title: str) -> PreTrainedModel:
        if title not in models:
            usual = BY_TITLE[title]
            models[title] = build(replace(usual, sizes={**usual.sizes, "max_position_embeddings": 256}))
        return models[title]

    return make


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


class Twins:
    """Rows in a store of a fast cache, and each of them alone in a store of ``NoCache``."""

    def __init__(self, fast, plain: NoCache, prompt: list[int], chains, parents, kept, read=None) -> None:
        """``read`` is what the fast cache made of the prompt, if it has read it already."""
        self.fast, self.plain = fast, plain
        read = fast.prefill(prompt) if read is None else read
        self.store = fast.open(read, chains, torch.tensor(parents), torch.tensor(kept))
        self.texts = [[*prompt, *chains[parent][:count]] for parent, count in zip(parents, kept, strict=True)]
        self.alone = [plain.open(text, [()], torch.tensor([0]), torch.tensor([0])) for text in self.texts]

    def feed(self, seed: int) -> tuple[object, Tensor, Tensor]:
        """The next tokens of all rows, in the form a cache takes."""
        tokens = torch.randint(3, VOCABULARY, (len(self.texts),), generator=torch.Generator().manual_seed(seed))
        return self.store, tokens, torch.tensor([len(text) for text in self.texts])

    def expect(self, tokens: Tensor) -> Tensor:
        """Logits [n, V] of the rows, each read alone."""
        for text, token in zip(self.texts, tokens.tolist(), strict=True):
            text.append(token)
        positions = torch.zeros(1, dtype=torch.int64)  # NoCache counts them itself
        rows = zip(self.alone, tokens.split(1), strict=True)
        return torch.cat([self.plain.step([(store, token, positions)], 0) for store, token in rows])

    def select(self, rows: list[int]) -> None:
        self.store.select(torch.tensor(rows))
        self.texts, self.alone = ([column[row] for row in rows] for column in (self.texts, self.alone))


def agree(parts: list[Twins], steps: int, padding: int = 0, tolerance: float = 1e-4) -> None:
    """Decode some steps in one pass for all parts; within a tolerance in standard deviations of the logits."""
    for step in range(steps):
        batch = [part.feed(seed=17 * step + i) for i, part in enumerate(parts)]
        got = parts[0].fast.step(batch, padding)
        expected = torch.cat([part.expect(tokens) for part, (_, tokens, _) in zip(parts, batch, strict=True)])
        assert got.shape[0] == expected.shape[0] + padding
        error = (got[: len(expected)].float() - expected.float()).abs().max() / expected.float().std()
        assert error < tolerance, f"step {step}"


def random_text(length: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def passes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """A list that grows by the shape of the input at every forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: shapes.append(tuple(ids[0].shape)))
    return shapes


def twins(model: PreTrainedModel, *, prompt=PROMPT, chains=CHAINS, parents=PARENTS, kept=KEPT) -> Twins:
    return Twins(SlotCache(model), NoCache(model), prompt, chains, parents, kept)


@every_kind
def test_rows_that_keep_different_lengths_are_right(title: str, model_of) -> None:
    agree([twins(model_of(title))], steps=4)


@every_kind
def test_rows_that_leave_do_not_disturb_the_others(title: str, model_of) -> None:
    part = twins(model_of(title))
    agree([part], steps=2)
    part.select([4, 1, 2])
    agree([part], steps=2)
    part.select([1])
    agree([part], steps=1)


@every_kind
def test_stores_of_several_prompts_decode_in_one_pass_with_padding(title: str, model_of) -> None:
    model = model_of(title)
    fast, plain = SlotCache(model), NoCache(model)
    parts = [
        Twins(fast, plain, PROMPT, CHAINS, PARENTS, KEPT),
        Twins(fast, plain, [5, 9], [[8, 8, 8]], [0, 0], [3, 3]),
        Twins(fast, plain, [3] * 11, [()], [0], [0]),
    ]
    agree(parts, steps=3, padding=2)


@pytest.mark.parametrize(("title", "kind"), [("Llama", SlotCache), ("Llama", ExpandedCache), ("Bamba", ExpandedCache)])
def test_one_prompt_serves_several_stores_that_know_nothing_of_each_other(title: str, kind, model_of) -> None:
    fast, plain = kind(model_of(title)), NoCache(model_of(title))
    read = fast.prefill(PROMPT)
    first = Twins(fast, plain, PROMPT, CHAINS, PARENTS, [3] * 5, read)
    agree([first], steps=1)
    second = Twins(fast, plain, PROMPT, [()], [0, 0], [0, 0], read)
    agree([second], steps=2)
    agree([first], steps=1)


@pytest.mark.parametrize("active", [[1, 1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 0, 0, 0]])
def test_rows_close_ranks_and_only_those_move_that_must(active: list[int], model_of) -> None:
    part = twins(model_of("Llama"), parents=[0, 1, 0, 0, 1, 0, 0], kept=[3, 2, 1, 0, 2, 3, 0])
    agree([part], steps=2)
    memory = part.store.buffers[0][0].data_ptr()
    places = decode._close_ranks(torch.tensor(active, dtype=torch.bool)).tolist()
    assert sorted(places) == [place for place, stays in enumerate(active) if stays]
    assert all(place == new for new, place in enumerate(places) if place < len(places))
    part.select(places)
    assert len(part.store) == len(places)
    assert (part.store.room, part.store.buffers[0][0].data_ptr()) == (7, memory)  # nobody was copied but to move
    agree([part], steps=2)
    part.select([0])
    assert part.store.room == 1  # for so few rows so much memory is not kept
    agree([part], steps=2)


@pytest.mark.parametrize("title", ["Llama", "Gemma 2"])
def test_buffers_grow_beyond_their_first_columns(title: str, model_of) -> None:
    part = twins(model_of(title), kept=[5, 3, 1, 0, 2])
    agree([part], steps=slots._COLUMN_BLOCK - 3)
    part.select([0, 2, 3])
    agree([part], steps=6)
    assert next(iter(part.store.buffers.values()))[0].shape[2] == 2 * slots._COLUMN_BLOCK


@every_kind
def test_a_prompt_of_one_token_leaves_nothing_to_prefill(title: str, model_of) -> None:
    agree([twins(model_of(title), prompt=[])], steps=3)
    agree([twins(model_of(title), prompt=[], chains=[()], parents=[0, 0], kept=[0, 0])], steps=3)


@pytest.mark.parametrize("title", [kind for kind in KINDS if kind != "gpt-oss"])  # it has experts
def test_keys_of_a_prompt_have_the_same_bits_whatever_was_read_before(title: str, model_of) -> None:
    cache = SlotCache(model_of(title))
    text = random_text(150)
    for known, length in ((70, 150), (64, 129), (149, 150), (150, 150), (130, 100), (130, 128), (10, 66)):
        begun = cache.prefill(text[:known])
        prompt, whole = cache.prefill(text[:length], begun, min(known, length)), cache.prefill(text[:length])
        assert prompt.length == length
        for layer, pair in prompt.layers.items():
            for part, expected in zip(pair, whole.layers[layer], strict=True):
                assert torch.equal(part, expected), (known, length)


@every_kind
def test_rows_on_a_prompt_of_several_pieces_are_right(title: str, model_of) -> None:
    agree([twins(model_of(title), prompt=random_text(150))], steps=2)


def test_a_gpu_reads_prompts_in_large_pieces_from_the_first_new_token_on(model_of, monkeypatch) -> None:
    monkeypatch.setattr(slots, "_PIECE", 40)
    model = model_of("Llama")
    fast, plain = SlotCache(model), NoCache(model)
    fast._on_cpu = False
    text = random_text(150)
    shapes = passes(model)
    read = fast.prefill(text, fast.prefill(text[:60]), 60)
    assert [width for _, width in shapes] == [40, 20, 40, 40, 10]
    agree([Twins(fast, plain, text, CHAINS, PARENTS, KEPT, read)], steps=2)


@pytest.mark.parametrize("title", ["Llama", "Bamba", "Mamba"])
def test_the_copied_cache_continues_a_prompt_and_leaves_it_as_it_was(title: str, model_of) -> None:
    """Other pieces round differently, so this is no equality of bits."""
    model = model_of(title)
    fast, plain = ExpandedCache(model, 1 if title == "Mamba" else None), NoCache(model)
    text = random_text(30)
    begun = fast.prefill(text[:18])
    for _ in range(2):
        agree([Twins(fast, plain, text, [()], [0, 0], [0, 0], fast.prefill(text, begun, 18))], steps=2)


def test_bfloat16_stays_within_its_rounding() -> None:
    model = build(BY_TITLE["Llama"]).to(torch.bfloat16)
    agree([twins(model)], steps=4, tolerance=0.1)


def test_a_prompt_is_stored_once_and_its_chains_are_read_in_one_pass(model_of) -> None:
    model = model_of("Llama")
    fast = SlotCache(model)
    prompt = fast.prefill(PROMPT)
    shapes = passes(model)
    store = fast.open(prompt, CHAINS, torch.tensor(PARENTS), torch.tensor(KEPT))
    assert shapes == [(2, 5)]  # two chains, the longer one of five tokens
    assert store.prompt is prompt
    assert {keys.shape[1] for keys, _ in prompt.layers.values()} == {len(PROMPT)}
    assert {keys.shape[2] for keys, _ in store.buffers.values()} == {max(KEPT)}


def test_the_attention_of_a_model_is_its_own_again_after_a_pass(model_of) -> None:
    model = model_of("Llama")
    before = model.config._attn_implementation
    agree([twins(model)], steps=1)
    assert model.config._attn_implementation == before
    with pytest.raises(IndexError):
        SlotCache(model).step([(None, torch.tensor([VOCABULARY + 1]), torch.tensor([0]))], 0)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("title", ["Mamba", "Jamba", "Qwen3-Next", "Llama 4", "Falcon, alibi", "Llama"])
def test_the_copied_cache_keeps_its_stores_apart(title: str, model_of) -> None:
    """Each store in passes of its own, by turns; some models read kept tokens one at a time."""
    model = model_of(title)
    most = 1 if title in ("Mamba", "Jamba") else None
    fast, plain = ExpandedCache(model, most), NoCache(model)
    parts = [
        Twins(fast, plain, PROMPT, CHAINS, [0, 1, 1], [3, 3, 3]),
        Twins(fast, plain, [5], [[8, 8, 9]], [0, 0], [2, 2]),
        Twins(fast, plain, [], [()], [0], [0]),
    ]
    for turn in range(3):
        for part in parts:
            agree([part], steps=1)
        parts[0].select([1, 0][: 2 - turn] or [0])


def test_recurrent_layers_are_read_token_by_token_where_rounding_would_hide_a_fault() -> None:
    model = build(BY_TITLE["Mamba 2"]).to(torch.bfloat16)
    assert choose_cache(model)._most == 1
    assert choose_cache(model.float())._most is None


def test_a_cache_that_is_wrong_is_passed_over_and_the_log_says_so(
    model_of, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "langchain_aisp")
    monkeypatch.setattr(slots.SlotStore, "_mask", lambda *_: None)
    assert choose_cache(model_of("Llama")).name == "expanded"
    assert "LlamaForCausalLM cannot use slots: its logits are off by" in caplog.text


def test_a_model_without_a_usable_cache_warns_that_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(configuration("openai-gpt"))
    assert choose_cache(model).name == "none"
    assert "OpenAIGPTLMHeadModel decodes without a cache, which is slow" in caplog.text
