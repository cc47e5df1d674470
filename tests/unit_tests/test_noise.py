"""Noise is a function of its key alone, and looks like what it claims to be.

Seeds are fixed, so a passing test passes always; each bound says how often a fresh seed would miss it.
"""

import math

import pytest
import torch

from langchain_aisp import noise
from langchain_aisp.noise import fold, gumbel, normal, request_key, uniform, wave_keys

COUNT = 200_000
KEYS = fold(12345, torch.arange(COUNT))
SIGMAS = 5.0  # a normal variable is further out once in 1.7 million


def test_the_hash_is_the_published_one() -> None:
    # the first three numbers of SplitMix64 seeded with 0
    seeds = torch.tensor([1, 2, 3]) * noise._GOLDEN
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % (1 << 64) for value in noise._mix(seeds).tolist()] == expected


def test_uniforms_have_the_moments_of_the_unit_interval_and_never_reach_its_ends() -> None:
    u = uniform(KEYS).double()
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    assert abs(u.mean() - 1 / 2) < SIGMAS * math.sqrt(1 / 12 / COUNT)
    assert abs(u.square().mean() - 1 / 3) < SIGMAS * math.sqrt(4 / 45 / COUNT)


@pytest.mark.parametrize("bits", [0, -1])
def test_the_open_unit_interval_stays_open_for_extreme_bits(bits: int) -> None:
    value = float(noise._open_unit(torch.tensor([bits])))
    assert 0 < value < 1
    assert math.isfinite(math.log(value))
    assert math.isfinite(math.log1p(-value))


def test_normals_have_the_moments_of_a_standard_normal() -> None:
    z = normal(KEYS[: COUNT // 4], 4).double().flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - moment) < SIGMAS * math.sqrt(variance / COUNT), power
    assert abs((z.abs() > 1.959964).double().mean() - 0.05) < SIGMAS * math.sqrt(0.05 * 0.95 / COUNT)


def test_gumbels_have_the_moments_of_a_standard_gumbel() -> None:
    g = gumbel(KEYS)
    assert abs(g.mean() - 0.5772156649) < SIGMAS * math.sqrt(math.pi**2 / 6 / COUNT)
    assert abs(g.var() - math.pi**2 / 6) < SIGMAS * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / COUNT)
    assert len(g.unique()) == COUNT


def test_the_largest_gumbel_picks_each_item_as_often_as_its_probability() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    draws = gumbel(KEYS.reshape(-1, 4))
    picked = (probabilities.log() + draws).argmax(dim=1).bincount(minlength=4) / len(draws)
    assert ((picked - probabilities).abs() < SIGMAS * (probabilities * (1 - probabilities) / len(draws)).sqrt()).all()


def test_components_of_a_vector_and_neighbouring_keys_are_uncorrelated() -> None:
    z = normal(fold(3, torch.arange(50_000)), 6).double()
    bound = SIGMAS / math.sqrt(len(z))
    correlation = z.T @ z / len(z)
    assert (correlation - torch.diag(correlation.diag())).abs().max() < bound
    assert (z[1:] * z[:-1]).mean(dim=0).abs().max() < bound


def test_streams_of_one_key_are_uncorrelated() -> None:
    z, u, g = normal(KEYS, 1).squeeze(1).double(), uniform(KEYS).double(), gumbel(KEYS)
    streams = torch.stack([z, u, g])
    assert (streams.corrcoef() - torch.eye(3)).abs().max() < SIGMAS / math.sqrt(COUNT)


def test_rows_positions_and_iterations_have_different_keys() -> None:
    keys = torch.cat([wave_keys(99, iteration, torch.arange(64), 128) for iteration in range(8)])
    assert len(keys.unique()) == keys.numel()


def test_noise_is_the_same_in_any_order_and_any_batch() -> None:
    keys = wave_keys(5, 2, torch.arange(6), 7)
    whole = normal(keys, 5)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal(keys[shuffled], 5), whole[shuffled])
    assert torch.equal(normal(keys.flatten(), 5).reshape(whole.shape), whole)
    assert torch.equal(normal(keys[3, 4], 5), whole[3, 4])
    assert torch.equal(uniform(keys)[2:4], uniform(keys[2:4]))
    assert torch.equal(gumbel(keys)[2:4], gumbel(keys[2:4]))


def test_a_row_has_the_same_keys_in_a_longer_wave_and_a_longer_response() -> None:
    small, large = wave_keys(5, 2, torch.arange(3), 4), wave_keys(5, 2, torch.arange(9), 11)
    assert torch.equal(small, large[:3, :4])
    assert torch.equal(wave_keys(5, 2, torch.tensor([7]), 4), large[7:8, :4])


def test_an_odd_width_is_allowed() -> None:
    assert normal(KEYS[:10], 7).shape == (10, 7)
    assert normal(KEYS[:10], 1).shape == (10, 1)


def test_folding_broadcasts_and_is_not_symmetric() -> None:
    assert fold(KEYS[:3].unsqueeze(1), torch.arange(4)).shape == (3, 4)
    assert fold(1, 2) != fold(2, 1)


def test_a_request_key_tells_seeds_lengths_and_orders_apart() -> None:
    requests = [(0, (1, 2)), (1, (1, 2)), (0, (2, 1)), (0, (1, 2, 0)), (0, (0, 1, 2)), (0, ()), (0, (0,)), (-1, ())]
    assert len({request_key(seed, ids) for seed, ids in requests}) == len(requests)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 + 5, -(2**70)])
def test_any_integer_is_a_seed(seed: int) -> None:
    key = request_key(seed, (1, 2, 3))
    assert -(2**63) <= key < 2**63
    assert key == request_key(seed + 2**64, (1, 2, 3))


def test_numpy_and_python_on_a_cpu_give_the_bits_of_torch_elsewhere():
    keys = torch.tensor([0, 1, -1, 2**62, -(2**63), 2**63 - 1])
    for data in (keys.flip(0), keys[:, None], torch.tensor(7)):
        assert torch.equal(noise.fold(keys, data), noise._fold_torch(keys, data))
    for one in keys:
        assert torch.equal(noise.fold(int(one), keys), noise._fold_torch(one, keys))
        assert [noise.fold(int(one), int(other)) for other in keys] == noise._fold_torch(one, keys).tolist()
