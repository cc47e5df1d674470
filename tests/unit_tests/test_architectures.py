"""Every architecture of the table: the hook, the caches and the engine against the plain model."""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertLMHeadModel,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlamaModel,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from langchain_aisp import noise
from langchain_aisp.engine.choice import choose_cache
from langchain_aisp.engine.loading import context_length
from langchain_aisp.engine.transformers import TransformersEngine
from langchain_aisp.sampling import draw
from langchain_aisp.types import Sampling, Wave
from tests.architectures import BY_TITLE, SIZES, VOCABULARY, WINDOW, build, configuration, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
SPECIAL = (0, 1, 2)  # padding, beginning, end
CHAT = [{"role": "user", "content": "w7 w31 w12 w90 w44 w7 w65 w23 w101"}]
LENGTH = 9

every_architecture = pytest.mark.parametrize("title", BY_TITLE)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for message in messages %}{{ message.content }} {% endfor %}",
    )


@pytest.fixture(scope="module")
def engine_of(tokenizer):
    engines: dict[str, TransformersEngine] = {}

    def make(title: str) -> TransformersEngine:
        if title not in engines:
            engines[title] = TransformersEngine(build(BY_TITLE[title]), tokenizer, name=title)
        return engines[title]

    yield make
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def plain_of():
    return cache(Plain)


