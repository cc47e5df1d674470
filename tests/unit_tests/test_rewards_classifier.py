"""Reward models: their scores, their forms, their loading; tiny random ones that the tests write."""

import copy
import json
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_rewards_conversation import byte_tokenizer, word_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    MistralModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from langchain_aisp.rewards import ClassifierReward, RewardError
from langchain_aisp.rewards.checkpoint import LoadedClassifier
from langchain_aisp.rewards.conversation import ConversationEncoder
from langchain_aisp.rewards.scorer import Scorer, Settings
from langchain_aisp.types import Response

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = [{"role": "user", "content": "hello there"}]
TEXTS = ["good", "bad bad bad bad", "", "good hello there bad good", "there", "good", "hello " * 9]
PAIRS = [(CHAT, Response(text)) for text in TEXTS]


def tiny_llama(labels=1, **options):
    torch.manual_seed(0)
    settings = {"vocab_size": 262, "pad_token_id": None, "max_position_embeddings": 256, "num_labels": labels}
    model = LlamaForSequenceClassification(LlamaConfig(**(SIZES | settings | options)))
    model.score.weight.data.normal_()  # the default scores are so small that faults would hide in rounding
    return model.eval()


def tiny_bert(labels=1, **options):
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "max_position_embeddings": 128, "num_labels": labels, "initializer_range": 0.5}
    return BertForSequenceClassification(BertConfig(**(SIZES | settings | options))).eval()


def tiny_roberta():
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=40, max_position_embeddings=66, num_labels=1, pad_token_id=0, **SIZES)
    config.initializer_range = 0.5
    return RobertaForSequenceClassification(config).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=2, n_positions=256, num_labels=1)
    return GPT2ForSequenceClassification(config).eval()


def scores(reward, pairs=PAIRS):
    return reward.submit(pairs).future.result(timeout=60)


@torch.inference_mode()
def scored_alone(model, tokenizer, pairs=PAIRS):
    """The score of each text by the model's own forward, one at a time and without padding."""
    encoder = ConversationEncoder(tokenizer, chat_template=None, add_bos=None, add_eos=None, max_length=None)
    ids = [torch.tensor([encoder.encode(chat, response.text)]) for chat, response in pairs]
    return torch.stack([model(input_ids=each, attention_mask=torch.ones_like(each)).logits[0] for each in ids])


MODELS = {
    "llama": (tiny_llama, byte_tokenizer),
    "gpt2": (tiny_gpt2, byte_tokenizer),
    "bert": (tiny_bert, word_tokenizer),
    "roberta": (tiny_roberta, word_tokenizer),
}


@pytest.mark.parametrize("kind", MODELS)
def test_scores_depend_neither_on_batch_size_nor_on_padding(kind):
    model, tokenizer = MODELS[kind][0](), MODELS[kind][1]()
    expected = scored_alone(model, tokenizer).squeeze(1)
    assert expected.unique().numel() == len(set(TEXTS))  # a constant score would pass any test below
    for batch_size in (1, 2, 3, 32):
        answer = scores(ClassifierReward(model, tokenizer, batch_size=batch_size))
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)
        assert answer.dtype == torch.float32
    one_by_one = torch.cat([scores(ClassifierReward(model, tokenizer), [pair]) for pair in PAIRS])
    torch.testing.assert_close(one_by_one, expected, atol=1e-5, rtol=1e-5)


LONG_CHAT = [{"role": "user", "content": "hello there good " * 8}]
CROWD = [(LONG_CHAT, Response(text)) for text in (*TEXTS, "bad good")]
ELSEWHERE = [(CHAT, Response(text)) for text in ("good", "bad")]


def tiny_mistral():
    torch.manual_seed(0)
    options = {"vocab_size": 262, "num_labels": 1, "num_key_value_heads": 1, "sliding_window": 16, "pad_token_id": None}
    model = MistralForSequenceClassification(MistralConfig(**(SIZES | options)))
    model.score.weight.data.normal_()
    return model.eval()


