"""The pairs, the quality benchmark and the ablations at toy size: what they open, choose, freeze, resume and change."""

import gzip
import json
import pickle
import shutil
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from benchmarks import ablations, common, overoptimisation, pairs, plots, preferences, quality
from benchmarks.pairs import PAIRS, LatentSemantics, Pair, Sources
from langchain_aisp.align import align
from langchain_aisp.demo import LANGUAGE_MODEL_PATH
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.evaluation.datasets import PromptRecord
from langchain_aisp.evaluation.log import read_log
from langchain_aisp.evaluation.results import load_results
from langchain_aisp.methods import AISP, ValueNetwork
from langchain_aisp.methods.branching import branch_log_weights
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Problem, Response, Sampling
from tests import tiny

CHAT = ({"role": "user", "content": "hello"},)
SAMPLING = Sampling(max_tokens=6)


# -- the pairs --------------------------------------------------------------------------------------------------------


def dialogue(rng: Random) -> list[dict[str, str]]:
    """A made-up dialogue about a table, a room or a bus."""
    thing = rng.choice(("table", "room", "bus seat"))
    place, hour, count = rng.choice(("Oslo", "Rome", "Lima")), rng.randrange(1, 12), rng.randrange(2, 99)
    says = [
        f"I want a {thing} in {place}, number {count}.",
        f"I have found a {thing} in {place} for you at {hour} pm today.",
        "What does it cost?",
        f"The {thing} costs {count} dollars and you can still cancel it.",
        "Good, thanks!",
        "Have a great day.",
    ]
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(says)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Made-up dialogues, the demo's language model, and one preference model of a single step, twice."""
    folder = tmp_path_factory.mktemp("sources")
    for split, count in (("train", 24), ("dev", 12), ("test", 12)):
        rng = Random(split)
        lines = [json.dumps(dialogue(rng)) for _ in range(count)]
        (folder / f"sgd_{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    found = Sources(LANGUAGE_MODEL_PATH, folder, folder / "judges")
    told = preferences.make("reward", found, dialogues=4, held_out=2, steps=1)
    assert 0 <= told["own"] <= 1
    assert 0 <= told["elsewhere"] <= 1
    shutil.copytree(found.judges / "reward", found.judges / "gold")
    return found


def test_a_pair_whose_folders_are_absent_is_left_out_with_the_reason(tmp_path, capsys) -> None:
    nowhere = Sources(judges=tmp_path / "none")
    assert quality.possible(list(PAIRS), nowhere) == ["demo", "conflict"]
    told = capsys.readouterr().out
    assert "similarity is left out" in told
    assert "--model FOLDER" in told
    assert "python -m benchmarks.preferences" in told
    with pytest.raises(ValueError, match="--data FOLDER names the dialogues"):
        pairs.sgd_prompts(nowhere, "dev", 1)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_opens_and_its_two_rewards_judge_unlike(name: str, sources: Sources) -> None:
    opened = pairs.open_pair(name, sources, "dev", 3)
    assert len(opened.prompts) == 3
    said = [(prompt.messages, Response(text)) for prompt in opened.prompts for text in (prompt.reference, "Hm, 7?")]
    rewards, golds = (reward.submit(said).future.result() for reward in (opened.reward, opened.gold))
    assert rewards.isfinite().all()
    if name != "preference":  # a model of one step prefers nothing yet
        assert (golds[::2] > golds[1::2]).all()
        assert (rewards[::2] != golds[::2]).all() or name == "similarity"


def test_similarity_knows_words_and_its_gold_their_order(sources: Sources) -> None:
    opened = pairs.open_pair("similarity", sources, "dev", 3)
    [prompt, *_] = opened.prompts
    turned = " ".join(reversed(str(prompt.reference).split()))
    said = [(prompt.messages, Response(text)) for text in (str(prompt.reference), turned)]
    rewards, golds = (reward.submit(said).future.result().tolist() for reward in (opened.reward, opened.gold))
    assert rewards == pytest.approx([10.0, 10.0])
    assert golds[0] == pytest.approx(10.0)
    assert golds[1] < 5


def test_rules_of_the_conflict_go_against_the_reward_model_and_not_against_its_gold(sources: Sources) -> None:
    opened = pairs.open_pair("conflict", sources, "dev", 3)
    chat = opened.prompts[2].messages
    assert chat[-1]["content"] == "This is Eltano speaking. I want to change my subscription."
    kept = (
        "Many thanks for writing. Right Eltano, this is about your subscription. Orders can be cancelled within 48 "
        "hours. We will pause the subscription today. Your password stays secret. Have a good day!"
    )
    broken = (
        "I am very glad you wrote. I see your file in front of me, Eltano. I am very glad you wrote. Let me pause the "
        "subscription today. Our orders can be cancelled within 48 hours. I will not ask for your password. I am here "
        "if you need more help."
    )
    asked = [(chat, Response(text)) for text in (kept, broken)]
    both = opened.reward
    model, rules = (part.submit(asked).future.result() for part in both.rewards)
    assert model[0] < model[1]
    assert rules.tolist() == [0.0, -14.0]
    assert opened.gold.submit(asked).future.result().tolist() == [6.0, 6.0]
    total = both.submit(asked).future.result()
    assert total[0] > total[1]


def test_prompts_end_before_a_reply_and_fewer_are_the_first_of_more(sources: Sources) -> None:
    few, more = (pairs.sgd_prompts(sources, "dev", count) for count in (2, 5))
    assert more[:2] == few
    assert len({prompt.messages for prompt in map(_hashable, more)}) == 5
    assert all(prompt.messages[-1]["role"] == "user" for prompt in more)
    assert all(len(str(prompt.reference).split()) >= 6 for prompt in more)
    with pytest.raises(ValueError, match="has 12 prompts, 99 were asked for|were asked for"):
        pairs.sgd_prompts(sources, "dev", 99)


def _hashable(prompt: PromptRecord) -> SimpleNamespace:
    return SimpleNamespace(messages=tuple(turn["content"] for turn in prompt.messages))


def test_latent_semantics_find_the_directions_of_the_singular_value_decomposition() -> None:
    rng = Random(4)
    texts = [" ".join(rng.choices("a b c d e f g h i j".split(), k=6)) for _ in range(60)]
    found = LatentSemantics.fit(texts, rank=3, least=1, rounds=200)
    table = found._table(texts).to_dense()
    exact = torch.linalg.svd(table).Vh[:3].T
    torch.testing.assert_close(found.directions @ found.directions.T, exact @ exact.T, atol=1e-3, rtol=0)
    assert table.norm(dim=1).tolist() == pytest.approx([1.0] * 60)
    assert found.embed_documents(["z z"]) == [[0.0] * 3]


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [("a b c", "a b c", 1.0), ("a c b", "a b c", 2 / 3), ("a x b y", "a b", 2 * 2 / 6), ("x", "a", 0.0), ("", "a", 0)],
)
def test_rouge_is_the_share_of_the_longest_common_subsequence(found: str, wanted: str, score: float) -> None:
    assert pairs.rouge_l(found.split(), wanted.split()) == pytest.approx(score)


