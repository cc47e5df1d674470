"""Streaming block by block: what is committed stays, adds up to the answer, and the controls move on with it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from langchain_aisp.align import Aligned, Budget, Iteration
from langchain_aisp.committing import Block, _settled, acommit, carried, commit
from langchain_aisp.methods import AISP, BestOfN, PublishedAISP
from langchain_aisp.methods.misvo import MISVO
from langchain_aisp.rewards import as_reward
from langchain_aisp.types import Grammar, Sampling
from tests.toy import CHAT, END, ToyEngine, problem

LIKED = "badgebadgebadge"


def spelled(chat, texts):
    return [float(sum(a == b for a, b in zip(text, LIKED, strict=False))) for text in texts]


REWARD = as_reward(spelled, partial=True)
LED = AISP(samples=16, iterations=2)
TWO_WAVES = AISP(samples=16, iterations=2, guidance=0)  # no text under way has waves of its own
LONG = Sampling(max_tokens=11, min_tokens=11)


def committed(method=TWO_WAVES, engine=None, reward=REWARD, *, every: int = 3, sampling=LONG, **settings):
    """Iterations, blocks and the outcome of a search."""
    engine = engine or ToyEngine()
    steps = list(commit(engine, reward, method, CHAT, commit_every=every, sampling=sampling, **settings))
    iterations = [step for step in steps if isinstance(step, Iteration)]
    blocks = [step for step in steps if isinstance(step, Block)]
    assert isinstance(steps[-1], Aligned)
    assert len(steps) == len(iterations) + len(blocks) + 1
    return iterations, blocks, steps[-1]


@pytest.mark.parametrize(
    "method",
    [
        LED,
        TWO_WAVES,
        BestOfN(samples=6),
        PublishedAISP(samples_per_iteration=6, iterations=2),
        AISP.published(iterations=1),
    ],
)
@pytest.mark.parametrize("look_ahead", [0, 2, None])
def test_blocks_add_up_to_the_answer(method, look_ahead):
    _, blocks, aligned = committed(method, look_ahead=look_ahead)
    assert len(blocks) > 1
    assert "".join(block.text for block in blocks) == aligned.best.response.text
    assert sum((block.tokens for block in blocks), ()) == aligned.best.tokens
    assert all(len(block.tokens) == 3 for block in blocks[:-1])
    assert aligned.best.reward == spelled(CHAT, [aligned.best.response.text])[0]


def test_committed_tokens_are_kept_by_every_later_row():
    engine = ToyEngine()
    _, blocks, _ = committed(engine=engine, look_ahead=0)
    written: list[int] = []
    for block in blocks:
        waves = [wave for wave in engine.waves if wave.prefix.shape[1] > len(written)]
        assert all(int(wave.cut.min()) >= len(written) for wave in waves)
        assert all(wave.prefix[:, : len(written)].tolist() == [written] * len(wave) for wave in waves)
        written += block.tokens


def test_a_block_goes_out_before_the_next_one_is_decoded():
    engine = ToyEngine()
    steps = commit(engine, REWARD, TWO_WAVES, CHAT, commit_every=3, sampling=LONG)
    first = next(step for step in steps if isinstance(step, Block))
    assert len(first.text) == 3
    assert len([wave for wave in engine.waves if not wave.forced]) == TWO_WAVES.iterations
    steps.close()


def test_an_answer_ends_where_the_best_plan_ends():
    likes_short = as_reward(lambda chat, texts: [-float(len(text)) for text in texts], partial=True)
    _, _, aligned = committed(reward=likes_short, sampling=Sampling(max_tokens=30), engine=ToyEngine(end_bias=2.0))
    assert aligned.best.response.finish_reason == "stop"
    assert aligned.best.tokens[-1] == END
    assert aligned.stopped == "finished"


def test_an_answer_that_reaches_max_tokens_is_cut_off():
    _, _, aligned = committed(BestOfN(samples=4))
    assert aligned.best.response.finish_reason == "length"
    assert len(aligned.best.tokens) == 11


def test_a_text_that_goes_on_beats_one_that_has_ended_if_the_reward_says_so():
    """At the end of a block no text is cut off: whole ones have no advantage before the reward."""
    letters = as_reward(lambda chat, texts: [float(len(text)) for text in texts], partial=True)
    _, _, aligned = committed(BestOfN(samples=12), ToyEngine(end_bias=1.0), letters, sampling=Sampling(max_tokens=8))
    assert len(aligned.best.response.text) >= 7


def test_a_stop_string_ends_the_answer_also_across_blocks_and_is_never_sent():
    engine = ToyEngine()
    _, _, free = committed(engine=engine)
    text = free.best.response.text
    stop = text[2:4]  # the first block ends between its letters
    _, blocks, aligned = committed(sampling=Sampling(max_tokens=11, min_tokens=11, stop=(stop,)))
    sent = "".join(block.text for block in blocks)
    assert sent == aligned.best.response.text
    assert stop not in sent


@pytest.mark.parametrize(
    ("text", "stop", "sent"),
    [
        ("Hello", (), "Hello"),
        ("Hello\n", ("\n\n",), "Hello"),
        ("Hello\nUs", ("\nUser:", "\n\n"), "Hello"),
        ("caf\ufffd", (), "caf"),
        ("aab", ("abab",), "a"),
    ],
)
def test_what_later_tokens_may_change_is_held_back(text, stop, sent):
    assert _settled(text, stop) == sent


def test_costs_count_on_from_block_to_block():
    engine = ToyEngine()
    iterations, blocks, aligned = committed(engine=engine)
    assert [now.iteration for now in iterations] == list(range(len(iterations)))
    assert aligned.trace == tuple(iterations)
    assert aligned.samples == 16 * len(blocks)
    decoded = [wave for wave in engine.waves if not wave.forced]
    assert aligned.samples == sum(map(len, decoded))
    seconds = [now.seconds for now in iterations]
    assert seconds == sorted(seconds)


def test_the_same_seed_gives_the_same_blocks_and_another_seed_others():
    texts = [[block.text for block in committed(seed=seed)[1]] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_noise_is_new_in_every_block():
    """In a world without memory the same noise at the same place of a block would say the same letters again."""
    _, blocks, _ = committed(BestOfN(samples=1), ToyEngine(scale=0.0), look_ahead=0)
    assert len({block.text for block in blocks[:3]}) > 1


async def test_the_asynchronous_driver_commits_the_same():
    steps = [step async for step in acommit(ToyEngine(), REWARD, TWO_WAVES, CHAT, commit_every=3, sampling=LONG)]
    _, blocks, aligned = committed()
    assert [step for step in steps if isinstance(step, Block)] == blocks
    assert steps[-1].best == aligned.best  # type: ignore[union-attr]


def test_when_time_is_up_the_best_plan_is_the_answer():
    _, blocks, aligned = committed(BestOfN(samples=2), budget=Budget(seconds=1e-9))
    assert aligned.stopped == "seconds"
    assert aligned.best.response.finish_reason == "timeout"
    assert "".join(block.text for block in blocks) == aligned.best.response.text


# Controls


def test_the_published_means_move_on_with_the_text():
    method = PublishedAISP(samples_per_iteration=4, iterations=1)
    start = method.init(problem(ToyEngine(), Sampling(max_tokens=6)))
    learned = method.update(start, method.propose(start), ToyEngine().decode(method.propose(start)), torch.arange(4.0))[
        0
    ]
    after = carried(learned, start, 4)
    assert torch.equal(after.mean[:2], learned.mean[4:])
    assert torch.equal(after.mean[2:], torch.zeros(4, 8))


def test_means_are_shortened_where_the_last_plan_is_short():
    method = MISVO(samples_per_iteration=4, iterations=1)
    long, short = (method.init(problem(ToyEngine(), Sampling(max_tokens=length))) for length in (6, 2))
    learned = method.update(long, method.propose(long), ToyEngine().decode(method.propose(long)), torch.arange(4.0))[0]
    assert torch.equal(carried(learned, short, 3).controls, learned.controls[3:5])
    assert carried(learned, short, 3).tokens == learned.tokens


def test_the_next_block_begins_under_the_controls_that_were_learned_for_its_positions():
    engine = ToyEngine()
    committed(PublishedAISP(samples_per_iteration=4, iterations=2), engine)
    waves = [wave for wave in engine.waves if not wave.forced]
    before, after = waves[1], waves[2]
    key = torch.tensor([3])

    def mean_at(wave, position: int) -> torch.Tensor:
        """The mean control of a position of the whole answer: what is left when the noise is taken away."""
        steering = wave.steering.steering
        return steering.mean[position - wave.steering.start]

    assert before.steering.start == 0
    assert after.steering.start == 3
    assert not torch.equal(mean_at(after, 3), torch.zeros(8))
    offset = after.steering.offset(torch.tensor([0]), torch.tensor([3]), key, None)
    torch.testing.assert_close(offset, after.steering.steering.offset(torch.tensor([0]), torch.tensor([0]), key, None))


# Refusals


@dataclass(frozen=True)
class Refused:
    """Settings that cannot be committed, and what the error names."""

    settings: dict
    named: str


@pytest.mark.parametrize(
    "case",
    [
        Refused({"reward": as_reward(spelled)}, "partial=True"),
        Refused({"sampling": Sampling(max_tokens=4, grammar=Grammar('start: "a"'))}, "response_format"),
        Refused({"tools": ({"type": "function"},)}, "tools"),
        Refused({"answers": 2}, "n=2"),
        Refused({"every": 0}, "at least 1 token"),
        Refused({"look_ahead": -1}, "look_ahead must not be negative"),
        Refused({"budget": Budget(min_base_logprob=-5.0)}, "min_base_logprob"),
        Refused({"budget": Budget(kl_budget=5.0)}, "kl_budget"),
    ],
    ids=lambda case: case.named,
)
def test_what_cannot_be_committed_is_refused_before_anything_is_decoded(case):
    engine = ToyEngine()
    with pytest.raises(ValueError, match=case.named):
        committed(engine=engine, **case.settings)
    assert engine.waves == []
