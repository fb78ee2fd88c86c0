"""Stateless random numbers: hashes of counters, with the same bits on every device and for every batching.

A key is an int64 tensor, one element per stream (usually one per sample). Element i of stream s is the i-th output of
SplitMix64 seeded with s (Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195), so it depends on that
sample's key and on i alone. There is no generator to save, and a rank, a worker or a restart cannot change a draw.
torch has few unsigned operations, so everything is int64 arithmetic, which wraps modulo 2**64 and is exact everywhere.
"""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from math import prod

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of this unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)
UNSIGNED = (1 << 64) - 1
CHUNK = 1 << 14  # elements mixed at once on a CPU: 128 KiB, which stay in the second-level cache


def _shift_xor_(x: Tensor, amount: int, scratch: Tensor) -> None:
    # >> on int64 keeps the sign; the mask makes it the logical shift of the hash's definition.
    torch.bitwise_right_shift(x, amount, out=scratch)
    scratch.bitwise_and_((1 << (64 - amount)) - 1)
    x.bitwise_xor_(scratch)


def _mix_(x: Tensor, scratch: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    _shift_xor_(x, 30, scratch)
    x.mul_(MIX_1)
    _shift_xor_(x, 27, scratch)
    x.mul_(MIX_2)
    _shift_xor_(x, 31, scratch)
    return x


def _mix(x: Tensor) -> Tensor:
    return _mix_(x.clone(), torch.empty_like(x))


@lru_cache(maxsize=1 << 12)
def _mixed_word(counter: int | str) -> int:
    """_mix of a name or a number, plus GOLDEN, without a tensor: most are the same at every step."""
    if isinstance(counter, str):
        counter = int.from_bytes(blake2b(counter.encode(), digest_size=8).digest(), "little")
    x = (counter + GOLDEN) & UNSIGNED
    x = ((x ^ x >> 30) * MIX_1) & UNSIGNED
    x = ((x ^ x >> 27) * MIX_2) & UNSIGNED
    return _signed(x ^ x >> 31)


def key(*counters: int | str | Tensor) -> Tensor:
    """The key of these counters in this order. Strings are names; tensors broadcast to one key per element."""
    return fold(torch.zeros((), dtype=torch.int64), *counters)


def fold(state: Tensor, *counters: int | str | Tensor) -> Tensor:
    """The key of a child of `state`: fold(key, "flip"), fold(key, "view", 1)."""
    for counter in counters:
        if isinstance(counter, Tensor) and state.ndim == 0:
            state = state.to(counter.device)
        # The counter is mixed before it meets the state, so that (a, b) and (a + 1, b - 1) are unrelated.
        word = _mix(counter.to(torch.int64) + GOLDEN) if isinstance(counter, Tensor) else _mixed_word(counter)
        state = _mix((state ^ word) * MIX_2 + GOLDEN)
    return state


def _chunks(state: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
    """The outputs, as pieces of the flattened (streams x count) array that fit the cache."""
    streams = state.reshape(-1, 1)
    # Output i of SplitMix64 hashes seed + (i + 1) * GOLDEN.
    steps = torch.arange(1, count + 1, device=state.device, dtype=torch.int64).mul_(GOLDEN)
    if state.device.type != "cpu":
        values = (streams + steps).reshape(-1)
        yield slice(0, values.numel()), _mix_(values, torch.empty_like(values))
        return
    buffer = torch.empty(2, CHUNK, dtype=torch.int64)
    if count >= CHUNK:  # long streams: pieces of one stream
        for row in range(len(streams)):
            for start in range(0, count, CHUNK):
                part = steps[start : start + CHUNK]
                values = torch.add(part, streams[row], out=buffer[0, : len(part)])
                offset = row * count + start
                yield slice(offset, offset + len(part)), _mix_(values, buffer[1, : len(part)])
        return
    rows = CHUNK // max(count, 1)  # short streams: several whole streams per piece
    for start in range(0, len(streams), rows):
        part = streams[start : start + rows]
        size = len(part) * count
        values = torch.add(part, steps, out=buffer[0, :size].view(len(part), count)).view(-1)
        yield slice(start * count, start * count + size), _mix_(values, buffer[1, :size])


def bits(state: Tensor, *shape: int) -> Tensor:
    """64 random bits per element, as int64: shape of the key + shape."""
    out = torch.empty(state.numel() * prod(shape), dtype=torch.int64, device=state.device)
    for where, values in _chunks(state, prod(shape)):
        out[where] = values
    return out.view((*state.shape, *shape))


def uniform(state: Tensor, *shape: int) -> Tensor:
    """float32 in [0, 1): the upper 24 bits, so every value is exact."""
    out = torch.empty(state.numel() * prod(shape), device=state.device)
    for where, values in _chunks(state, prod(shape)):
        out[where] = values.bitwise_right_shift_(40).bitwise_and_((1 << 24) - 1)
    return out.mul_(2.0**-24).view((*state.shape, *shape))


def integers(state: Tensor, high: int, *shape: int) -> Tensor:
    """int64 in [0, high). A value's probability is off by less than high / 2**32, relatively."""
    if not 0 < high <= 1 << 31:
        raise ValueError(f"high {high} is not in 1..2**31")
    return (((bits(state, *shape) >> 32) & 0xFFFFFFFF) * high) >> 32


def permutation(state: Tensor, n: int) -> Tensor:
    """A permutation of 0..n-1 per stream: shape of the key + (n,)."""
    return bits(state, n).argsort(dim=-1, stable=True)


def normal(state: Tensor, *shape: int) -> Tensor:
    """float32 standard normals, by Box and Muller in float64. A GPU divides by constants otherwise, which may change
    the last digit of about one in 10^8.

    log and cos are polynomials of +, * and sqrt, which IEEE 754 defines to the last bit: libm and CUDA round log and
    cos differently, and one bit would make other augmentations and other runs. (torch.compile may fuse a product with a
    sum, which rounds only once.)
    """
    first, second = bits(fold(state, 0), *shape), bits(fold(state, 1), *shape)
    radius = (-2.0 * _log(_open_unit(first))).sqrt()
    return (radius * _cos_turns(_open_unit(second))).to(torch.float32)


def _open_unit(values: Tensor) -> Tensor:
    """float64 in (0, 1), from the upper 52 bits."""
    return (((values >> 12) & ((1 << 52) - 1)).to(torch.float64) + 0.5) * 2.0**-52


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float64: exponent from the bits, 2 atanh((m-1)/(m+1)) for the mantissa m."""
    raw = x.view(torch.int64)
    # Mantissas in [sqrt(1/2), sqrt(2)) keep the series short: the constant is the bits of sqrt(1/2).
    exponent = (raw - 0x3FE6A09E667F3BCD) >> 52
    mantissa = (raw - (exponent << 52)).view(torch.float64)
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    series = torch.zeros_like(x)
    for odd in range(23, 0, -2):
        series = series * square + 1.0 / odd
    return exponent.to(torch.float64) * 0.6931471805599453 + 2.0 * ratio * series


def _cos_turns(turns: Tensor) -> Tensor:
    """cos(2 pi t) for t in (0, 1): folded to a quarter turn around 0, then Taylor's series."""
    folded = (turns - 0.5).abs()  # cos(2 pi t) = -cos(2 pi folded), folded in [0, 1/2]
    near = torch.minimum(folded, 0.5 - folded)  # a quarter turn at most; the sign follows from the half
    angle = near * 6.283185307179586
    square = angle * angle
    series = torch.zeros_like(turns)
    for even in range(22, -1, -2):
        series = series * (-square) / ((even + 1) * (even + 2)) + 1.0
    return torch.where(folded < 0.25, -series, series)