@pytest.mark.parametrize(("make", "shares"), [(tiny_llama, True), (tiny_gpt2, True), (tiny_mistral, False)])
def test_a_conversation_is_read_once_for_all_its_candidates_where_that_moves_no_score(make, shares):
    model, tokenizer = make(), byte_tokenizer()
    pairs = CROWD + ELSEWHERE
    expected = scored_alone(model, tokenizer, pairs).squeeze(1)
    reward = ClassifierReward(model, tokenizer)
    reward.load()  # tries the model out
    sizes = []
    model.base_model.register_forward_pre_hook(
        lambda _, arguments, named: sizes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    torch.testing.assert_close(scores(reward, pairs), expected, atol=1e-5, rtol=1e-5)
    assert [rows for rows, _ in sizes] == ([1, 8, 2] if shares else [10])
    read = sum(rows * width for rows, width in sizes)
    encoder = ConversationEncoder(tokenizer, chat_template=None, add_bos=None, add_eos=None, max_length=None)
    whole = sum(len(encoder.encode(chat, response.text)) for chat, response in pairs)
    assert (read < 0.6 * whole) == shares


def test_a_model_that_looks_ahead_reads_every_text_as_a_whole():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    model.base_model.register_forward_hook(lambda module, inputs, out: _mixed(out))
    scorer = Scorer(LoadedClassifier(model, tokenizer), Settings())
    assert not scorer.can_share


def _mixed(out):
    """Every token's state with a bit of its text's other tokens."""
    out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(dim=1, keepdim=True)
    return out


def test_a_padding_token_that_is_also_the_end_token_moves_no_score():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # many decoders come like this; pooling before the padding would skip it
    expected = scored_alone(model, tokenizer).squeeze(1)  # without a pad_token_id the model reads the last token
    model.config.pad_token_id = tokenizer.eos_token_id
    torch.testing.assert_close(scores(ClassifierReward(model, tokenizer)), expected, atol=1e-5, rtol=1e-5)


def test_a_class_of_unknown_origin_never_sees_padding():
    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.config = SimpleNamespace(num_labels=1, id2label={0: "score"}, name_or_path="unknown")

        def forward(self, input_ids, attention_mask):
            assert attention_mask.all()
            return SimpleNamespace(logits=input_ids.sum(dim=1, keepdim=True) * self.weight)

    answer = scores(ClassifierReward(Unknown(), byte_tokenizer()))
    assert answer[0] == answer[5]
    assert answer.unique().numel() == len(set(TEXTS))


def test_the_log_probability_of_one_label_is_the_reward():
    model, tokenizer = tiny_bert(3, id2label={0: "bad", 1: "neutral", 2: "good"}), word_tokenizer()
    expected = scored_alone(model, tokenizer).log_softmax(-1)[:, 2]
    for label in ("good", 2):
        torch.testing.assert_close(
            scores(ClassifierReward(model, tokenizer, label=label)), expected, atol=1e-5, rtol=1e-5
        )


def test_labels_that_do_not_exclude_each_other_are_judged_one_by_one():
    model, tokenizer = tiny_llama(3, problem_type="multi_label_classification"), byte_tokenizer()
    expected = torch.nn.functional.logsigmoid(scored_alone(model, tokenizer)[:, 1])
    answer = scores(ClassifierReward(model, tokenizer, label=1))
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "label", "told"),
    [
        (2, None, "The model has 2 labels: LABEL_0, LABEL_1. Pass label="),
        (2, "good", "label 'good' is unknown"),
        (2, 2, "label 2 is out of range"),
        (1, "good", "has one output and takes no label"),
    ],
)
def test_a_label_that_does_not_fit_is_explained(labels, label, told):
    with pytest.raises(RewardError, match=told):
        scores(ClassifierReward(tiny_llama(labels), byte_tokenizer(), label=label))


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_gives_the_scores_of_the_model_in_memory(folder):
    expected = scores(ClassifierReward(tiny_llama(), byte_tokenizer()))
    torch.testing.assert_close(scores(ClassifierReward.from_pretrained(folder, device="cpu")), expected)


def test_a_cpu_computes_in_float32_whatever_the_checkpoint_holds(tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    expected = scores(ClassifierReward(tiny_llama().bfloat16().float(), byte_tokenizer()))
    torch.testing.assert_close(scores(ClassifierReward.from_pretrained(tmp_path, device="cpu")), expected)
    coarse = scores(ClassifierReward.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16))
    torch.testing.assert_close(coarse, expected, atol=0.2, rtol=0.1)
    assert not torch.equal(coarse, expected)


def test_equal_arguments_share_one_model_also_after_pickling(folder):
    first = ClassifierReward.from_pretrained(folder)
    second = pickle.loads(pickle.dumps(ClassifierReward.from_pretrained(folder, batch_size=2, name="two")))
    assert (second.name, second.settings.batch_size) == ("two", 2)
    first.load()
    second.load()
    assert first._scorer._model is second._scorer._model
    torch.testing.assert_close(scores(first), scores(second), atol=1e-5, rtol=1e-5)
    other = ClassifierReward.from_pretrained(folder, dtype="float64")
    other.load()
    assert other._scorer._model is not first._scorer._model


def test_a_model_in_memory_is_copied_as_itself_and_not_pickled():
    reward = ClassifierReward(tiny_llama(), byte_tokenizer())
    assert copy.deepcopy(reward) is reward
    with pytest.raises(TypeError, match="from_pretrained"):
        pickle.dumps(reward)


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path):
    MistralModel(MistralConfig(vocab_size=262, num_key_value_heads=2, **SIZES)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"no trained weights for score.weight.*scalar_head"):
        ClassifierReward.from_pretrained(tmp_path).load()


