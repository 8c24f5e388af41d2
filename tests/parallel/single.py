"""Random clips and a simple loss for tests on one process."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.config import ModelConfig
from parallel.train_step import Microbatch


def random_clips(config: ModelConfig, seed: int, number: int = 2, multiple: int = 1) -> Microbatch:
    """Clips whose targets are the signs of their inputs; texts of 1, 2, ... tokens."""
    draw = torch.Generator().manual_seed(seed)
    layout = config.layout(multiple=multiple)
    inputs = torch.randn(number, layout.video_tokens, config.bits, generator=draw)
    text = torch.randn(number, config.max_text_length, config.text_dim, generator=draw)
    return Microbatch(inputs, layout, text, torch.arange(1, number + 1), targets=(inputs > 0).float())


def loss(logits: Tensor, of: Microbatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Squared error, summed over clips."""
    each = (logits - of.targets).square().mean((1, 2))
    return each.sum(), torch.tensor(len(each), device=logits.device), {}
