"""Multi-scale temporal rotary embedding (Eq. 7): each pair keeps its native frequency and belongs to one axis."""

from __future__ import annotations

import torch
from torch import Tensor

AXES = "thwhwthw"
"""Pair j turns with axis AXES[j mod 8]: interleaved, so that each axis spans the whole spectrum of frequencies."""


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10000.0) -> Tensor:
    """The angle of each rotary pair.

    Args:
        positions: (time, height, width), [B, S, 3] (any leading shape).
        head_dim: D, even.
        theta: base of the frequencies theta^(-2j/D).

    Returns:
        float32 [B, S, D/2].
    """
    device = positions.device
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)  # [D/2]
    axis = torch.tensor(["thw".index(AXES[pair % len(AXES)]) for pair in range(head_dim // 2)], device=device)
    return positions.float()[..., axis] * frequencies


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (j, j + D/2) of queries or keys.

    Args:
        x: [B, S, heads, D].
        cos, sin: of the angles, [B, S, D/2].

    Returns:
        [B, S, heads, D] in x's dtype; the turn itself is in float32.
    """
    return rotate(x, cos[..., None, :], sin[..., None, :])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The turn for cos and sin [..., D/2] that broadcast against x [..., D]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
