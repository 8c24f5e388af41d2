"""How close a reconstruction comes to its original, pixel by pixel: PSNR, SSIM, and how much of the fine detail is left."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

LARGEST_PSNR = 100.0  # dB, given to clips without any error: infinity has no mean and no place in JSON
FRAMES_AT_ONCE = 8  # SSIM holds ten float32 copies of the frames that it compares


@dataclass(frozen=True)
class SquaredError:
    """A sum of squared differences and how many were added."""

    total: float = 0.0
    count: int = 0

    def __add__(self, other: SquaredError) -> SquaredError:
        return SquaredError(self.total + other.total, self.count + other.count)

    @property
    def psnr(self) -> float:
        """10 log10(255^2 / mean squared error) in dB, at most `LARGEST_PSNR`; NaN of no pixels."""
        if not self.count:
            return math.nan
        ratio = self.total / self.count / 255**2
        return LARGEST_PSNR if ratio <= 0 else min(LARGEST_PSNR, -10 * math.log10(ratio))


def squared_error(original: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> SquaredError:
    """Of clips uint8 [T, H, W, 3], over the pixels of a mask, bool [T, H, W], or over all."""
    difference = original.astype(np.int64) - other
    if mask is not None:
        difference = difference[mask]
    return SquaredError(float(np.square(difference).sum()), difference.size)


def psnr_summary(errors: list[SquaredError]) -> tuple[float | None, float | None]:
    """The mean over clips of their PSNR, and the PSNR of the pooled error; clips without pixels do not count."""
    counted = [error for error in errors if error.count]
    if not counted:
        return None, None
    return float(np.mean([error.psnr for error in counted])), sum(counted, SquaredError()).psnr


def ssim(original: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of a clip: the mean over frames, channels and places; 1 for equal clips.

    Windows are Gaussian (11 pixels, sigma 1.5); beyond its edges a frame is mirrored. In float32, which is right to 1e-4 (float64 takes
    twenty times as long).

    Args:
        original, other: uint8 [T, H, W, 3], sides of 16 pixels or more.
    """
    values = []
    for start in range(0, len(original), FRAMES_AT_ONCE):
        # [T, H, W, 3] -> [T, 3, H, W] in [0, 1]
        a, b = (
            torch.from_numpy(clip[start : start + FRAMES_AT_ONCE]).permute(0, 3, 1, 2).float() / 255
            for clip in (original, other)
        )
        part = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
        assert isinstance(part, torch.Tensor)  # a pair only where the whole map is asked for
        values += part.tolist()
    return float(np.mean(values))


def high_frequency_energy(clip: np.ndarray, cutoff: float = 0.125) -> float:
    """The spectral power of a clip's frames above a spatial frequency: of a reconstruction over its original's, how sharp it is.

    Frames are windowed (Hann), so that their borders are no edges; the mean over frames and channels, summed over frequencies.

    Args:
        clip: uint8 [T, H, W, 3].
        cutoff: in cycles a pixel, along any direction; 0.125 is a wave of 8 pixels.
    """
    frames = clip.astype(np.float64) / 255  # [T, H, W, 3]
    frames -= frames.mean(axis=(1, 2), keepdims=True)
    height, width = frames.shape[1:3]
    window = np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(np.fft.fft2(frames * window[..., None], axes=(1, 2))) ** 2 / (height * width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    return float(power[:, frequency >= cutoff].sum(axis=1).mean())
