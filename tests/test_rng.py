"""Facts about the random numbers: reference vectors, uniformity, independence, avalanche, invariance, speed."""

import time

import pytest
import torch
from scipy import stats

from sslvit import rng

MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """SplitMix64 as published, in Python integers."""
    out = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def test_the_stream_is_splitmix64_with_its_published_vector():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(v) & MASK for v in rng.bits(torch.tensor(1234567), 3)] == published
    for seed in (0, -1, 1 << 62, -(1 << 63)):
        assert [int(v) & MASK for v in rng.bits(torch.tensor(seed), 20)] == splitmix64(seed & MASK, 20)


@pytest.mark.parametrize("count", [1, 3, rng.CHUNK - 1, rng.CHUNK, 2 * rng.CHUNK + 5])
def test_a_sample_draws_the_same_in_any_batch_and_any_chunk(count):
    keys = rng.key(7, "x", torch.arange(9))
    together = rng.bits(keys, count)
    assert together.shape == (9, count)
    for row in (0, 4, 8):
        assert torch.equal(together[row], rng.bits(keys[row], count))
    assert torch.equal(rng.bits(keys.flip(0), count), together.flip(0))
    assert torch.equal(rng.bits(keys, count + 1)[:, :-1], together)


def test_shapes_are_the_key_then_the_draw():
    keys = rng.key(1, torch.arange(6)).view(2, 3)
    assert rng.uniform(keys, 4, 5).shape == (2, 3, 4, 5)
    assert rng.uniform(keys).shape == (2, 3)
    assert rng.uniform(rng.key(1), 2).shape == (2,)
    assert rng.uniform(rng.key(1)).shape == rng.bits(rng.key(1)).shape == ()
    assert rng.uniform(keys[:0], 4).shape == (0, 3, 4)


def test_uniform_is_the_upper_24_bits():
    keys = rng.key(2, torch.arange(5))
    expected = [[((int(v) & MASK) >> 40) / 2**24 for v in row] for row in rng.bits(keys, 7)]
    assert rng.uniform(keys, 7).tolist() == expected


def test_counters_order_and_kind_matter():
    keys = [rng.key(1, 2), rng.key(2, 1), rng.key(3, 0), rng.key(1), rng.key("1", 2), rng.key(1, 2, 0), rng.key(-1, 2)]
    assert len({int(k) for k in keys}) == len(keys)
    assert torch.equal(rng.key(1, torch.tensor([2, 5])), torch.stack([rng.key(1, 2), rng.key(1, 5)]))
    assert torch.equal(rng.fold(rng.key(1), "flip", 3), rng.key(1, "flip", 3))


def test_a_million_neighbouring_counters_give_a_million_keys():
    grid = rng.key(0, torch.arange(1000)[:, None], torch.arange(1000))
    assert grid.flatten().unique().numel() == 1_000_000


@pytest.mark.parametrize("over", ["draws", "samples", "seeds"])
def test_uniforms_are_uniform_along_every_counter(over):
    n = 200_000
    if over == "draws":
        values = rng.uniform(rng.key(11), n)
    elif over == "samples":
        values = rng.uniform(rng.key(11, torch.arange(n)))
    else:
        values = rng.uniform(rng.key(torch.arange(n), 11))
    assert stats.kstest(values.double().numpy(), "uniform").pvalue > 0.01
    # 16 x 16 cells of neighbouring pairs: serial correlation would empty or fill some.
    pairs = (values.view(-1, 2) * 16).long()
    counts = torch.bincount(pairs[:, 0] * 16 + pairs[:, 1], minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_neighbouring_streams_are_independent():
    values = rng.uniform(rng.key(5, torch.arange(400)), 2000).double()
    correlation = torch.corrcoef(values)
    off = correlation[~torch.eye(400, dtype=torch.bool)]
    # 79,800 pairs of N(0, 1/2000): the largest is expected near 4.4 sigma.
    assert off.abs().max() < 6 / 2000**0.5
    assert abs(off.std() * 2000**0.5 - 1) < 0.02


def test_one_flipped_counter_bit_flips_half_of_the_output():
    n = 4096
    counters = rng.bits(rng.key("avalanche"), n)
    base = rng.bits(rng.fold(rng.key(0), counters))
    for bit in range(0, 64, 3):
        changed = rng.bits(rng.fold(rng.key(0), counters ^ rng._signed(1 << bit))) ^ base
        ones = torch.stack([(changed >> i) & 1 for i in range(64)], 1).double().mean(0)
        # each output bit flips with probability 1/2: standard deviation 1/128 over 4096 counters
        assert (ones - 0.5).abs().max() < 6 / 128
        assert abs(ones.mean() - 0.5) < 6 / (128 * 8)


def test_normals_are_normal():
    values = rng.normal(rng.key(3, torch.arange(100)), 2000).double().flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 0.01
    assert abs(values).max() > 4  # the tails are there: P(no |z| > 4 among 200,000) < 1e-5


def test_our_log_and_cosine_are_right_to_double_precision():
    x = rng._open_unit(rng.bits(rng.key(4), 100_000))
    extremes = torch.tensor([2.0**-53, 1 - 2.0**-53, 0.25, 0.5, 0.75], dtype=torch.float64)
    x = torch.cat([x, extremes])
    torch.testing.assert_close(rng._log(x), x.log(), rtol=4e-16, atol=1e-16)
    torch.testing.assert_close(rng._cos_turns(x), (2 * torch.pi * x).cos(), rtol=0, atol=2e-15)


def test_integers_cover_their_range_evenly():
    values = rng.integers(rng.key(6), 10, 100_000)
    counts = torch.bincount(values, minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    with pytest.raises(ValueError, match="high 0"):
        rng.integers(rng.key(6), 0, 3)


def test_permutations_are_permutations_and_all_equally_likely():
    orders = rng.permutation(rng.key(8, torch.arange(24_000)), 4)
    assert torch.equal(orders.sort(-1).values, torch.arange(4).expand(24_000, 4))
    counts = torch.bincount((orders * torch.tensor([64, 16, 4, 1])).sum(-1))
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_bits():
    keys = rng.key(9, torch.arange(50))
    for draw in (rng.bits, rng.uniform, rng.normal):
        assert torch.equal(draw(keys, 1000), draw(keys.cuda(), 1000).cpu())
    assert torch.equal(rng.permutation(keys, 100), rng.permutation(keys.cuda(), 100).cpu())


@pytest.mark.timing
@pytest.mark.slow
def test_one_core_draws_fifty_million_uniforms_a_second():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        keys, seconds = rng.key(1, torch.arange(256)), []
        for _ in range(7):
            start = time.perf_counter()
            rng.uniform(keys, 20_000)
            seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    assert 256 * 20_000 / sorted(seconds)[3] > 50e6
