"""Entropy of bits against direct counts and closed forms."""

import numpy as np
import pytest
import torch

from evaluation.bit_usage import BitUsage
from tokenizer import ScaleSchedule
from tokenizer.codes import Codes


def codes(probability, schedule, frames=4, batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, frames, h, w, len(probability)) for h, w in schedule.scales]
    return Codes(tuple(torch.rand(s, generator=generator) < torch.tensor(probability) for s in shapes), schedule)


def test_entropy_is_that_of_a_direct_count():
    schedule = ScaleSchedule.square(4, 3)
    drawn = codes([0.5, 0.9, 0.02, 0.0, 1.0, 0.3], schedule)
    usage = BitUsage.of(drawn)
    for k, (height, width) in enumerate(schedule.scales):
        n = 5 * 4 * height * width
        assert usage.tokens[k] == n
        for j in range(6):
            ones = sum(int(bit) for bit in drawn.bits[k][..., j].flatten())
            p = ones / n
            entropy = -sum(q * np.log2(q) for q in (p, 1 - p) if q > 0)
            assert usage.share[k, j] == p and usage.entropy[k, j] == pytest.approx(entropy, abs=1e-12)
            assert usage.dead[k, j] == (p < 0.01 or p > 0.99)


def test_known_shares():
    bits = torch.zeros(1, 1, 20, 20, 4, dtype=torch.bool)
    flat = bits.view(400, 4)
    flat[:200, 0] = True  # a half: 1 bit
    flat[:100, 1] = True  # a quarter: 0.8113 bits
    flat[:4, 2] = True  # exactly 1%: alive
    flat[:397, 3] = True  # 99.25%: dead
    usage = BitUsage.of(Codes((bits,), ScaleSchedule(((20, 20),))))
    np.testing.assert_allclose(usage.entropy[0, :2], [1, 2 - 0.75 * np.log2(3)], rtol=1e-12)
    report = usage.report()
    assert report["share"] == [[0.5, 0.25, 0.01, 0.9925]]
    assert report["dead"] == [1] and report["dead_bits"] == 1 and usage.dead.tolist() == [[False, False, False, True]]
    assert report["entropy_mean"] == [pytest.approx(usage.entropy.sum() / 4)] and report["tokens"] == [400]


def test_parts_add_up_to_the_whole_whatever_their_scales():
    small, large = ScaleSchedule.square(2, 2), ScaleSchedule.square(4, 4)
    parts = [codes([0.2, 0.6], schedule, seed=seed) for seed, schedule in enumerate((small, large, small))]
    usage = BitUsage.of(parts[0]) + BitUsage.of(parts[1]) + BitUsage.of(parts[2])
    assert usage.tokens.tolist() == [3 * 20, 3 * 20 * 4, 20 * 9, 20 * 16]
    for k in range(4):
        bits = torch.cat([part.bits[k].flatten(0, -2) for part in parts if k < len(part.bits)])
        np.testing.assert_allclose(usage.share[k], bits.double().mean(0))
