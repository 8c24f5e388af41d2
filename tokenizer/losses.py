"""The autoencoder's reconstruction loss (DESIGN section 2, Tokenizer objective)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective's terms.

    Args:
        l1, l2: of the absolute and the squared pixel error.
        motion: pixels count 1 + motion * |x - mean of x over time|, so that what moves is learnt beside a large still background.
        commitment, entropy: of the quantiser's losses.
    """

    l1: float = 1.0
    l2: float = 0.0
    motion: float = 0.0
    commitment: float = 0.02
    entropy: float = 0.05


def reconstruction_loss(reconstruction: Tensor, video: Tensor, config: LossConfig) -> Tensor:
    """Weighted mean of l1 |e| + l2 e^2 over all pixels.

    Args:
        reconstruction, video: [B, 3, T, H, W] in [-1, 1].
        config: the weights.
    """
    error = reconstruction - video
    loss = config.l1 * error.abs() + config.l2 * error.square()
    if config.motion:
        moved = (video - video.mean(dim=2, keepdim=True)).abs().mean(dim=1, keepdim=True)  # [B, 1, T, H, W]
        loss = loss * (1 + config.motion * moved)
    return loss.mean()
