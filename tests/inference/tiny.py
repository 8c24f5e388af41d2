"""Tiny networks and inputs for this room's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inference.config import ModelConfig
from inference.model import VideoARTransformer
from tokenizer.codes import Codes
from tokenizer.scales import ScaleSchedule

SCALES = ((1, 1), (2, 2), (3, 4))


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers, three scales, three frames, eight bits."""
    values = dict(
        num_layers=2, hidden_size=64, num_attention_heads=2, scales=SCALES, num_frames=3, ffn_hidden_size=96, bits=8, text_dim=16,
        max_text_length=5,
    )  # fmt: skip
    return ModelConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> VideoARTransformer:
    """A network whose weights are large enough for every input to show in the logits."""
    torch.manual_seed(seed)
    model = VideoARTransformer(tiny_config(**changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.mul_(4)
    return model


def random_codes(batch: int, num_frames: int, dim: int = 8, scales=SCALES, seed: int = 1) -> Codes:
    """Fair random bits."""
    generator = torch.Generator().manual_seed(seed)
    bits = tuple(torch.rand(batch, num_frames, h, w, dim, generator=generator) < 0.5 for h, w in scales)
    return Codes(bits, ScaleSchedule(scales))


def random_text(batch: int, config: ModelConfig, seed: int = 2) -> Tensor:
    """Features [B, L, text_dim], or class ids [B]."""
    generator = torch.Generator().manual_seed(seed)
    if config.num_classes:
        return torch.randint(config.num_classes, (batch,), generator=generator)
    return torch.randn(batch, config.text_length, config.text_dim, generator=generator)