def test_preference_models_learn_from_unlike_dialogues_that_the_person_is_right(sources: Sources) -> None:
    whole = pairs.sgd_dialogues(sources, "train")
    halves = [preferences.half(whole, which, 100) for which in preferences.HALVES]
    assert sorted(map(len, halves)) == [12, 12]
    assert not {id(each) for each in halves[0]} & {id(each) for each in halves[1]}
    rows = [SimpleNamespace(reads=[None] * 3), SimpleNamespace(reads=[None] * 2)]
    assert preferences.verdicts(rows) == [(0, 1), (0, 2), (3, 4)]


# -- quality ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """A pair of random weights and a reward that likes certain letters."""

    def letters(chat, responses: list[str]) -> list[float]:
        return [sum(ord(letter) % 7 for letter in response) / 7 for response in responses]

    def prompts(sources: Sources, split: str, count: int) -> tuple[PromptRecord, ...]:
        chats = [({"role": "user", "content": f"{split} {number}"},) for number in range(count)]
        return tuple(PromptRecord(f"{split}/{number}", chat) for number, chat in enumerate(chats))

    reward, gold = as_reward(letters), as_reward(lambda chat, responses: [len(text) for text in responses], name="gold")
    with TransformersEngine(tiny.model(), tiny.tokenizer(), name="tiny") as engine:
        pair = Pair(
            engine=lambda sources: engine,
            prompts=prompts,
            reward=lambda sources, prompts: reward,
            gold=lambda sources, prompts: gold,
            max_tokens=6,
            temperatures=(0.5, 0.7, 1.0, 1.2, 1.5),
        )
        monkeypatch.setitem(PAIRS, "toy", pair)
        monkeypatch.setattr(quality, "WAVE", 4)
        pairs.open_pair.cache_clear()
        yield pair
    pairs.open_pair.cache_clear()


