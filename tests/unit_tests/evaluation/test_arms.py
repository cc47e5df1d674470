"""Methods by name: what a text on the command line becomes."""

import pytest
import torch

from langchain_aisp.evaluation.arms import METHODS, parse_arms
from langchain_aisp.methods import AISP, BestOfN, PublishedAISP, REControl, ValueNetwork
from langchain_aisp.types import Sampling

SAMPLING = Sampling(max_tokens=16)


def parse(text, samples=64):
    return parse_arms(text, samples, SAMPLING)


def test_commas_part_methods_and_options():
    arms = parse("best_of_n, aisp:population=4,temperature=0.4,published")
    assert [arm.label for arm in arms] == ["best_of_n", "aisp:population=4,temperature=0.4", "published"]
    assert arms[0].method == BestOfN(samples=64)
    assert arms[1].method == AISP(samples=64, population=4)
    assert arms[1].sampling == Sampling(max_tokens=16, temperature=0.4)
    assert arms[2].method == PublishedAISP(samples_per_iteration=8, iterations=8)
    assert arms[2].sampling == SAMPLING


@pytest.mark.parametrize("name", [name for name in METHODS if name != "recontrol"])
@pytest.mark.parametrize("samples", [1, 7, 64, 1024])
def test_every_method_can_spend_any_number_of_samples(name, samples):
    [arm] = parse(name, samples)
    assert arm.method.iterations >= 1
    assert arm.samples in (samples, None)


def test_an_option_of_the_method_comes_before_the_same_one_of_its_sampling():
    [arm] = parse("best_of_n:temperature=0.5,top_k=3")
    assert arm.method == BestOfN(samples=64, temperature=0.5)
    assert arm.sampling == Sampling(max_tokens=16, top_k=3)


def test_options_are_read_as_what_the_method_wants():
    [arm] = parse("published:samples_per_iteration=4,iterations=3,sigma=1,decode=sample,horizon=none")
    assert arm.method == PublishedAISP(4, 3, sigma=1.0, decode="sample")
    assert arm.samples is None  # twelve were asked for, whatever the others spend


def test_the_method_s_own_samples_win():
    [arm] = parse("aisp:samples=16")
    assert arm.method == AISP(samples=16)


def test_re_control_reads_its_value_network_from_a_file(tmp_path):
    value = ValueNetwork(*(torch.randn(shape) for shape in ((3, 4), (3,), (3, 3), (3,), (3,), ())))
    value.save(tmp_path / "value.safetensors")
    one, many = parse(
        f"recontrol:value={tmp_path}/value.safetensors,recontrol:value={tmp_path}/value.safetensors,best_of=4"
    )
    assert one.method == REControl(value)
    assert many.method == REControl(value, method=BestOfN(samples=4))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no method"),
        ("magic", "best_of_n"),
        ("aisp:colour=3", "population"),
        ("aisp:population=many", "integer"),
        ("aisp:population=0", "at least 1"),
        ("published:decode=greedy", "argmax"),
        ("best_of_n,best_of_n", "twice"),
        ("best_of_n:grammar=x", "grammar"),
        ("recontrol", "value=…"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_can(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(text)


def test_settings_tell_all_that_makes_an_arm():
    first, second = (parse(text)[0].settings for text in ("aisp", "aisp:top_p=0.9"))
    assert first != second
    assert "population=16" in first