def write_scalar_head_checkpoint(path, form):
    """A Mistral backbone and ``regression_head``, as Eurus-RM has them: the weights of both in the same files."""
    torch.manual_seed(0)
    backbone = MistralModel(MistralConfig(vocab_size=262, num_key_value_heads=2, **SIZES)).eval()
    head = torch.randn(1, 32)
    backbone.config.architectures = ["EurusRewardModel"]
    backbone.config.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    tensors["regression_head.weight"] = head
    if form == "pickle":
        torch.save(tensors, path / "pytorch_model.bin")
    elif form == "one file":
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
        for index, (name, tensor) in enumerate(tensors.items()):
            list(parts.values())[index % 2][name] = tensor
        for file, part in parts.items():
            save_file(part, path / file, metadata={"format": "pt"})
        weight_map = {name: file for file, part in parts.items() for name in part}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return backbone, head


@pytest.mark.parametrize("form", ["one file", "several files", "pickle"])
def test_a_backbone_with_a_scalar_head_is_read_at_the_last_token(tmp_path, form):
    backbone, head = write_scalar_head_checkpoint(tmp_path, form)
    reward = ClassifierReward.from_pretrained(
        tmp_path, scalar_head="regression_head", allow_pickle=form == "pickle", batch_size=3, device="cpu"
    )
    encoder = ConversationEncoder(byte_tokenizer(), chat_template=None, add_bos=None, add_eos=None, max_length=None)
    with torch.inference_mode():
        ids = [torch.tensor([encoder.encode(chat, response.text)]) for chat, response in PAIRS]
        expected = torch.cat([backbone(each).last_hidden_state[:, -1] @ head[0] for each in ids])
    torch.testing.assert_close(scores(reward), expected, atol=1e-4, rtol=1e-4)


def test_pickled_weights_need_a_flag(tmp_path):
    write_scalar_head_checkpoint(tmp_path, "pickle")
    with pytest.raises(RewardError, match="only safetensors are read unless allow_pickle=True"):
        ClassifierReward.from_pretrained(tmp_path, scalar_head="regression_head").load()


