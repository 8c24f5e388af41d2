"""PSNR against closed forms; SSIM against closed forms and a computation in numpy."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import structural_similarity_index_measure

from evaluation.fidelity import LARGEST_PSNR, SquaredError, high_frequency_energy, psnr_summary, squared_error, ssim


def test_psnr_of_a_constant_error():
    original = np.full((5, 16, 16, 3), 100, dtype=np.uint8)
    for error in (1, 10, 100):
        for sign in (1, -1):
            other = (original.astype(int) + sign * error).astype(np.uint8)
            assert squared_error(original, other).psnr == pytest.approx(20 * math.log10(255 / error), abs=1e-9)
    assert squared_error(original, original).psnr == LARGEST_PSNR


def test_the_mask_picks_the_pixels():
    original = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    other = original.copy()
    mask = np.zeros((2, 8, 8), dtype=bool)
    mask[1, 2:4, 2:4] = True
    other[mask] = 51
    assert squared_error(original, other, mask).psnr == pytest.approx(20 * math.log10(5))
    assert squared_error(original, other).psnr == pytest.approx(20 * math.log10(5) + 10 * math.log10(128 / 4))
    assert math.isnan(squared_error(original, other, np.zeros_like(mask)).psnr)


def test_mean_of_clips_and_pooled_differ_as_defined():
    # 1 of 10 pixels wrong by 255: 10 dB; all wrong by 25.5: 20 dB, three times as many pixels
    errors = [SquaredError(255.0**2, 10), SquaredError(25.5**2 * 30, 30), SquaredError(0.0, 0)]
    mean, pooled = psnr_summary(errors)
    assert mean == pytest.approx(15)
    assert pooled == pytest.approx(-10 * math.log10((0.1 * 10 + 0.01 * 30) / 40))
    assert psnr_summary([SquaredError()]) == (None, None)


def noise(seed, frames=9, height=24, width=40):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_ssim_of_flat_clips_is_the_closed_form():
    dark, light = np.full((3, 16, 16, 3), 51, np.uint8), np.full((3, 16, 16, 3), 204, np.uint8)
    # without any variance only the luminance term is left
    assert ssim(dark, light) == pytest.approx((2 * 0.2 * 0.8 + 1e-4) / (0.04 + 0.64 + 1e-4), abs=1e-4)
    assert ssim(noise(0), noise(0)) == pytest.approx(1, abs=1e-6)


def test_ssim_equals_a_computation_in_numpy():
    original = noise(1)
    other = np.clip(original.astype(int) + np.random.default_rng(2).normal(0, 40, original.shape), 0, 255)
    other = other.astype(np.uint8)

    def blur(values):  # a window of 11 pixels a side, mirrored at the edges
        return gaussian_filter(values, sigma=(0, 1.5, 1.5, 0), truncate=3.5, mode="mirror")

    a, b = original / 255, other / 255
    variance_a, variance_b = blur(a * a) - blur(a) ** 2, blur(b * b) - blur(b) ** 2
    covariance = blur(a * b) - blur(a) * blur(b)
    top = (2 * blur(a) * blur(b) + 0.01**2) * (2 * covariance + 0.03**2)
    expected = top / ((blur(a) ** 2 + blur(b) ** 2 + 0.01**2) * (variance_a + variance_b + 0.03**2))
    assert 0.5 < expected.mean() < 0.95
    assert ssim(original, other) == pytest.approx(expected.mean(), abs=1e-5)
    # frames are taken a few at a time, which must not show
    whole = [torch.tensor(clip).permute(0, 3, 1, 2).double() for clip in (other, original)]
    assert ssim(original, other) == pytest.approx(
        structural_similarity_index_measure(*whole, data_range=255.0).item(), abs=1e-5
    )


def test_high_frequency_energy_counts_waves_above_the_cutoff_only():
    def wave(cycles: float, amplitude: float) -> np.ndarray:
        line = 128 + amplitude * np.sin(2 * np.pi * cycles * np.arange(64))
        return np.broadcast_to(line.round()[None, None, :, None], (2, 64, 64, 3)).astype(np.uint8)

    fast, slow = wave(0.25, 100), wave(0.03125, 100)
    # the power of the windowed wave, by Parseval: amplitude^2 / 2 times the sum of the squared window
    window = np.hanning(64)[:, None] * np.hanning(64)
    assert high_frequency_energy(fast) == pytest.approx((100 / 255) ** 2 / 2 * (window**2).sum(), rel=0.02)
    assert high_frequency_energy(slow) < 1e-3 * high_frequency_energy(fast)
    assert high_frequency_energy(wave(0.25, 50)) == pytest.approx(high_frequency_energy(fast) / 4, rel=0.05)
    assert high_frequency_energy(fast, cutoff=0.3) < 1e-3 * high_frequency_energy(fast)
