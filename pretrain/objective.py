"""The objective: what a batch of codes becomes for the model (DESIGN section 2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_pipelines.code_stream import CodeBatch
from pretrain.bitwise_loss import TokenWeight
from pretrain.error_correction import ErrorCorrectionConfig, corrupt, draw_flips, flip_ratios
from pretrain.frame_mask import draw_frame_mask
from pretrain.randomness import Purpose, Randomness
from tokenizer.errors import UserError
from tokenizer.resample import DownMode
from tokenizer.sequence import SequenceLayout, video_inputs


@dataclass(frozen=True)
class ObjectiveConfig:
    """What one stage's objective depends on.

    Args:
        randomness: the stage's draws.
        error_correction: flip ratios.
        p_mask: Random Frame Mask's probability that a frame does not see an earlier one.
        condition_dropout: probability that a clip's whole text becomes the null sequence.
        token_weight: "uniform" (1) or "scale" (sqrt(HW / H_k W_k)), normalised per clip.
        class_conditional: the condition is the class, not the text.
        residual_down: how the tokenizer that made the codes brings residuals to a scale's grid.
        input_down: how the model's inputs come to a scale's grid.
    """

    randomness: Randomness
    error_correction: ErrorCorrectionConfig = field(default_factory=ErrorCorrectionConfig)
    p_mask: float = 0.0
    condition_dropout: float = 0.1
    token_weight: TokenWeight = "uniform"
    class_conditional: bool = False
    residual_down: DownMode = "area"
    input_down: DownMode = "bilinear"


@dataclass(frozen=True)
class ModelInputs:
    """A microbatch as the model and the loss take it.

    Args:
        inputs: float32 [B, V, d].
        targets: bool [B, T, N, d].
        text: features float32 [B, L, text_dim], or class ids int64 [B].
        text_lengths: int64 [B].
        frame_mask: bool [B, T, T], or None: all frames visible.
        drop_condition: bool [B], or None: none of them.
    """

    inputs: Tensor
    targets: Tensor
    text: Tensor
    text_lengths: Tensor
    frame_mask: Tensor | None
    drop_condition: Tensor | None


@torch.no_grad()
def prepare(batch: CodeBatch, config: ObjectiveConfig, layout: SequenceLayout, training: bool) -> ModelInputs:
    """Makes a batch ready; without `training` nothing is flipped, masked or dropped.

    Args:
        batch: clips of the layout's shape; the result lives on its device.
        config: the stage's objective.
        layout: the sequence.
        training: whether to draw flips, frame masks and dropped conditions.

    Raises:
        UserError: a class-conditional model meets a clip without a class.
    """
    device, draws = batch.tokens.device, config.randomness
    clips = (batch.sample_index.cpu(), batch.epoch.cpu())
    if training and config.error_correction.enabled:
        steps = (layout.num_frames, layout.schedule.num_scales)
        ratios = flip_ratios(config.error_correction, draws.uniform(Purpose.FLIP_RATIO, *clips, steps)).to(device)
        bit_draws = draws.uniform(Purpose.FLIP, *clips, tuple(batch.tokens.shape[1:])).to(device)
        flips = draw_flips(ratios, bit_draws, layout.schedule)
        inputs, targets = corrupt(batch.tokens, flips, layout, batch.latents, config.residual_down, config.input_down)
    else:
        inputs, targets = video_inputs(batch.codes, layout, config.input_down), batch.tokens
    frame_mask = drop_condition = None
    if training and config.p_mask > 0:
        frame_mask = draw_frame_mask(draws, *clips, layout.num_frames, config.p_mask).to(device)
    if training and config.condition_dropout > 0:
        drop_condition = (draws.uniform(Purpose.CONDITION, *clips, ()) < config.condition_dropout).to(device)
    if not config.class_conditional:
        return ModelInputs(inputs, targets, batch.text, batch.text_lengths, frame_mask, drop_condition)
    if int(batch.class_ids.min()) < 0:
        raise UserError(
            "a clip has no class, but the model's condition is the class: set `condition` to text or encode classes."
        )
    one = torch.ones_like(batch.text_lengths)
    return ModelInputs(inputs, targets, batch.class_ids, one, frame_mask, drop_condition)
