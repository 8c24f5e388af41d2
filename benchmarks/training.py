"""Networks of the recipes' sizes and training steps on random clips, for benchmarks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from inference.config import ModelConfig
from parallel.setup import ParallelConfig, ProcessInfo
from parallel.train_step import Microbatch, build_model, build_optimizer, forward_backward, update
from pretrain.bitwise_loss import bitwise_loss
from pretrain.config import PretrainConfig
from tokenizer import settings
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout

CONFIGS = Path(__file__).parents[1] / "pretrain" / "configs"
BITS, CLASSES = 48, 101


def network(recipe: str, schedule: ScaleSchedule, frames: int, text_width: int = 2048) -> ModelConfig:
    """What a recipe's settings and codes of a grid and a length make together.

    Args:
        recipe: a file in pretrain/configs/, without its suffix.
        schedule: the grids.
        frames: latent ones.
        text_width: of text features.
    """
    fields = asdict(settings.load(PretrainConfig, CONFIGS / f"{recipe}.yaml").network)
    by_class = fields.pop("condition") == "class"
    condition: dict[str, Any] = {"num_classes": CLASSES} if by_class else {"text_dim": text_width}
    return ModelConfig(**fields, scales=schedule.scales, num_frames=frames, bits=BITS, **condition)


def clips(config: ModelConfig, number: int, layout: SequenceLayout) -> Microbatch:
    """Random inputs and bits, whole texts."""
    draw = torch.Generator().manual_seed(0)
    condition = torch.randn(number, layout.text_length, config.text_dim, generator=draw)
    if config.num_classes:
        condition = torch.randint(0, config.num_classes, (number,), generator=draw)
    shape = (number, layout.num_frames, layout.schedule.tokens_per_frame, config.bits)
    return Microbatch(
        torch.randn(number, layout.video_tokens, config.bits, generator=draw),
        layout,
        condition,
        torch.full((number,), layout.text_length),
        targets=torch.randint(0, 2, shape, dtype=torch.bool, generator=draw),
    )


class Training:
    """A network on megatron-core and its optimizer, going through the same microbatches again and again.

    Args:
        config: the network.
        parallel, info: its layout.
        microbatches: of a step.
    """

    def __init__(
        self, config: ModelConfig, parallel: ParallelConfig, info: ProcessInfo, microbatches: Sequence[Microbatch]
    ):
        self.chunks = build_model(config, parallel, info, seed=0)
        self.optimizer = build_optimizer(self.chunks, 1e-4)
        self.microbatches = microbatches

    def step(self) -> None:
        """Forward, backward and update."""
        forward_backward(self.chunks, self.microbatches, lambda logits, of: bitwise_loss(logits, of.targets, of.layout))
        update(self.optimizer, 1e-4)
