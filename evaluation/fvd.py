"""Frechet video distance (Unterthiner et al. 2018, "Towards accurate generative models of video"): streamed statistics of I3D
features, and the distance between two Gaussians.

The detector is the torchscript I3D (Kinetics-400, 400 logits as features) that most published PyTorch figures use, among them
StyleGAN-V's. It is given as a file: nothing is downloaded here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tokenizer.errors import UserError
from tokenizer.pixels import from_pixels

SIDE = 224  # pixels, what I3D was trained on
LEAST_FRAMES = 10  # I3D halves time three times and then averages over windows of two; published code asks for 10
USUAL_FRAMES = 16  # of the clips of published figures


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean and scatter of features; those of parts add up to those of the whole, in any order and across processes
    (plain arrays, which pickle).

    Everything is float64, and means are taken out before squares are summed (Chan, Golub and LeVeque 1979): sums of raw squares
    lose what a small variance beside a large mean has to say.

    Attributes:
        count: n.
        mean: [D].
        scatter: sum over n of (x - mean)(x - mean)^T, [D, D].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureStatistics:
        """Of features [n, D], n of 1 or more."""
        features = np.asarray(features, dtype=np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        count = self.count + other.count
        apart = other.mean - self.mean
        between = np.outer(apart, apart) * (self.count * other.count / count)
        mean = self.mean + apart * (other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased (n - 1), as the original implementation's, [D, D].

        Raises:
            UserError: fewer than two features.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 clips, not {self.count}: give more.")
        return self.scatter / (self.count - 1)


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """|m - m'|^2 + tr S + tr S' - 2 tr (S S')^(1/2), the squared 2-Wasserstein distance of two Gaussians (Dowson and Landau 1982).

    With S = L L^T and S' = L' L'^T, the trace of the root is the sum of the singular values of L^T L': no root of a
    matrix that is not symmetric, no complex rounding errors, and singular covariances (fewer clips than features) are nothing special.

    Args:
        mean, other_mean: [D].
        covariance, other_covariance: [D, D], symmetric and positive semi-definite.
    """
    root = np.linalg.svd(_factor(covariance).T @ _factor(other_covariance), compute_uv=False).sum()
    apart = np.square(np.asarray(mean, np.float64) - other_mean).sum()
    # rounding can take the distance of equal Gaussians below zero
    return max(0.0, float(apart + np.trace(covariance) + np.trace(other_covariance) - 2 * root))


def frechet_video_distance(real: FeatureStatistics, made: FeatureStatistics) -> float:
    """FVD between two sets of clips. It falls with the number of clips, so compare only equal numbers.

    Raises:
        UserError: fewer than two clips on a side.
    """
    return frechet_distance(real.mean, real.covariance, made.mean, made.covariance)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """L with L L^T = S; directions whose variance is a rounding error are left out, since their roots would not be one."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    noise = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors * np.sqrt(np.where(values > noise, values, 0.0))


class I3D:
    """The feature extractor.

    Torchscript is code: loading a file runs it, with all rights of this process. So a file is only ever loaded from the path that the
    user names; name only one whose origin you know.

    Args:
        file: the torchscript. It is called as `detector(x, rescale=False, resize=False, return_features=True)` with x
            [B, 3, T, 224, 224] in [-1, 1], and gives features [B, D].
        device: where to run.

    Raises:
        UserError: the file is missing, is no torchscript, or does not take such a call; a short black clip tells.
    """

    def __init__(self, file: str | Path, device: str | torch.device = "cpu"):
        self.file, self.device = i3d_file(file), torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # torchscript is on its way out, but the detector exists as nothing else
                self.detector = torch.jit.load(str(self.file), map_location=self.device).eval()
        except (RuntimeError, ValueError, EOFError) as error:
            raise UserError(
                f"{file} can't be loaded as torchscript ({_first_words(error)}): give the torchscript file of I3D."
            ) from error
        self(np.zeros((1, USUAL_FRAMES, 16, 16, 3), np.uint8))  # better now than after an hour of reconstructing

    @torch.no_grad()
    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """Features of clips.

        Args:
            clips: uint8 [B, T, H, W, 3], T of 10 or more; any size, brought to 224x224 bilinearly.

        Returns:
            float64 [B, D].

        Raises:
            UserError: clips of fewer frames, or the detector fails.
        """
        batch, frames = clips.shape[:2]
        if frames < LEAST_FRAMES:
            raise UserError(f"I3D needs clips of at least {LEAST_FRAMES} frames, not {frames}: give longer ones.")
        video = from_pixels(clips, self.device)
        flat = video.transpose(1, 2).flatten(0, 1)  # [B, 3, T, H, W] -> [B * T, 3, H, W]
        flat = F.interpolate(flat, (SIDE, SIDE), mode="bilinear", align_corners=False)
        video = flat.unflatten(0, (batch, frames)).transpose(1, 2).contiguous()  # [B, 3, T, 224, 224]
        try:
            features = self.detector(video, rescale=False, resize=False, return_features=True)
        except (RuntimeError, TypeError) as error:
            raise UserError(
                f"{self.file} does not work as I3D ({_first_words(error)}): give the torchscript that FVD is measured with."
            ) from error
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != batch:
            raise UserError(
                f"{self.file} gives no features [clips, D]: give the torchscript that FVD is measured with."
            )
        if not features.isfinite().all():
            raise UserError(f"{self.file} gives features that are not finite: give an undamaged file.")
        return features.double().cpu().numpy()


def i3d_file(file: str | Path) -> Path:
    """The detector's file.

    Raises:
        UserError: it is missing.
    """
    if not Path(file).is_file():
        raise UserError(f"the I3D file {file} does not exist: name the torchscript file that FVD is measured with.")
    return Path(file)


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[-150:]