SMALL = {
    "best_of_n": ["best_of_n:temperature=0.5", "best_of_n:temperature=1.5"],
    "aisp": ["aisp:iterations=2"],
    "aisp at a quarter": ["aisp:samples=2"],
    "recontrol": ["recontrol:steps=2,step_size=0.1"],
}

MISVO = [f"misvo:samples_per_iteration=4,learning_rate={rate}" for rate in (0.1, 0.3)]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> quality.Plan:
    monkeypatch.setattr(quality, "grids", lambda pair, samples: SMALL)
    monkeypatch.setattr(quality, "fit_value", partial(quality.fit_value, epochs=2, hidden=4))
    sizes = {"samples": 8, "dev": 2, "test": 2, "train": 3, "answers": 4, "workers": 1}
    return quality.Plan(**sizes, folder=tmp_path / "runs", settings=tmp_path / "settings.json")


def timeless(told: dict) -> dict:
    """A table without what differs from run to run."""

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items() if "seconds" not in key}
        return [strip(each) for each in value] if isinstance(value, list) else value

    return strip(told)


def test_a_killed_run_goes_on_to_the_same_table(toy: Pair, plan: quality.Plan, monkeypatch) -> None:
    quality.choose_on_dev("toy", Sources(), plan)
    uninterrupted = quality.compare_on_test("toy", Sources(), plan)
    again = replace(plan, folder=plan.folder / "again")
    again.folder.mkdir()
    shutil.copy(plan.value("toy"), again.value("toy"))
    run, left = quality.run, iter(range(3))

    def dying(task: quality.Task) -> dict:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run(task)

    monkeypatch.setattr(quality, "run", dying)
    with pytest.raises(KeyboardInterrupt):
        quality.compare_on_test("toy", Sources(), again)
    done: list[str] = []
    monkeypatch.setattr(quality, "run", lambda task: done.append(task[1]().label) or run(task))
    resumed = quality.compare_on_test("toy", Sources(), again)
    assert len(done) == 2 * 5 - 3
    assert timeless(resumed) == timeless(uninterrupted)
    assert resumed["arms"]["aisp"]["samples"] == resumed["arms"]["best_of_n"]["samples"] == 8
    assert (resumed["arms"]["recontrol"]["samples"], resumed["arms"]["first wave"]["samples"]) == (1, 4)
    assert resumed["arms"]["aisp at a quarter"]["samples"] == 2
    assert set(resumed["reached"]) == {"aisp", "aisp at a quarter"}
    assert resumed["prompts_below_the_first_wave"] == 0


def test_the_choice_on_dev_follows_the_rule_and_is_frozen(toy: Pair, plan: quality.Plan) -> None:
    with pytest.raises(ValueError, match="run --dev first"):
        quality.compare_on_test("toy", Sources(), plan)
    quality.choose_on_dev("toy", Sources(), plan)
    frozen = plan.frozen()["toy"]
    rewards = frozen["dev_rewards"]
    assert set(rewards) == set(SMALL["best_of_n"])  # a grid of one is not run
    dev = load_results(sorted(plan.folder.glob("toy.dev.*.jsonl")))
    assert rewards == {spec: pytest.approx(quality.mean(dev.numbers(spec, "reward"))) for spec in rewards}
    assert frozen["chosen"]["best_of_n"] == quality.careful(dev, SMALL["best_of_n"])
    assert str(plan.folder) not in plan.settings.read_text()
    for step in (quality.choose_on_dev, quality.compare_on_test):
        with pytest.raises(ValueError, match="were chosen at 8 samples"):
            step("toy", Sources(), replace(plan, samples=4))
    first = plan.settings.read_text()
    quality.compare_on_test("toy", Sources(), plan)
    assert plan.settings.read_text() == first
    changed = {**plan.frozen(), "toy": {**frozen, "chosen": {**frozen["chosen"], "aisp": "aisp:iterations=1"}}}
    plan.settings.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="was begun with another configuration"):
        quality.compare_on_test("toy", Sources(), plan)


