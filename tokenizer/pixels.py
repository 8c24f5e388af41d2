"""Pixels of a picture file, 0 to 255, and the tokenizer's numbers, -1 to 1."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def from_pixels(frames: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in [-1, 1]."""
    if not frames.flags.writeable or min(frames.strides) < 0:
        frames = frames.copy()  # torch takes no others
    return torch.from_numpy(frames).to(device).movedim(-1, -4).float() / 127.5 - 1


def to_pixels(video: Tensor) -> np.ndarray:
    """[..., 3, T, H, W] in [-1, 1] -> uint8 [..., T, H, W, 3]; values beyond are clipped."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-4, -1).cpu().numpy()
