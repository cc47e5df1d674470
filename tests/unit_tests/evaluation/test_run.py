"""Runs and their file: what is kept of a search, and that a killed evaluation ends with the same file."""

import json
import shutil

import pytest

from langchain_aisp.align import Budget, Iteration, align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.evaluation.arms import Arm
from langchain_aisp.evaluation.log import RunLog, read_log
from langchain_aisp.evaluation.run import Evaluation, evaluate
from langchain_aisp.methods import AISP, BestOfN, Greedy
from langchain_aisp.types import Sampling
from tests import tiny
from tests.toy import ToyEngine, ToyReward, counts, spells
from tests.unit_tests.evaluation.conftest import ARMS, PROMPTS, SAMPLING

CONFIG = {"methods": {"a": "A()"}, "seeds": [0]}


def runs_in(path):
    """The runs of a file, without what the clock says."""
    runs = [line for line in read_log(path)[1] if line["kind"] == "run"]
    for run in runs:
        for numbers in (run, *run["trace"]):
            numbers.pop("seconds")
            numbers.pop("reward_seconds")
    return runs


def finish(evaluation, path):
    return [news.run for news in evaluate(evaluation, path) if news.run is not None]


@pytest.fixture(scope="module")
def finished(comparison, tmp_path_factory):
    """An evaluation that nothing interrupted: its runs and its file, which no test edits."""
    path = tmp_path_factory.mktemp("finished") / "runs.jsonl"
    return finish(comparison(), path), path


@pytest.fixture
def runs(finished):
    return finished[0]


@pytest.fixture
def whole(finished, tmp_path):
    """A copy of its file."""
    return shutil.copy(finished[1], tmp_path / "whole.jsonl")


def test_every_method_answers_every_prompt_with_every_seed(comparison, tmp_path):
    news = list(evaluate(comparison(), tmp_path / "runs.jsonl"))
    runs = [each.run for each in news if each.run is not None]
    assert [(run.prompt, run.seed, run.method) for run in runs] == [
        (prompt.id, seed, arm.label) for prompt in PROMPTS for seed in (0, 1) for arm in ARMS
    ]
    assert (news[-1].done, news[-1].total) == (12, 12)
    told = sum(isinstance(each.iteration, Iteration) for each in news)
    assert 6 * (2 + 1) < told <= 6 * (2 + 4)  # of AISP at most four each, as its iterations overlap


def test_a_run_tells_of_every_sample_what_the_rewards_say(comparison, tmp_path):
    [run, *_] = finish(comparison(prompts=PROMPTS[:1], seeds=(3,)), tmp_path / "runs.jsonl")
    assert len(run.samples) == 8
    assert [(sample.iteration, sample.row) for sample in run.samples] == [(i, row) for i in (0, 1) for row in range(4)]
    for sample in run.samples:
        assert sample.reward == sample.text.count("a")
        assert sample.gold == sum(a == b for a, b in zip(sample.text, "abcabc", strict=False))
    [expected] = [align(ToyEngine(), ToyReward(counts("a")), ARMS[0].method, run.messages, sampling=SAMPLING, seed=3)]
    assert (run.text, run.reward) == (expected.best.response.text, expected.best.reward)
    assert run.sampled_tokens == sum(len(sample.tokens) for sample in run.samples)
    assert run.reward_calls == len({(sample.text, sample.finish_reason) for sample in run.samples})
    assert run.place == (expected.best.iteration, expected.best.row)
    assert run.reference == "abc"


def test_a_branch_names_the_parent_whose_tokens_it_keeps(runs):
    children = 0
    for run in (run for run in runs if run.method == "aisp"):
        samples = {(sample.iteration, sample.row): sample for sample in run.samples}
        for sample in run.samples:
            assert (sample.parent is None) or sample.parent < (sample.iteration, sample.row)
            if sample.cut > 1:  # the last of the kept tokens is the branch itself
                kept = sample.tokens[: sample.cut - 1]
                assert samples[sample.parent].tokens[: sample.cut - 1] == kept
                children += 1
        assert all(sample.parent is None for sample in run.samples if sample.cut == 0)
    assert children > 10


def test_the_trace_has_the_held_out_reward_of_the_best_so_far(runs):
    for run in runs:
        assert run.trace[-1]["best"] == run.reward
        assert run.trace[-1]["gold"] == run.gold
        spent = [point["samples"] for point in run.trace]
        assert spent == ([4, 8] if run.method == "best_of_n" else sorted({*spent, 8}))


def test_only_the_answers_are_judged_where_that_is_asked(comparison, tmp_path):
    gold = ToyReward(spells("abcabc"))
    runs = finish(comparison(gold=gold, gold_of="answers", prompts=PROMPTS[:1]), tmp_path / "runs.jsonl")
    assert all(run.gold is not None and None not in [point["gold"] for point in run.trace] for run in runs)
    assert any(sample.gold is None for run in runs for sample in run.samples)
    assert len(gold.scored) <= sum(len(run.trace) for run in runs)


def test_no_held_out_reward_leaves_none(comparison, tmp_path):
    runs = finish(comparison(gold=None, prompts=PROMPTS[:1]), tmp_path / "runs.jsonl")
    assert {run.gold for run in runs} == {None}