def test_only_what_was_not_chosen_is_chosen_later(toy: Pair, plan: quality.Plan, monkeypatch, capsys) -> None:
    quality.choose_on_dev("toy", Sources(), plan)
    first = plan.frozen()["toy"]
    wider = {"aisp": ["aisp:iterations=1", "aisp:iterations=4"], "greedy": ["greedy"], "misvo": MISVO}
    monkeypatch.setattr(quality, "grids", lambda pair, samples: {**SMALL, **wider})
    quality.choose_on_dev("toy", Sources(), plan)
    later = plan.frozen()["toy"]
    assert later["chosen"].items() > first["chosen"].items()
    assert (later["chosen"]["greedy"], later["chosen"]["misvo"] in MISVO) == ("greedy", True)
    assert set(later["dev_rewards"]) == {*SMALL["best_of_n"], *MISVO}  # of the settings of aisp none was run
    assert later["value_network_explains"] == first["value_network_explains"]
    quality.choose_on_dev("toy", Sources(), plan)
    assert plan.frozen()["toy"] == later
    assert "to choose some anew" in capsys.readouterr().out


def test_the_command_chooses_once_and_saves_what_the_test_prompts_show(
    toy: Pair, plan: quality.Plan, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    sizes = ["--samples", "8", "--dev-prompts", "2", "--prompts", "2", "--train-prompts", "3", "--workers", "1"]
    places = ["--runs", str(plan.folder), "--settings", str(plan.settings), "--pairs", "toy"]
    threads = torch.get_num_threads()
    for step in (["--dev"], ["--dev"], []):
        monkeypatch.setattr(sys, "argv", [str(quality.__file__), *step, *sizes, *places])
        quality.main()
    torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert "toy: its settings are frozen" in told
    saved = json.loads(told.splitlines()[-1])
    assert (saved["pair"], len(saved["prompt_ids"])) == ("toy", 2)
    row = saved["arms"]["best_of_n"]
    for measure in ("reward", "gold"):
        assert sum(row["by_prompt"][measure]) / 2 == pytest.approx(row[measure]["mean"], abs=1e-4)
    assert set(row["aisp_ahead"]) == {"reward", "gold"}
    pictures = dict(plots.quality(saved))
    assert set(pictures) == {"quality_toy_best", "quality_toy_gold"}
    assert all(text.count("<polyline") == 1 for text in pictures.values())  # of AISP; the others have one iteration
    assert row["aisp_ahead"]["reward"]["pairs"] == 2
    assert {"reward", "gold", "base_logprob", "sampled_tokens", "seconds", "reward_seconds"} <= set(row)


def test_of_settings_near_the_best_the_likeliest_answers_are_chosen() -> None:
    class Dev:
        """Rewards and log-probabilities of three settings on four prompts."""

        found: ClassVar = {
            "hot": ([9.0, 8.0, 9.5, 8.5], [-50.0] * 4),
            "warm": ([9.1, 7.8, 9.4, 8.6], [-40.0] * 4),
            "cool": ([8.0, 7.0, 8.5, 7.5], [-30.0] * 4),
        }

        def numbers(self, spec: str, measure: str) -> list[float]:
            return self.found[spec][measure == "base_logprob"]

    assert quality.careful(Dev(), ["hot", "warm", "cool"]) == "warm"  # 0.025 behind, give or take 0.075
    assert quality.careful(Dev(), ["hot", "cool"]) == "hot"
    assert quality.careful(Dev(), ["cool"]) == "cool"


def test_the_first_wave_is_as_large_and_as_hot_as_that_of_the_setting() -> None:
    assert quality.first_wave("aisp:iterations=16,temperature=0.7", 512) == "best_of_n:samples=32,temperature=0.7"
    assert quality.first_wave("aisp:iterations=1", 8) == "best_of_n:samples=8,temperature=1"
    assert quality.first_wave("aisp:temperature=0.3", 512) == "best_of_n:samples=32,temperature=0.3"


def test_every_setting_of_the_grids_names_an_arm_of_equal_samples(tmp_path: Path) -> None:
    network = ValueNetwork(*(torch.zeros(size) for size in ((2, 3), (2,), (2, 2), (2,), (2,), ())))
    network.save(tmp_path / "value.safetensors")
    for pair in PAIRS.values():
        for rival, grid in quality.grids(pair, 512).items():
            for spec in grid:
                make = partial(quality.arm_of, spec, rival, pair.max_tokens, 512, tmp_path / "value.safetensors")
                arm = pickle.loads(pickle.dumps(make))()
                assert arm.label == rival
                assert arm.sampling.max_tokens == pair.max_tokens
                samples = 128 if rival == quality.QUARTER else 512
                assert rival in ("greedy", "args", "args in 8 chains", "recontrol") or _samples(arm.method) == samples


def _samples(method: object) -> int:
    inner = getattr(method, "method", method)
    return getattr(inner, "samples", 0) or inner.samples_per_iteration * inner.iterations


def test_a_search_has_reached_another_one_where_its_mean_is_no_lower() -> None:
    def point(samples: int, best: float) -> dict[str, float]:
        costs = dict.fromkeys(quality.COSTS, float(samples))
        return {"best": best, "gold": 0.0, **costs, "reward_seconds": samples / 4}

    ours, theirs = [point(32, 1.0), point(64, 3.0), point(96, 4.0)], point(512, 3.0)
    found = quality.reached(ours, theirs)
    assert found["samples"] == 64
    assert found["shares"]["sampled_tokens"] == found["shares"]["seconds_without_reward"] == 64 / 512
    assert quality.reached(ours, point(512, 5.0)) is None
    runs = [[point(32, 1.0), point(64, 2.0)], [point(32, 3.0), point(64, 4.0), point(96, 9.0)]]
    at = {each["samples"]: each["best"] for each in quality.curve(runs)}
    assert list(at) == list(range(32, 97))
    assert (at[32], at[63], at[64], at[95], at[96]) == (2.0, 2.0, 3.0, 3.0, 5.5)


# -- the ablations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    with TransformersEngine(tiny.model(), tiny.tokenizer(), name="tiny") as engine:
        yield engine


def after_one_wave(engine: TransformersEngine, method: AISP, sampling: Sampling = SAMPLING):
    """A method's state once it has parents, its first wave, and its second one."""
    state = method.init(Problem(engine.encode(CHAT), sampling, engine.head))
    first = method.propose(state)
    rollouts = engine.submit(first).future.result()
    rewards = torch.arange(len(first)).float() / 4
    state, _ = method.update(state, first, rollouts, rewards)
    return state, first, method.propose(state)


SIZE = {"samples": 32, "iterations": 2, "population": 3, "guidance": 0, "crossings": 0}
SUBCLASSES = (
    ablations.UniformCuts,
    ablations.UniformPositions,
    ablations.WithReplacement,
    ablations.ByParent,
    ablations.SteadyWeights,
    ablations.PositionControl,
)


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_an_ablation_begins_as_the_default_and_then_goes_its_own_way(kind: type[AISP], engine) -> None:
    sampling = replace(SAMPLING, temperature=0.2)  # random weights are undecided everywhere else
    _, first, second = after_one_wave(engine, AISP(**SIZE), sampling)
    _, its_first, its_second = after_one_wave(engine, kind(**SIZE), sampling)
    assert torch.equal(first.keys, its_first.keys)
    assert first.sampling == its_first.sampling
    assert its_first.steering is None
    assert len(its_second) == len(second) == 16
    alike = torch.equal(its_second.cut, second.cut) and torch.equal(its_second.prefix, second.prefix)
    assert alike == (kind is ablations.PositionControl)
    assert (its_second.steering is None) == (kind is not ablations.PositionControl)


def test_uniform_cuts_keep_a_parent_and_nothing_else(engine) -> None:
    state, _, wave = after_one_wave(engine, ablations.UniformCuts(**SIZE))
    assert wave.sampling.temperature == 1.0  # and not cooled
    for prefix, cut, keys in zip(wave.prefix, wave.cut, wave.keys, strict=True):
        kept = (state.population.tokens[:, :cut] == prefix[:cut]).all(1)
        kept &= (state.population.keys[:, :cut] == keys[:cut]).all(1)
        assert bool(kept.any())
        assert int(cut) < 6
    assert len(wave.cut.unique()) > 2


def test_uniform_positions_give_every_position_of_a_parent_the_same_mass(engine) -> None:
    state, *_ = after_one_wave(engine, AISP(**SIZE))
    mass = branch_log_weights(ablations.level(state.population), state.weights, SAMPLING).exp().sum(dim=-1)
    for row, length, weight in zip(mass, state.population.lengths, state.weights, strict=True):
        assert row[:length].tolist() == pytest.approx([float(weight / length)] * int(length), rel=1e-4)
    plain = branch_log_weights(state.population, state.weights, SAMPLING).exp().sum(dim=-1)
    assert float(plain.std()) > float(mass.std())


def test_with_replacement_a_branch_may_come_twice_and_again(engine) -> None:
    """One parent with two alternatives per position has at most twelve branches, for sixteen rows."""
    state, *_ = after_one_wave(engine, AISP(**SIZE))
    only = state.population.take(torch.tensor([0]))
    few = replace(only, alternatives=only.alternatives[..., :2], logprobs=only.logprobs[..., :2])
    narrow = replace(state, population=few, weights=torch.ones(1))
    branches = {
        kind: [tuple(row[:cut].tolist()) for row, cut in zip(wave.prefix, wave.cut, strict=True) if cut > 0]
        for kind in (AISP, ablations.WithReplacement)
        for wave in [kind(**SIZE).propose(narrow)]
    }
    assert len(set(branches[AISP])) == len(branches[AISP]) <= 12
    assert len(branches[ablations.WithReplacement]) == 16 > len(set(branches[ablations.WithReplacement]))
    assert len(ablations.WithReplacement(**SIZE).propose(narrow).keys.unique()) > 6 * 4  # each row draws for itself


@pytest.mark.parametrize("kind", [ablations.UniformPositions, ablations.WithReplacement, ablations.ByParent])
def test_arms_that_draw_branches_themselves_take_no_notice_of_a_choice_made_before(kind: type[AISP], engine) -> None:
    state, *_ = after_one_wave(engine, kind(**SIZE))
    method = kind(**SIZE)
    chosen = replace(state, cuts=torch.zeros(state.population.tokens.shape))
    looks = engine.submit(chosen.beginnings).future.result()
    chosen = chosen.credited(looks, torch.arange(float(len(looks.responses))))
    assert chosen.branches is not None
    assert torch.equal(method.propose(chosen).prefix, method.propose(state).prefix)


def test_parents_get_their_shares_by_the_rule(engine) -> None:
    state, *_ = after_one_wave(engine, AISP(**SIZE))
    rule = partial(ablations.ByParent, **SIZE)
    found = {
        temperature: rule(reward_temperature=temperature)._weights(state.population, state.drawn)
        for temperature in (None, ablations.ALIKE, 1e-3)
    }
    assert torch.equal(found[None], state.weights)
    assert found[ablations.ALIKE].tolist() == pytest.approx([1 / 3] * 3)
    assert found[1e-3].tolist() == pytest.approx([1, 0, 0])
    greedy = rule().propose(replace(state, weights=found[1e-3]))
    kept = [
        (state.population.tokens[0, : cut - 1] == row[: cut - 1]).all()
        for row, cut in zip(greedy.prefix, greedy.cut, strict=True)
    ]
    assert all(kept)


def test_shares_add_up_and_miss_the_weights_by_less_than_one() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2])
    for offset in (0.0, 0.25, 0.5, 0.999):
        counts = ablations.shares(weights, 11, offset)
        assert sum(counts) == 11
        assert all(abs(count - 11 * float(weight)) < 1 for count, weight in zip(counts, weights, strict=True))


