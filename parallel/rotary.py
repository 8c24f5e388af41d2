"""The turn of `inference.rope.rotate` with few passes over memory; its gradient is the turn back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def full_angles(angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for whole heads.

    Args:
        angles: of `inference.rope.rotary_angles`, [B, S, D/2].

    Returns:
        cos twice and (-sin, sin), [S, B, 1, D] each.
    """
    angles = angles.transpose(0, 1)[:, :, None]  # [B, S, D/2] -> [S, B, 1, D/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    """Turns the pairs (j, j + D/2) by the angles, or by sign = -1 back: float32 (or float64) [S, B, heads, D], a new tensor."""
    return torch.mul(x, cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin, value=sign)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x.float(), cos, sin).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return turn(grad.float(), cos, sin, -1).to(grad.dtype), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [S, B, heads, D], turned in float32, in their own dtype."""
    return _Rotate.apply(x, cos, sin)