def test_a_wave_that_would_spend_more_than_the_arm_may_is_cut(comparison, tmp_path):
    arm = Arm("few", BestOfN(samples=8, samples_per_wave=4), SAMPLING, samples=6)
    [run] = finish(comparison(arms=(arm,), prompts=PROMPTS[:1], seeds=(0,)), tmp_path / "runs.jsonl")
    assert len(run.samples) == 6
    assert run.stopped == "samples"


def test_the_prompt_is_read_before_the_first_method_and_once_for_all(comparison, tmp_path):
    engine = ToyEngine()
    finish(comparison(engine=engine, prompts=PROMPTS[:1], seeds=(0,)), tmp_path / "runs.jsonl")
    assert [len(wave) for wave in engine.waves[:4]] == [1, 4, 4, 2]
    done = len(engine.waves)
    finish(comparison(engine=engine, prompts=PROMPTS[:1], seeds=(0,)), tmp_path / "runs.jsonl")
    assert len(engine.waves) == done  # nothing is left to do


@pytest.mark.parametrize(("done", "torn"), [(1, 0), (5, 400), (11, 1)])
def test_a_killed_evaluation_goes_on_to_the_same_file(comparison, whole, tmp_path, done, torn):
    path = tmp_path / "killed.jsonl"
    steps = evaluate(comparison(), path)
    while next(steps).done < done:
        pass
    steps.close()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - torn])
    if torn:
        assert not path.read_bytes().endswith(b"\n")
    finish(comparison(), path)
    assert runs_in(path) == runs_in(whole)


def test_a_file_cut_at_any_byte_is_mended(tmp_path):
    path = tmp_path / "runs.jsonl"
    wanted = [{"method": "a", "prompt": f"p{number}", "seed": 0, "text": "ü\u2028"} for number in range(2)]
    with RunLog(path, CONFIG) as log:
        for run in wanted:
            log.append("run", run)
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        with RunLog(path, CONFIG) as log:
            for run in wanted:
                if ("a", run["prompt"], 0) not in log.done:
                    log.append("run", run)
        assert path.read_bytes() == content


def test_a_file_that_is_none_of_ours_is_not_touched(tmp_path):
    for text in ("my thesis, one line", "line\nline\n", '{"kind": "header"}\n'):
        path = tmp_path / "thesis.txt"
        path.write_text(text)
        with pytest.raises(ValueError, match="no file of runs"):
            RunLog(path, CONFIG)
        assert path.read_text() == text


def test_another_configuration_is_refused_and_named(comparison, whole):
    content = whole.read_bytes()
    arms = (ARMS[0], Arm("aisp", AISP(samples=8, iterations=2), SAMPLING))
    with pytest.raises(ValueError, match=r"methods was .*iterations=4.* and is .*iterations=2.*another file"):
        finish(comparison(arms=arms), whole)
    with pytest.raises(ValueError, match=r"seeds was \[0, 1\] and is \[0\]"):
        finish(comparison(seeds=(0,)), whole)
    with pytest.raises(ValueError, match="prompts was"):
        finish(comparison(prompts=PROMPTS[:2]), whole)
    assert whole.read_bytes() == content


def test_a_run_that_is_there_twice_is_an_error(whole):
    last = whole.read_text("utf-8").splitlines()[-1]
    with whole.open("a", encoding="utf-8") as file:
        file.write(last + "\n")
    with pytest.raises(ValueError, match="twice"):
        list(read_log(whole)[1])


def test_the_header_pins_rewards_template_methods_and_prompts(comparison, whole):
    config, lines = read_log(whole)
    assert config["model"] == "toy"
    assert config["reward"] == {"name": "toy", "fingerprint": "toy", "settings": None}
    assert config["methods"]["aisp"].startswith("AISP(samples=8, iterations=4")
    assert config["prompts"]["count"] == 3
    assert config["budget"] == repr(Budget())
    assert next(lines)["kind"] == "session"
    assert json.loads(json.dumps(comparison().config)) == config


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [({"arms": ()}, "method"), ({"prompts": ()}, "prompt"), ({"seeds": ()}, "seed"), ({"seeds": (1, 1)}, "once")],
)
def test_an_evaluation_of_nothing_is_refused(comparison, parts, complaint):
    with pytest.raises(ValueError, match=complaint):
        comparison(**parts)
    with pytest.raises(ValueError, match="different labels"):
        comparison(arms=(ARMS[0], ARMS[0]))


def test_the_answer_s_log_probability_is_that_which_the_model_gave_its_tokens(tmp_path):
    engine = TransformersEngine(tiny.model(), tiny.tokenizer())
    sampling = Sampling(max_tokens=7)
    arms = (Arm("greedy", Greedy(), sampling), Arm("best_of_n", BestOfN(samples=3), sampling))
    evaluation = Evaluation(engine, ToyReward(counts("a")), arms, PROMPTS[:1], base_logprobs=True)
    greedy, best = finish(evaluation, tmp_path / "runs.jsonl")
    assert greedy.base_logprob == pytest.approx(greedy.trace[0]["base_logprob"], abs=1e-3)
    assert best.base_logprob < 0