def test_controls_per_position_are_as_long_as_was_asked_and_unlike_each_other(engine) -> None:
    method = ablations.PositionControl(**SIZE, control_kl=0.2)
    state, _, wave = after_one_wave(engine, method)
    controls = wave.steering.controls
    fisher = state.metric / state.counts.sum()
    nats = torch.einsum("td,de,te->t", controls, fisher, controls) / 2
    assert float((nats * state.counts).sum() / state.counts.sum()) == pytest.approx(0.2, rel=1e-3)
    assert float((controls[0] - controls[1]).norm()) > 0.1 * float(controls[0].norm())
    with pytest.raises(ValueError, match="control_kl must be positive"):
        ablations.PositionControl(**SIZE, control_kl=0.0)


def test_every_arm_of_the_ablations_spends_the_same_samples_and_is_told_beside_the_default(
    toy: Pair, tmp_path: Path
) -> None:
    plan = ablations.Plan(samples=8, prompts=1, workers=1, folder=tmp_path)
    told = ablations.ablate("toy", Sources(), plan)
    labels = list(told["arms"])
    assert labels[0] == ablations.DEFAULT
    assert {label.split(":")[0] for label in labels[1:]} == {
        "overlap",
        "guidance",
        "crossings",
        "overlap, guidance and crossings",
        "branching",
        "replacement",
        "population",
        "lambda",
        "control",
        "waves",
        "decode",
        "published",
    }
    assert {row["samples"] for row in told["arms"].values()} == {8}
    assert set(told["arms"]["replacement: with"]["default_ahead"]) == {"reward", "gold"}
    assert told["tuning"]["default"] == told["arms"][ablations.USED]["reward"]["mean"]
    assert told["tuning"]["share"] <= 1
    settings = [next(iter(read_log(path)[0]["methods"].values())) for path in tmp_path.glob("*.jsonl")]
    assert len(settings) == len(set(settings)) == len(labels)  # no arm is another one under a second name
    options = ablations.ablate("toy", Sources(), replace(plan, options=True))
    assert options["tuning"] == told["tuning"]
    assert set(labels) - set(options["arms"]) > {"published: argmax"}
    assert {label.split(":")[0] for label in options["arms"]} >= {"default", "population", "waves", "decode"}


