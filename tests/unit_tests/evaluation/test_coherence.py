"""Coherence by embeddings: LangChain's, and the pooler output that papers use."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from langchain_aisp.evaluation.coherence import PoolerEmbeddings, coherence, load_embeddings
from langchain_aisp.evaluation.metrics import cosine

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "where", "is", "my", "parcel", "on", "its", "way"]


class Letters:
    """Embeds a text by how often it has each of two letters; counts its calls."""

    calls = 0

    def embed_documents(self, texts):
        self.calls += 1
        return [[float(text.count("a")), float(text.count("b"))] for text in texts]


@pytest.fixture
def encoder(tmp_path):
    """A tiny BERT with a tokenizer of words."""
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **sizes)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_coherence_is_the_cosine_of_prompt_and_answer_in_one_call():
    embeddings = Letters()
    assert coherence(embeddings, ["aa", "ab", "a"], ["a", "a", " "]) == pytest.approx([1.0, 0.5**0.5, 0.0])
    assert embeddings.calls == 1


def test_the_pooler_output_of_a_text_does_not_depend_on_its_neighbours(encoder):
    embeddings = load_embeddings(f"pooler:{encoder}")
    assert isinstance(embeddings, PoolerEmbeddings)
    texts = ["where is my parcel", "on its way", "where"]
    together = embeddings.embed_documents(texts)
    for text, vector in zip(texts, together, strict=True):
        [alone] = embeddings.embed_documents([text])
        assert alone == pytest.approx(vector, abs=1e-5)
    assert cosine(together[0], together[1]) < 0.9999


def test_only_the_first_tokens_are_read(encoder):
    short = PoolerEmbeddings(encoder, max_tokens=4)
    first, second = short.embed_documents(["where is my parcel", "where is on its way"])
    assert first == pytest.approx(second, abs=1e-5)


def test_an_id_without_a_prefix_is_a_model_of_sentence_transformers(monkeypatch):
    class Model:
        def __init__(self, path):
            assert path == "some/model"

        def encode(self, texts, show_progress_bar):
            return torch.tensor([[float(len(text))] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    assert load_embeddings("some/model").embed_documents(["a", "abc"]) == [[1.0], [3.0]]


def test_without_sentence_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"langchain-aisp\[eval\]"):
        load_embeddings("some/model").embed_documents(["a"])
