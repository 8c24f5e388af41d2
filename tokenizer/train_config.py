"""The settings of a tokenizer's training; YAML files under `tokenizer/configs/` mirror these classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from tokenizer.clip_shape import check_clip_shape
from tokenizer.data_parallel import Strategy
from tokenizer.discriminator import DiscriminatorConfig
from tokenizer.errors import UserError, check_each
from tokenizer.losses import LossConfig
from tokenizer.precision import Precision
from tokenizer.tokenizer import TokenizerConfig
from tokenizer.wandb_log import WandbConfig


@dataclass(frozen=True)
class BatchSpec:
    """The shape of a batch.

    Args:
        num_frames: 1 (images) or 1+4n.
        size: height and width in pixels, a multiple of 16.
        batch_size: clips, of all processes together.
    """

    num_frames: int
    size: int
    batch_size: int

    def __post_init__(self) -> None:
        check_clip_shape(self.num_frames, self.size, self.size)
        if self.batch_size < 1:
            raise UserError(f"a batch of {self.batch_size} clips is none: choose at least 1.")


@dataclass(frozen=True)
class Phase:
    """A part of the training that goes through its batch shapes in turn.

    Args:
        batches: the shapes.
        steps: optimizer steps.
        epochs: in place of steps: how often every clip is seen, on average.
    """

    batches: tuple[BatchSpec, ...]
    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None) or (self.steps or self.epochs or 0) <= 0 or not self.batches:
            raise UserError(
                f"a phase has {self.steps} steps, {self.epochs} epochs and {len(self.batches)} batch shapes: give steps or epochs, "
                "above 0, and at least one shape."
            )

    def resolved(self, clips: int) -> Phase:
        """The same phase in steps, for a data set of so many clips."""
        if self.epochs is None:
            return self
        mean = sum(spec.batch_size for spec in self.batches) / len(self.batches)
        return replace(self, steps=max(1, math.ceil(self.epochs * clips / mean)), epochs=None)


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """A tokenizer's training.

    Args:
        tokenizer: what is trained.
        start_from: a folder with a tokenizer whose weights are the beginning (`videoar tokenizer inflate`, or an earlier training);
            null: random weights.
        loss: weights of the terms.
        discriminator: its sizes, where loss.gan is above 0.
        phases: short clips first, then longer ones.
        lr: peak learning rate of AdamW; it warms up linearly and falls to zero along a cosine.
        discriminator_lr: of the discriminator; null: the same.
        betas: of AdamW.
        warmup_steps: of the learning rate.
        weight_decay: on convolution kernels.
        grad_clip: largest gradient norm, for tokenizer and discriminator each.
        ema_decay: of the running mean of the weights that is validated and saved; 0: the weights themselves are.
        continuous_share: during this first share of the steps, every other clip bypasses the quantiser.
        precision: of the convolutions: "bfloat16", "float32", or "auto" (bfloat16 where the processor computes in it).
        recompute: residual blocks are computed again in the backward pass, which saves memory.
        compile: encoder and decoder run through torch.compile.
        strategy: of several processes: "ddp", or "fsdp2", which shards the tokenizer.
        decoder: of the clips: "pyav", "dali", or "auto" (DALI where there is a GPU and DALI is installed).
        seed: of weights, batches and the split into training and validation clips.
        validation_share: of the clips, taken out of the training by the seed, where no validation shards are given.
        validation_clips: the most that a validation decodes.
        validate_every: steps between two validations; 0: none.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two lines of metrics.jsonl.
        wandb: see its class.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    start_from: str | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    phases: tuple[Phase, ...] = (Phase((BatchSpec(17, 128, 8),), steps=1000),)
    lr: float = 1e-4
    discriminator_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.0
    continuous_share: float = 0.0
    precision: Precision = "auto"
    recompute: bool = False
    compile: bool = False
    strategy: Strategy = "ddp"
    decoder: Literal["auto", "pyav", "dali"] = "auto"
    seed: int = 0
    validation_share: float = 0.0
    validation_clips: int = 64
    validate_every: int = 0
    checkpoint_every: int = 200
    log_every: int = 10
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(project="videoar-tokenizer"))

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError("a tokenizer's training needs at least one phase: list them under `phases`.")
        shares = ("ema_decay", "continuous_share", "validation_share")
        check_each(self, shares, lambda value: 0 <= value < 1, "be from 0 to below 1")
        check_each(self, ("lr", "grad_clip"), lambda value: value > 0, "be above 0")
        check_each(self, ("discriminator_lr",), lambda value: value is None or value > 0, "be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {self.betas}: choose numbers from 0 to below 1.")
        smallest = min(spec.size for phase in self.phases for spec in phase.batches)
        if self.loss.gan and smallest < self.discriminator.least_size:
            raise UserError(
                f"a discriminator of {self.discriminator.levels} levels needs frames of {self.discriminator.least_size} pixels, "
                f"a batch has {smallest}: lower discriminator.levels or enlarge the batch's size."
            )
        counts = ("checkpoint_every", "log_every", "validation_clips")
        check_each(self, counts, lambda value: value >= 1, "be at least 1")

    def resolved(self, clips: int) -> TokenizerTrainConfig:
        """The same training with all phases in steps, for a data set of so many clips."""
        return replace(self, phases=tuple(phase.resolved(clips) for phase in self.phases))

    @property
    def steps(self) -> int:
        """Of all phases, once they are `resolved`."""
        return sum(phase.steps or 0 for phase in self.phases)

    @property
    def largest(self) -> BatchSpec:
        """The most frames and the largest size of all batches."""
        specs = [spec for phase in self.phases for spec in phase.batches]
        return BatchSpec(max(spec.num_frames for spec in specs), max(spec.size for spec in specs), 1)

    def batch_spec(self, step: int) -> BatchSpec:
        """The shape of the batch of one step."""
        for phase in self.phases:
            steps = phase.steps or 0
            if step < steps:
                return phase.batches[step % len(phase.batches)]
            step -= steps
        raise IndexError(step)
