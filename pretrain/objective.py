"""The objective: what a batch of codes becomes for the model, and the bit-wise loss on its logits (DESIGN section 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.code_stream import CodeBatch
from pretrain.error_correction import ErrorCorrectionConfig, corrupt, draw_flips, flip_ratios
from pretrain.frame_mask import draw_frame_mask
from pretrain.randomness import Purpose, Randomness
from tokenizer.errors import UserError
from tokenizer.resample import DownMode
from tokenizer.sequence import SequenceLayout, video_inputs

TokenWeight = Literal["uniform", "scale"]


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


def token_weights(layout: SequenceLayout, kind: TokenWeight) -> Tensor:
    """The weight of each target token of a clip, float32 [T * N], with sum 1."""
    schedule = layout.schedule
    area = schedule.grid[0] * schedule.grid[1]
    weights = [1.0 if kind == "uniform" else (area / tokens) ** 0.5 for tokens in schedule.split()]
    frame = torch.tensor(weights).repeat_interleave(torch.tensor(schedule.split()))  # [N]
    every = frame.repeat(layout.num_frames)
    return every / every.sum()


def bitwise_loss(
    logits: Tensor, targets: Tensor, layout: SequenceLayout, token_weight: TokenWeight = "uniform"
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Bit-wise binary cross-entropy: mean over bits, weighted mean over a clip's tokens, sum over clips.

    Args:
        logits: float32 [B, V, d]; the rows of context blocks are ignored.
        targets: bool [B, T, N, d].
        layout: the sequence.
        token_weight: see `ObjectiveConfig`.

    Returns:
        The sum of the clips' losses (to be divided by the clips of the global batch), the number of clips, and sums over clips
        to report: "bit_accuracy" (share of right bits), the same by scale and by frame, and the unweighted loss by scale.
    """
    frames, schedule = layout.num_frames, layout.schedule
    if layout.context_block:
        logits = logits[:, layout.target.to(logits.device)]
    wanted = targets.flatten(1, 2)  # [B, T, N, d] -> [B, T * N, d]
    entropy = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none").mean(
        -1
    )  # [B, T * N]
    loss = (entropy * token_weights(layout, token_weight).to(entropy)).sum()
    with torch.no_grad():
        right = ((logits > 0) == wanted).float().mean(-1).sum(0).view(frames, -1)  # [T, N], summed over clips
        by_token = entropy.detach().sum(0).view(frames, -1)
        report = {"bit_accuracy": right.mean()}
        sizes = schedule.split()
        for scale, (part, part_loss) in enumerate(zip(right.split(sizes, dim=1), by_token.split(sizes, dim=1))):
            report[f"bit_accuracy/scale_{scale}"] = part.mean()
            report[f"loss/scale_{scale}"] = part_loss.mean()
        for frame in range(frames):
            report[f"bit_accuracy/frame_{frame}"] = right[frame].mean()
    return loss, torch.tensor(len(logits), device=logits.device), report
