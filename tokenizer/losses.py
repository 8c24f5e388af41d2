"""The autoencoder's reconstruction loss (DESIGN section 2, Tokenizer objective)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective's terms.

    Args:
        l1, l2: of the absolute and the squared pixel error.
        motion: pixels count 1 + motion * |x - mean of x over time|, so that what moves is learnt beside a large still background.
        edge: of the absolute error of the differences between neighbouring pixels, which keeps outlines sharp.
        commitment, entropy: of the quantiser's losses.
    """

    l1: float = 1.0
    l2: float = 0.0
    motion: float = 0.0
    edge: float = 0.0
    commitment: float = 0.02
    entropy: float = 0.05


def reconstruction_loss(reconstruction: Tensor, video: Tensor, config: LossConfig) -> Tensor:
    """Weighted mean of l1 |e| + l2 e^2 + edge (|d e / dx| + |d e / dy|) over all pixels.

    Args:
        reconstruction, video: [B, 3, T, H, W] in [-1, 1].
        config: the weights.
    """
    error = reconstruction - video
    loss = config.l1 * error.abs() + config.l2 * error.square()
    if config.edge:
        along_x = F.pad(
            error.diff(dim=-1).abs(), (0, 1)
        )  # zeros behind the last column, so that all pixels keep their place
        along_y = F.pad(error.diff(dim=-2).abs(), (0, 0, 0, 1))
        loss = loss + config.edge * (along_x + along_y)
    if config.motion:
        moved = (video - video.mean(dim=2, keepdim=True)).abs().mean(dim=1, keepdim=True)  # [B, 1, T, H, W]
        loss = loss * (1 + config.motion * moved)
    return loss.mean()
