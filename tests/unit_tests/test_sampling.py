"""Tokens follow the distribution that temperature, top-k and top-p describe; checked against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from langchain_aisp import sampling
from langchain_aisp.noise import fold, normal, uniform
from langchain_aisp.sampling import draw, inverse_cdf, largest, restrict

COUNT = 100_000


def logits_for(seed: int, rows: int, vocabulary: int) -> Tensor:
    return 2 * normal(fold(seed, torch.arange(rows)), vocabulary)


def drawn(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    rows = len(logits)
    settings = torch.full((rows,), temperature), torch.full((rows,), top_p), torch.full((rows,), top_k)
    return draw(logits, uniforms, *settings)


def allowed_by_a_plain_loop(logits: list[float], top_p: float, top_k: int) -> set[int]:
    """Walk down the tokens from the likeliest until k are taken or the mass before one reaches p."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = [token for token in order if math.isfinite(logits[token])]
    if top_k > 0:
        order = order[:top_k]
    total = sum(math.exp(logits[token]) for token in order)
    allowed, mass = set(), 0.0
    for token in order:
        if mass >= top_p:
            break
        allowed.add(token)
        mass += math.exp(logits[token]) / total
    return allowed


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_distribution(temperature: float) -> None:
    logits = logits_for(1, 1, 6)
    tokens = drawn(logits.expand(COUNT, -1), uniform(fold(2, torch.arange(COUNT))), temperature=temperature)
    expected = (logits[0].double() / temperature).softmax(dim=0)
    deviation = (tokens.bincount(minlength=6) / COUNT - expected).abs()
    assert (deviation < 5 * (expected * (1 - expected) / COUNT).sqrt()).all()  # false alarm: 3 in a million


def test_the_inverse_cdf_is_exact_at_known_points() -> None:
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(6, -1)
    uniforms = torch.tensor([0.001, 0.249, 0.251, 0.749, 0.751, 0.999])
    assert inverse_cdf(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [1, 17, 64, 65, 1000, 4096])
def test_blocks_lead_to_the_token_that_one_running_sum_finds(size: int) -> None:
    probabilities = logits_for(3, 200, size).softmax(dim=-1)
    probabilities[:, ::3] *= size < 3  # many of probability 0
    uniforms = uniform(fold(4, torch.arange(200)))
    sums = probabilities.double().cumsum(dim=-1)
    threshold = uniforms.double() * sums[:, -1]
    expected = torch.searchsorted(sums, threshold[:, None], right=True).squeeze(1)
    found = inverse_cdf(probabilities, uniforms)
    near = (sums.gather(1, torch.minimum(found, expected)[:, None]).squeeze(1) - threshold).abs() < 1e-5
    assert bool(((found == expected) | near).all())  # rounding may decide which of two neighbours
    assert float((found == expected).float().mean()) > 0.97
    assert bool((probabilities.gather(1, found[:, None]) > 0).all())


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (40, 32), (128, 32), (1000, 32), (4099, 32), (4096, 1), (5003, 256)]
)
def test_the_largest_are_those_of_topk(size: int, count: int) -> None:
    logits = logits_for(10, 29, size)
    values, places = largest(logits, count)
    expected = logits.topk(count)
    assert torch.equal(values, expected.values)
    assert torch.equal(places, expected.indices)


def test_among_equal_scores_the_largest_are_different_tokens() -> None:
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, [3, 500, 999]] = torch.tensor([1.0, 3.0, 2.0])
    values, places = largest(logits, 32)
    assert places[:, :3].tolist() == [[500, 999, 3]] * 2
    assert [len(set(row)) for row in places.tolist()] == [32, 32]
    assert torch.equal(values, logits.gather(1, places))


def test_what_is_not_a_number_gives_no_token() -> None:
    probabilities = torch.full((2, 100), torch.nan)
    assert bool((inverse_cdf(probabilities, torch.tensor([0.1, 0.9])) >= 100).all())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (1.0, 3), (0.7, 0), (0.9, 5), (0.3, 2), (1e-6, 0), (0.99, 100)])
def test_restricting_keeps_what_a_plain_loop_keeps(seed: int, top_p: float, top_k: int) -> None:
    logits = logits_for(seed, 3, 17)
    logits[:, seed % 17] = -torch.inf
    kept = restrict(logits, torch.full((3,), top_p), torch.full((3,), top_k))
    for row in range(3):
        allowed = allowed_by_a_plain_loop(logits[row].tolist(), top_p, top_k)
        assert set(kept[row].isfinite().nonzero().flatten().tolist()) == allowed
        assert torch.equal(kept[row].isfinite() * logits[row].nan_to_num(), kept[row].nan_to_num(neginf=0.0))


