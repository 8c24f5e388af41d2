"""The turn of `inference.rope.rotate` with few passes over memory; its gradient is the turn back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Angles(NamedTuple):
    """For whole heads: cos twice and (-sin, sin), float32 [S, B, 1, D] each."""

    cos: Tensor
    sin: Tensor

    def at(self, places: Tensor) -> Angles:
        """Those of some tokens."""
        return Angles(self.cos[places], self.sin[places])


def full_angles(angles: Tensor) -> Angles:
    """cos and sin of `inference.rope.rotary_angles`, [B, S, D/2]."""
    angles = angles.transpose(0, 1)[:, :, None]  # [B, S, D/2] -> [S, B, 1, D/2]
    cos, sin = angles.cos(), angles.sin()
    return Angles(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def turn(x: Tensor, angles: Angles, sign: int = 1) -> Tensor:
    """Turns the pairs (j, j + D/2) by the angles, or by sign = -1 back: float32 (or float64) [S, B, heads, D], a new tensor."""
    return torch.mul(x, angles.cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), angles.sin, value=sign)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Angles) -> Tensor:
        ctx.angles = angles
        return turn(x.float(), angles).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return turn(grad.float(), ctx.angles, -1).to(grad.dtype), None


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Queries or keys [S, B, heads, D], turned in float32, in their own dtype."""
    return _Rotate.apply(x, angles)
