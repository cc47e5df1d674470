"""Every architecture of the table: the hook, the caches and the engine against the plain model."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
)

from langchain_aisp import noise
from langchain_aisp.engine.transformers import TransformersEngine
from langchain_aisp.sampling import draw
from langchain_aisp.types import Sampling, Wave
from tests.architectures import BY_TITLE, VOCABULARY, build, table

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
def test_steered_steps_give_the_logits_of_generate_with_a_shifted_head(title: str, engine_of) -> None:
    """Prompt and two cached, batched steps; within 1e-5 standard deviations of the logits (float32)."""
    engine, rows, steps = engine_of(title), 3, 3
    ids = engine.encode(CHAT).ids
    tokens = torch.tensor([[11, 80, 35], [52, 11, 97], [20, 21, 22]])
    offsets = 0.5 * noise.normal(torch.arange(steps * rows).view(steps, rows), engine.head.width)

    cache = engine.cache
    store = cache.open(
        cache.prefill(ids[:-1]), [()], torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    )
    got = []
    for step, fed in enumerate([torch.full((rows,), ids[-1]), *tokens[:-1]]):
        with torch.inference_mode(), engine._head.editing(lambda hidden, v=offsets[step]: hidden + v[:, None]):
            got.append(cache.step([(store, fed, torch.full((rows,), len(ids) - 1 + step))], 0))

    expected = Plain(title).generate(torch.tensor([ids] * rows), tokens, offsets)
    assert difference(torch.stack(got), expected) < 1e-5
    assert difference(expected[0], expected[1]) > 0.1


@every_architecture
def test_argmax_without_noise_is_greedy_generate(title: str, engine_of) -> None:
    engine = engine_of(title)
    prompt = engine.encode(CHAT)
    empty = torch.zeros(1, LENGTH, dtype=torch.int64)
    wave = Wave(prompt, empty, empty[:, 0], empty, Sampling(LENGTH, LENGTH, temperature=0))
    got = engine.submit(wave).future.result()
    expected = build(BY_TITLE[title]).generate(
        torch.tensor([prompt.ids]), max_new_tokens=LENGTH, do_sample=False, suppress_tokens=list(SPECIAL), **NO_PADDING
    )
    assert got.tokens[0].tolist() == expected[0, len(prompt.ids) :].tolist()
    assert len(set(got.tokens[0].tolist())) > 2


@every_architecture
def test_rows_with_kept_prefixes_say_what_the_whole_text_says(title: str, engine_of) -> None:
    """Steered, at temperature 1, ragged cuts: the plain model reads the whole text again for every token."""
    engine = engine_of(title)
    prompt = engine.encode(CHAT)
    prefix = 3 + noise.fold(5, torch.arange(5 * LENGTH)).remainder(VOCABULARY - 3).view(5, LENGTH)
    prefix[3] = prefix[2]
    cut = torch.tensor([0, 3, 6, 5, 3])
    keys = noise.wave_keys(prompt.key, 1, torch.arange(5), LENGTH)
    steering = Noise(engine.head.width, 0.3)
    got = engine.submit(Wave(prompt, prefix, cut, keys, Sampling(LENGTH, LENGTH), steering)).future.result()

    plain = Plain(title)
    rows = [prefix[n, : cut[n]].tolist() for n in range(5)]
    while live := [n for n in range(5) if len(rows[n]) < LENGTH]:
        here = torch.stack([keys[n, len(rows[n])] for n in live])
        logits = plain.read([[*prompt.ids, *rows[n]] for n in live], 0.3 * noise.normal(here, engine.head.width))
        ones = torch.ones(len(live))
        drawn = draw(allowed(logits), noise.uniform(here), ones, ones, torch.zeros(len(live), dtype=torch.int64))
        for n, token in zip(live, drawn.tolist(), strict=True):
            rows[n].append(token)
    assert got.tokens.tolist() == rows