@pytest.mark.parametrize("spread", [0.5, 3.0, 8.0])
@pytest.mark.parametrize(
    ("top_p", "top_k"), [(0.1, 0), (0.9, 0), (0.999, 0), (0.9, 50), (0.2, 400), (0.5, 1000), (1.0, 20)]
)
def test_of_many_tokens_the_same_are_kept(spread: float, top_p: float, top_k: int) -> None:
    logits = spread * logits_for(7, 4, 5000) / 2
    kept = restrict(logits, torch.full((4,), top_p), torch.full((4,), top_k)).isfinite()
    for row, inside in zip(logits.tolist(), kept, strict=True):
        expected = allowed_by_a_plain_loop(row, top_p, top_k)
        assert len(set(inside.nonzero().flatten().tolist()) ^ expected) <= 1  # rounding may decide about the last one


@pytest.mark.parametrize(
    ("top_p", "top_k", "sorted_"),
    [(0.9, 0, [256]), (0.9999999, 0, [256, 5000]), (1.0, 9, [256]), (0.5, 999, [256, 5000])],
)
def test_all_tokens_are_sorted_only_where_the_likeliest_are_not_enough(top_p, top_k, sorted_, monkeypatch) -> None:
    looked_at: list[int] = []
    sort = Tensor.sort
    monkeypatch.setattr(sampling, "largest", lambda scores, k: looked_at.append(k) or largest(scores, k))
    monkeypatch.setattr(Tensor, "sort", lambda self, **how: looked_at.append(self.shape[1]) or sort(self, **how))
    restrict(4 * logits_for(7, 4, 5000), torch.full((4,), top_p), torch.full((4,), top_k))
    assert looked_at == sorted_


def test_rows_keep_the_same_beside_others() -> None:
    logits = torch.cat([logits_for(8, 3, 2000) * 3, logits_for(9, 3, 2000) / 4])
    top_p, top_k = torch.tensor([0.3, 0.9, 0.95, 0.5, 1.0, 0.8]), torch.tensor([0, 0, 7, 0, 30, 0])
    together = restrict(logits, top_p, top_k)
    for row in range(6):
        one = slice(row, row + 1)
        assert torch.equal(together[one], restrict(logits[one], top_p[one], top_k[one]))


def test_restricted_draws_stay_inside_and_reach_everything_inside() -> None:
    logits = logits_for(4, 1, 12)
    tokens = drawn(logits.expand(COUNT, -1), uniform(fold(5, torch.arange(COUNT))), top_p=0.9, top_k=6)
    assert set(tokens.tolist()) == allowed_by_a_plain_loop(logits[0].tolist(), 0.9, 6)


def test_temperature_acts_before_the_nucleus() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(COUNT, -1)
    uniforms = uniform(fold(6, torch.arange(COUNT)))
    cold, hot = (set(drawn(logits, uniforms, temperature=t, top_p=0.8).tolist()) for t in (0.2, 5.0))
    assert cold == {0}
    assert hot == {0, 1, 2}


def test_temperature_zero_takes_the_likeliest_whatever_the_uniform() -> None:
    logits = logits_for(7, 50, 30)
    for value in (1e-7, 0.5, 1 - 1e-7):
        assert torch.equal(drawn(logits, torch.full((50,), value), temperature=0.0), logits.argmax(dim=1))


def test_forbidden_tokens_are_never_drawn_even_at_the_ends() -> None:
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    uniforms = torch.cat([ends, uniform(fold(8, torch.arange(2000)))])
    logits = logits_for(8, 1, 5000).expand(len(uniforms), -1).clone()
    forbidden = torch.ones(5000, dtype=torch.bool)
    forbidden[100:4900:7] = False
    logits[:, forbidden] = -torch.inf
    for settings in ({}, {"temperature": 0.0}, {"temperature": 3.0}, {"top_p": 0.95}, {"top_k": 50}):
        assert not forbidden[drawn(logits, uniforms, **settings)].any(), settings


def test_a_single_allowed_token_is_always_drawn() -> None:
    logits = torch.full((3, 9), -torch.inf)
    logits[:, 4] = -30.0
    assert drawn(logits, torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24])).tolist() == [4, 4, 4]


def test_a_row_is_drawn_the_same_alone_and_among_others() -> None:
    rows = 24
    logits, uniforms = logits_for(9, rows, 40), uniform(fold(9, torch.arange(rows)))
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.5]).repeat(6)
    top_p = torch.tensor([1.0, 0.9, 0.5]).repeat(8)
    top_k = torch.tensor([0, 4]).repeat(12)
    together = draw(logits, uniforms, temperature, top_p, top_k)
    alone = [
        draw(logits[r : r + 1], uniforms[r : r + 1], temperature[r : r + 1], top_p[r : r + 1], top_k[r : r + 1])
        for r in range(rows)
    ]
    assert together.tolist() == torch.cat(alone).tolist()


def test_drawing_leaves_the_logits_as_they_were() -> None:
    logits = logits_for(10, 4, 8)
    before = logits.clone()
    drawn(logits, torch.full((4,), 0.5), temperature=0.7, top_p=0.5, top_k=3)
    assert torch.equal(logits, before)
