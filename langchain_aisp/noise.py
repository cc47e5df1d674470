"""Noise as a pure function of integer keys: same keys, same numbers, on any device, in any order, in any batch.

A key is an int64. ``fold`` derives new keys from old ones, ``uniform`` and ``normal`` turn keys into numbers. The
hash is the finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB

_WORD = (1 << 64) - 1
_U_GOLDEN, _U_MIX_1, _U_MIX_2 = (each & _WORD for each in (_GOLDEN, _MIX_1, _MIX_2))

UNIFORM_STREAM = 1
NORMAL_STREAM = 2
GUMBEL_STREAM = 3
REDRAWN_STREAM = 4


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own shift of int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _open_unit(bits: Tensor) -> Tensor:
    """The upper 23 bits as float32 in (0, 1); with 24 the largest would round to 1."""
    return _shift_right(bits, 41).to(torch.float32).add_(0.5).mul_(2.0**-23)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@overload
def fold(keys: int, data: int) -> int: ...


@overload
def fold(keys: Tensor, data: Tensor | int) -> Tensor: ...


@overload
def fold(keys: int, data: Tensor) -> Tensor: ...


def fold(keys: Tensor | int, data: Tensor | int) -> Tensor | int:
    """New int64 keys from keys and integers, broadcast against each other; from two numbers a number."""
    if any(isinstance(each, Tensor) and each.device.type != "cpu" for each in (keys, data)):
        return _fold_torch(*(torch.as_tensor(each, dtype=torch.int64) for each in (keys, data)))
    words = _mix_words(_mix_words(_words(keys) + _U_GOLDEN) ^ _mix_words(_words(data) * _U_GOLDEN + _U_MIX_1))
    if isinstance(words, int):
        single = isinstance(keys, int) and isinstance(data, int)
        return _wrap(words) if single else torch.tensor(_wrap(words))
    return torch.from_numpy(words.view(np.int64))


def _fold_torch(keys: Tensor, data: Tensor) -> Tensor:
    return _mix(_mix(keys + _GOLDEN) ^ _mix(data * _GOLDEN + _MIX_1))


def _words(x: Tensor | int) -> Any:
    """On a CPU a single number is mixed by Python and an array by numpy, whose calls cost a fifth of torch's."""
    if isinstance(x, Tensor) and x.dim() > 0:
        return x.to(torch.int64).numpy().view(np.uint64)
    return int(x)


def _mix_words(x: Any) -> Any:
    """``_mix``, in place where there are many."""
    if isinstance(x, int):
        x &= _WORD
        x = (x ^ (x >> 30)) * _U_MIX_1 & _WORD
        x = (x ^ (x >> 27)) * _U_MIX_2 & _WORD
        return x ^ (x >> 31)
    for bits, times in ((30, _U_MIX_1), (27, _U_MIX_2)):
        x ^= x >> bits
        x *= times
    x ^= x >> 31
    return x


def uniform(keys: Tensor, stream: int = UNIFORM_STREAM) -> Tensor:
    """Float32 numbers in (0, 1), one per key: 23 random bits, centred, so that neither end is ever reached."""
    return _open_unit(fold(keys, stream))


def normal(keys: Tensor, width: int) -> Tensor:
    """Standard normal float32 vectors [*keys.shape, width], one per key, by the Box-Muller transform."""
    lanes = torch.arange((width + 1) // 2, device=keys.device)
    bits = fold(fold(keys, NORMAL_STREAM).unsqueeze(-1), lanes)
    radius = _open_unit(bits).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).to(torch.float32).mul_(2.0 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :width]


def gumbel(keys: Tensor) -> Tensor:
    """Standard Gumbel float64 numbers, one per key: 53 random bits, since ranking thousands of them needs no ties."""
    u = _shift_right(fold(keys, GUMBEL_STREAM), 11).to(torch.float64).add_(0.5).mul_(2.0**-53)
    return u.log_().neg_().log_().neg_()


def request_key(seed: int, ids: tuple[int, ...]) -> int:
    """The noise identity of a request: a hash of its seed and its tokens."""
    positions = torch.arange(len(ids))
    digest = fold(torch.tensor(ids, dtype=torch.int64), positions).sum()  # wraps around; order enters by position
    return fold(fold(int(digest), len(ids)), _wrap(seed))


def wave_keys(prompt_key: int, iteration: int, rows: Tensor, length: int) -> Tensor:
    """Fresh keys [N, length] int64 for the rows [N] of one iteration."""
    row_keys = fold(fold(prompt_key, iteration), rows)
    return fold(row_keys.unsqueeze(1), torch.arange(length))


def _wrap(value: int) -> int:
    """Any integer as a signed 64-bit one."""
    return ((value + (1 << 63)) & _WORD) - (1 << 63)