def test_tuning_is_judged_from_a_plain_sample_on() -> None:
    found = ablations.closeness({ablations.USED: 9.0, "worse": 4.0, "better": 9.5}, plain=-1.0)
    assert found["share"] == pytest.approx(10 / 10.5)
    assert (found["best"], found["plain"]) == ("better", -1.0)


def test_arms_survive_the_way_to_another_process() -> None:
    for number, arm in enumerate(ablations.arms(128, SAMPLING)):
        make = partial(ablations.arm_at, number, 128, SAMPLING)
        assert pickle.loads(pickle.dumps(make))() == arm
    assert {field.name for field in fields(AISP)} <= {field.name for field in fields(ablations.ByParent)}


def test_the_default_of_the_ablations_is_the_default(engine) -> None:
    reward = as_reward(lambda chat, responses: [float(len(text)) for text in responses], name="long")
    arm = ablations.arms(128, SAMPLING)[0]
    assert arm.method == AISP(samples=128, overlap=1, guidance=0, crossings=0)
    last = ablations.arms(128, SAMPLING)[-1]
    assert (last.label, last.method) == (ablations.USED, AISP(samples=128))
    assert align(engine, reward, arm.method, CHAT, sampling=SAMPLING).samples == 128


# -- over-optimisation ------------------------------------------------------------------------------------------------