def test_pickled_code_is_never_run(tmp_path):
    write_scalar_head_checkpoint(tmp_path, "pickle")
    torch.save({"regression_head.weight": Boom()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RewardError, match="could not be loaded"):
        ClassifierReward.from_pretrained(tmp_path, scalar_head="regression_head", allow_pickle=True).load()


class Boom:
    def __reduce__(self):
        return pytest.fail, ("the checkpoint's code ran",)


@pytest.mark.parametrize(("head", "told"), [("value_head", "no tensor 'value_head.weight'"), ("norm", "norm.weight")])
def test_a_head_of_another_name_or_form_is_refused(tmp_path, head, told):
    write_scalar_head_checkpoint(tmp_path, "one file")
    name = "model.norm" if head == "norm" else head
    with pytest.raises(RewardError, match=told):
        ClassifierReward.from_pretrained(tmp_path, scalar_head=name).load()


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(RewardError, match="could not be loaded"):
        scores(ClassifierReward.from_pretrained(tmp_path / "nothing"))


def test_a_tokenizer_without_template_is_an_error_with_a_remedy():
    with pytest.raises(RewardError, match="no chat template. Pass chat_template="):
        scores(ClassifierReward(tiny_llama(), byte_tokenizer(chat_template=None)))


def test_a_conversation_that_the_template_rejects_fails_alone():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    reward = ClassifierReward(tiny_llama(), byte_tokenizer(), chat_template=template)
    with pytest.raises(RewardError, match="could not read the conversation: no system here.*'good'"):
        scores(reward, [([{"role": "system", "content": ""}, *CHAT], Response("good"))])
    assert scores(reward, PAIRS[:2]).shape == (2,)


def test_an_answer_longer_than_the_model_reads_is_an_error_and_a_long_chat_is_not():
    reward = ClassifierReward(tiny_llama(), byte_tokenizer())
    assert scores(reward, [([{"role": "user", "content": "long " * 100}], Response("good"))]).isfinite().all()
    with pytest.raises(RewardError, match="takes 501 of the reward's tokens, max_length is 256"):
        scores(reward, [(CHAT, Response("long " * 100))])
    with pytest.raises(RewardError, match="max_length 300 is more than the 256 tokens"):
        scores(ClassifierReward(tiny_llama(), byte_tokenizer(), max_length=300))


def test_roberta_reads_fewer_tokens_than_it_has_positions():
    reward = ClassifierReward(tiny_roberta(), word_tokenizer())
    with pytest.raises(RewardError, match="max_length is 65"):  # 66 positions, counted from behind padding index 0
        scores(reward, [(CHAT, Response("good " * 100))])
    assert scores(reward, [([{"role": "user", "content": "bad " * 100}], Response("good"))]).isfinite().all()


def test_a_model_that_overflows_is_an_error_not_a_score():
    model = tiny_llama()
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(RewardError, match="answered nan"):
        scores(ClassifierReward(model, byte_tokenizer()))


class Gate:
    """Lets a test hold the model's thread inside a forward pass, and counts the passes."""

    def __init__(self, model):
        self.entered, self.open, self.rows = threading.Event(), threading.Event(), []
        model.model.register_forward_pre_hook(self.wait, with_kwargs=True)

    def wait(self, module, args, kwargs):
        self.rows.append(len(kwargs["input_ids"]))
        self.entered.set()
        self.open.wait(20)


def test_requests_that_wait_at_the_same_time_share_a_batch():
    model = tiny_llama()
    reward = ClassifierReward(model, byte_tokenizer())
    reward.load()
    gate = Gate(model)
    first = reward.submit(PAIRS[:1])
    assert gate.entered.wait(20)
    waiting = [reward.submit(PAIRS), reward.submit(PAIRS[2:5]), reward.submit([])]
    gate.open.set()
    answers = [ticket.future.result(timeout=60) for ticket in (first, *waiting)]
    assert gate.rows == [1, 1, 10]  # the second row is what the ten begin with
    expected = scores(ClassifierReward(tiny_llama(), byte_tokenizer()))
    torch.testing.assert_close(answers[1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answers[2], expected[2:5], atol=1e-5, rtol=1e-5)
    assert answers[3].shape == (0,)


def test_a_request_has_its_scores_before_the_batches_of_another_one_are_read():
    model = tiny_llama()
    reward = ClassifierReward(model, byte_tokenizer(), batch_size=8)
    reward.load()
    gate = Gate(model)
    blocker = reward.submit(PAIRS[:1])
    assert gate.entered.wait(20)
    waiting = [reward.submit(CROWD), reward.submit(ELSEWHERE), reward.submit([])]
    done = []
    for name, ticket in enumerate(waiting):
        ticket.future.add_done_callback(lambda _, name=name: done.append((name, sum(gate.rows))))
    gate.open.set()
    for ticket in (blocker, *waiting):
        ticket.future.result(timeout=60)
    assert done == [(2, 1), (0, 10), (1, 12)]  # rows that had been read: the blocker's, the crowd's and its beginning


def test_rows_of_a_cancelled_request_are_dropped():
    model = tiny_llama()
    reward = ClassifierReward(model, byte_tokenizer(), batch_size=2)
    reward.load()
    gate = Gate(model)
    running = reward.submit(PAIRS)
    assert gate.entered.wait(20)
    waiting = reward.submit(PAIRS)
    running.cancel()
    waiting.cancel()
    gate.open.set()
    scores(reward, PAIRS[:1])
    assert gate.rows == [2, 1]


def test_a_closed_reward_says_so():
    reward = ClassifierReward(tiny_llama(), byte_tokenizer())
    scores(reward)
    reward.close()
    reward.close()
    with pytest.raises(RewardError, match="is closed"):
        scores(reward)


def test_closing_frees_the_model_and_fails_who_waits(folder):
    reward = ClassifierReward.from_pretrained(folder)
    reward.load()
    gate = Gate(reward._scorer._model)
    running = reward.submit(PAIRS[:1])
    assert gate.entered.wait(20)
    waiting = reward.submit(PAIRS[:1])
    reward.close()
    with pytest.raises(RewardError, match="is closed"):
        waiting.future.result(timeout=20)
    gate.open.set()
    assert running.future.result(timeout=20).shape == (1,)


def test_the_fingerprint_follows_files_and_settings_but_not_the_batch_size(folder):
    def fingerprint(**options):
        return ClassifierReward.from_pretrained(folder, **options).fingerprint

    base = fingerprint()
    assert base == fingerprint(batch_size=4, name="another")
    others = [fingerprint(add_eos=True), fingerprint(chat_template="x"), fingerprint(dtype="bfloat16")]
    assert len({base, *others}) == 4
    tiny_llama(2).save_pretrained(folder)
    assert fingerprint() != base
    assert fingerprint(fingerprint="rm-1") == "rm-1"
    in_memory = [ClassifierReward(tiny_llama(), byte_tokenizer()) for _ in range(2)]
    assert in_memory[0].fingerprint == in_memory[0].fingerprint != in_memory[1].fingerprint


def test_making_a_reward_loads_nothing(tmp_path):
    reward = ClassifierReward.from_pretrained(tmp_path / "not there yet")
    assert reward.name.endswith("not there yet")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_length": 0}])
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ClassifierReward.from_pretrained("somewhere", **options)
