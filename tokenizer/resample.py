"""The three linear maps between grids that the whole project shares: `up`, and the two kinds of `down`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DownMode = Literal["area", "bilinear"]


def up(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners off, frame by frame: [..., C, h, w] -> [..., C, H, W] (section 2, `up`)."""
    return _resize(features, grid, "bilinear")


def down(features: Tensor, grid: tuple[int, int], mode: DownMode) -> Tensor:
    """[..., C, H, W] -> [..., C, h, w] by area means or bilinearly (align_corners off, no antialias, Eq. 2)."""
    return _resize(features, grid, mode)


def _resize(features: Tensor, grid: tuple[int, int], mode: DownMode) -> Tensor:
    if tuple(features.shape[-2:]) == tuple(grid):
        return features
    lead = features.shape[:-3]
    flat = features.flatten(0, -4) if lead else features[None]  # [..., C, h, w] -> [M, C, h, w]
    if mode == "area":
        flat = F.adaptive_avg_pool2d(flat, grid)
    else:
        flat = F.interpolate(flat, size=grid, mode="bilinear", align_corners=False)
    return flat.view(*lead, *flat.shape[1:]) if lead else flat[0]


def to_values(bits: Tensor) -> Tensor:
    """Bits [..., d] -> q = (2 b - 1) / sqrt(d), float32."""
    return (bits.to(torch.float32) * 2 - 1) * bits.shape[-1] ** -0.5