def test_over_optimisation_is_told_by_golds_as_the_search_goes_on(sources, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(overoptimisation, "DIALOGUES", 6)
    monkeypatch.setitem(PAIRS, "similarity", replace(PAIRS["similarity"], max_tokens=8))
    folders = ["--model", str(sources.model), "--data", str(sources.data)]
    monkeypatch.setattr(sys, "argv", ["overoptimisation", *folders, "--samples", "32", "--prompts", "2"])
    overoptimisation.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    named = {arm["arm"]: arm for arm in found["arms"]}
    assert list(named) == ["best of n", "one", "mean", "lower bound", "one, floor -20", "one, floor -40"]
    for arm in named.values():
        assert arm["curve"][-1]["samples"] == 32
        assert arm["gold"]["mean"] == pytest.approx(arm["curve"][-1]["gold"]["mean"])
        assert 0 <= arm["gold"]["mean"] <= 10
        assert arm["reward"]["mean"] == pytest.approx(arm["curve"][-1]["reward"])
    assert named["one"]["base_logprob"]["mean"] < 0
    [picture] = plots.draw(tmp_path).values()
    assert picture.count("<polyline") >= 5


def test_members_of_an_ensemble_read_dialogues_of_their_own(sources) -> None:
    opened = pairs.open_pair("similarity", sources, "dev", 2)
    rewards = overoptimisation.members(opened, [[{"role": "assistant", "content": f"word{n}"}] for n in range(200)])
    prompt = opened.prompts[0]
    said = [(prompt.messages, Response(str(prompt.reference)))]
    assert len(rewards) == overoptimisation.MEMBERS
    assert len({reward.fingerprint for reward in rewards}) == len(rewards)
    assert all(reward.submit(said).future.result().isfinite().all() for reward in rewards)