class Shifted(nn.Module):
    """A head in front of which something is added, by plain means: no hook."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.offset: Tensor | None = None  # [n, D]

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(hidden if self.offset is None else hidden + self.offset[:, None])


class Plain:
    """A second copy of an engine's model: no hook, no cache of ours, a ``Shifted`` head in the place of its own."""

    def __init__(self, title: str) -> None:
        self.model = build(BY_TITLE[title])
        head = self.model.get_output_embeddings()
        self.head = Shifted(head)
        name = next(name for name, module in self.model.named_modules() if module is head)
        parent, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, self.head)

    @torch.inference_mode()
    def read(self, texts: list[list[int]], offset: Tensor) -> Tensor:
        """Logits [n, V] after each text, nothing remembered; shorter texts are padded at their ends."""
        self.head.offset = offset
        longest = max(map(len, texts))
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        logits = self.model(input_ids=ids, use_cache=False).logits
        return torch.stack([row[len(text) - 1] for row, text in zip(logits, texts, strict=True)])

    def generate(self, ids: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        """Logits [steps, n, V] of transformers' ``generate`` when it is made to say ``tokens`` [steps, n]."""
        seen = []

        def note_and_force(_: Tensor, scores: Tensor) -> Tensor:
            step = len(seen)
            seen.append(scores.clone())
            self.head.offset = offsets[min(step + 1, len(offsets) - 1)]
            return torch.full_like(scores, -torch.inf).scatter(1, tokens[step][:, None], 0.0)

        self.head.offset = offsets[0]
        self.model.generate(
            ids, max_new_tokens=len(tokens), do_sample=False, logits_processor=[note_and_force], **NO_PADDING
        )
        return torch.stack(seen)


# transformers' own step of these differs from its own prefill; elsewhere 1e-5 standard deviations of the logits hold.
STEP_DIFFERENCE = {"Nemotron-H": 1e-3, "Zamba 2": 1e-3}
# Given a state, transformers mixes up the rows of a batch in these.
DECODES_ONE_ROW = {"RWKV"}
NO_PADDING = {"pad_token_id": 0, "eos_token_id": None}


@dataclass(frozen=True)
class Noise:
    """Open-loop steering: normal noise of a fixed size."""

    width: int
    size: float
    open_loop: bool = True

    def offset(self, rows: Tensor, positions: Tensor, keys: Tensor, hidden: Tensor | None) -> Tensor:
        return self.size * noise.normal(keys, self.width)


def allowed(logits: Tensor) -> Tensor:
    """Logits without the special tokens, of which the engine says none before ``min_tokens``."""
    return logits.float().index_fill(1, torch.tensor(SPECIAL), -torch.inf)


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference of logits, in their standard deviations."""
    return float((got - expected).abs().max() / expected.std())


def test_the_table_of_the_documentation_is_the_table_of_the_tests() -> None:
    assert table() in DOCUMENT.read_text()


@every_architecture
def test_an_architecture_takes_the_cache_of_the_table(title: str, engine_of) -> None:
    assert engine_of(title).cache.name == BY_TITLE[title].cache


@every_architecture
def test_steered_steps_give_the_logits_of_generate_with_a_shifted_head(title: str, engine_of, plain_of) -> None:
    """Prompt and two cached, batched steps, each row with an offset of its own, in float32."""
    engine, rows, steps = engine_of(title), 3, 3
    ids = engine.encode(CHAT).ids
    tokens = torch.tensor([[11, 80, 35], [52, 11, 97], [20, 21, 22]])
    offsets = 0.5 * noise.normal(torch.arange(steps * rows).view(steps, rows), engine.head.width)

    with torch.inference_mode():
        zeros = torch.zeros(rows, dtype=torch.int64)
        store = engine.cache.open(engine.cache.prefill(ids[:-1]), [()], zeros, zeros)
        got = []
        for step, fed in enumerate([torch.full((rows,), ids[-1]), *tokens[:-1]]):
            with engine._head.editing(lambda hidden, v=offsets[step]: hidden + v[:, None]):
                got.append(engine.cache.step([(store, fed, zeros + len(ids) - 1 + step)], 0))

    plain = plain_of(title)
    batches = [slice(n, n + 1) for n in range(rows)] if title in DECODES_ONE_ROW else [slice(None)]
    prompts = torch.tensor([ids] * rows)
    expected = torch.cat([plain.generate(prompts[here], tokens[:, here], offsets[:, here]) for here in batches], dim=1)
    assert difference(torch.stack(got), expected) < STEP_DIFFERENCE.get(title, 1e-5)
    assert difference(expected[0], expected[1]) > 0.1


@every_architecture
def test_argmax_without_noise_is_greedy_generate(title: str, engine_of, plain_of) -> None:
    engine = engine_of(title)
    prompt = engine.encode(CHAT)
    empty = torch.zeros(1, LENGTH, dtype=torch.int64)
    wave = Wave(prompt, empty, empty[:, 0], empty, Sampling(LENGTH, LENGTH, temperature=0))
    got = engine.submit(wave).future.result()
    plain = plain_of(title)
    plain.head.offset = None
    expected = plain.model.generate(
        torch.tensor([prompt.ids]), max_new_tokens=LENGTH, do_sample=False, suppress_tokens=list(SPECIAL), **NO_PADDING
    )
    assert got.tokens[0].tolist() == expected[0, len(prompt.ids) :].tolist()


@every_architecture
def test_rows_with_kept_prefixes_say_what_the_whole_text_says(title: str, engine_of, plain_of) -> None:
    """Steered, at temperature 1, ragged cuts: the plain model reads the whole text again for every token."""
    engine = engine_of(title)
    prompt = engine.encode(CHAT)
    prefix = 3 + noise.fold(5, torch.arange(5 * LENGTH)).remainder(VOCABULARY - 3).view(5, LENGTH)
    prefix[3] = prefix[2]
    cut = torch.tensor([0, 3, 6, 5, 3])
    keys = noise.wave_keys(prompt.key, 1, torch.arange(5), LENGTH)
    steering = Noise(engine.head.width, 0.3)
    got = engine.submit(Wave(prompt, prefix, cut, keys, Sampling(LENGTH, LENGTH), steering)).future.result()

    plain = plain_of(title)
    rows = [prefix[n, : cut[n]].tolist() for n in range(5)]
    while live := [n for n in range(5) if len(rows[n]) < LENGTH]:
        here = torch.stack([keys[n, len(rows[n])] for n in live])
        logits = plain.read([[*prompt.ids, *rows[n]] for n in live], 0.3 * noise.normal(here, engine.head.width))
        ones = torch.ones(len(live))
        drawn = draw(allowed(logits), noise.uniform(here), ones, ones, torch.zeros(len(live), dtype=torch.int64))
        for n, token in zip(live, drawn.tolist(), strict=True):
            rows[n].append(token)
    assert got.tokens.tolist() == rows


@pytest.mark.parametrize("title", ["Mistral", "gpt-oss", "Gemma 4", "ModernBERT decoder"])
def test_windows_are_read_from_the_masks_of_the_model(title: str, engine_of) -> None:
    windows = {layer.window for layer in engine_of(title).cache._layers}
    assert WINDOW in windows
    assert windows <= {WINDOW, None}


def test_layers_that_share_keys_store_them_once(engine_of) -> None:
    assert [layer.source for layer in engine_of("Gemma 4").cache._layers] == [0, 1, 0, 1]


def test_a_model_that_reads_images_too_is_read_by_its_text_part() -> None:
    text = {**BY_TITLE["Gemma 3"].sizes, **SIZES}
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**image, "image_size": 28, "patch_size": 14}
    )
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is Gemma3ForConditionalGeneration
    assert [layer.window for layer in choose_cache(model)._layers] == [WINDOW, None]


def test_windows_far_beyond_the_trial_are_found() -> None:
    sizes = {"sliding_window": 3000, "max_position_embeddings": 5000}
    model = AutoModelForCausalLM.from_config(configuration("mistral", **sizes))
    assert [layer.window for layer in choose_cache(model)._layers] == [3000, 3000]


def test_chunks_far_beyond_the_trial_are_no_windows(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"attention_chunk_size": 2500, "max_position_embeddings": 5000, "num_local_experts": 2}
    sizes["layer_types"] = ["chunked_attention", "full_attention"]
    caplog.set_level(logging.INFO, "langchain_aisp")
    cache = choose_cache(AutoModelForCausalLM.from_config(configuration("llama4_text", **sizes)))
    assert cache.name == "expanded"
    assert "neither all tokens before it nor a sliding window" in caplog.text


def test_texts_end_where_rotary_frequencies_change() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope |= {"original_max_position_embeddings": 16}
    sizes = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    model = AutoModelForCausalLM.from_config(configuration("phi3", **sizes))
    assert context_length(model) == 16
    assert context_length(build(BY_TITLE["Llama"])) == 64


def test_the_spread_of_a_head_counts_what_scales_its_logits(engine_of) -> None:
    engine = engine_of("Cohere")
    unscaled = engine._head.module.weight.detach().std() * engine.head.width**0.5
    assert engine.head.spread == pytest.approx(float(unscaled) * engine.model.config.logit_scale, rel=0.1)


class Bypassing(LlamaForCausalLM):
    """Looks like a Llama, but computes its logits without calling its head."""

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)


def encoder() -> PreTrainedModel:
    model = BertLMHeadModel(configuration("bert"))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter)
    return model


MUSIC = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
EXCEPTIONS = {
    "encoder and decoder": (
        lambda: AutoModelForSeq2SeqLM.from_config(configuration("t5", d_model=32, d_kv=8, d_ff=48, num_layers=1)),
        "is an encoder and a decoder",
    ),
    "no head": (lambda: LlamaModel(configuration("llama")), "has no head"),
    "several heads": (lambda: MusicgenForCausalLM(MusicgenDecoderConfig(**MUSIC)), "has 4 heads"),
    "a head that is not called": (lambda: Bypassing(configuration("llama")), "calls 0 times"),
    "an encoder": (encoder, "sees the tokens that follow"),
}


@pytest.mark.parametrize("case", EXCEPTIONS)
def test_a_model_that_cannot_be_steered_is_refused(case: str, tokenizer) -> None:
    make, reason = EXCEPTIONS[case]
    with pytest.raises(ValueError, match=reason):
        TransformersEngine(make(), tokenizer)
