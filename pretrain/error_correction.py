"""Cross-Frame Error Correction: training on flipped codes with re-quantised targets (DESIGN section 2; Eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.resample import DownMode, down, to_values, up
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout, video_inputs

MAX_RATIO = 0.5
"""Half of the bits flipped leaves no information; more would only invert it."""
TIE = 1e-5
"""Residuals of sums of codes are often exactly zero; rounding must not decide them differently on another device."""


@dataclass(frozen=True)
class ErrorCorrectionConfig:
    """How many bits are flipped while training.

    Args:
        p_min, p_max: ends of the interval that the flip ratio of frame 0 is drawn from; p_max = 0 turns flipping off.
        delta: how far both ends move with each frame.
        inherit: the first scale of a frame t > 0 starts from the ratio of the last scale of the frame before (error inheritance); off, the
            ablation's baseline: it is drawn as at the other scales.

    Raises:
        UserError: ends outside [0, 0.5] or in the wrong order, or a negative delta.
    """

    p_min: float = 0.0
    p_max: float = 0.25
    delta: float = 0.01
    inherit: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.p_min <= max(self.p_max, 0) or not 0 <= self.p_max <= MAX_RATIO or self.delta < 0:
            raise UserError(
                f"error_correction has p_min {self.p_min}, p_max {self.p_max}, delta {self.delta}: "
                f"choose 0 <= p_min <= p_max <= {MAX_RATIO} and delta >= 0."
            )

    @property
    def enabled(self) -> bool:
        """Whether any bit is ever flipped."""
        return self.p_max > 0


def flip_ratios(config: ErrorCorrectionConfig, draws: Tensor) -> Tensor:
    """The flip ratio of each frame and scale (Eq. 8).

    p ~ U(p_min + delta t, p_max + delta t); with `inherit` the lower end at the first scale of a frame t > 0 is the ratio of the
    last scale of the frame before. The ends are clamped to [0, 0.5], then the lower one to the upper one.

    Args:
        config: the interval.
        draws: uniform in [0, 1), [B, T, K].

    Returns:
        float32 [B, T, K].
    """
    ratios = torch.zeros_like(draws)
    if not config.enabled:
        return ratios
    for frame in range(draws.shape[1]):
        upper = min(max(config.p_max + config.delta * frame, 0.0), MAX_RATIO)
        lower = min(max(config.p_min + config.delta * frame, 0.0), upper)
        ratios[:, frame] = lower + (upper - lower) * draws[:, frame]
        if frame and config.inherit:
            inherited = ratios[:, frame - 1, -1].clamp(0.0, upper)
            ratios[:, frame, 0] = inherited + (upper - inherited) * draws[:, frame, 0]
    return ratios


def draw_flips(ratios: Tensor, draws: Tensor, schedule: ScaleSchedule) -> Tensor:
    """Bernoulli(p) for each bit: ratios [B, T, K], uniform draws [B, T, N, d] -> bool [B, T, N, d]."""
    tokens = torch.tensor(schedule.split(), device=ratios.device)
    return draws < ratios.repeat_interleave(tokens, dim=2)[..., None]  # [B, T, K] -> [B, T, N, 1]


def corrupt(
    tokens: Tensor,
    flips: Tensor,
    layout: SequenceLayout,
    latents: Tensor | None = None,
    residual_down: DownMode = "area",
    input_down: DownMode = "bilinear",
) -> tuple[Tensor, Tensor]:
    """Inputs built from flipped codes, and the bits that would correct them.

    Scale by scale: the target is the bit of the residual that remains after the flipped codes of the earlier scales; the
    flipped code is that bit XOR its flip. In terms of the stored codes q, the residual is

        down(F - sum up(q_flipped)) = down(F - sum up(q)) - down(sum up(q_flipped - q)).

    Where the last term is exactly zero nothing upstream was flipped, and the target is the stored bit: exact even where F is not
    stored. A residual of zero also leaves the stored bit. Resampling keeps channels apart, so a flip reaches its own channel
    only. Frames do not share residuals.

    Args:
        tokens: the stored bits, bool [B, T, N, d].
        flips: which bits are flipped, bool [B, T, N, d].
        layout: the sequence; its schedule is that of the tokens.
        latents: F, [B, T, d, H, W]; None: the sum of the stored codes takes its place.
        residual_down: how the tokenizer brings residuals to a scale's grid.
        input_down: how the transformer's inputs come to a scale's grid.

    Returns:
        inputs float32 [B, V, d] and targets bool [B, T, N, d]; without flips they are `video_inputs` of the stored codes and
        the stored bits, bit for bit.
    """
    schedule = layout.schedule
    stored = Codes.from_tokens(tokens, schedule)
    flip_bits = Codes.from_tokens(flips, schedule).bits
    values = [to_values(bits).movedim(-1, 2) for bits in stored.bits]  # [B, T, d, H_k, W_k]
    raised = [up(value, schedule.grid) for value in values]  # [B, T, d, H, W]
    residual = (sum(raised[1:], raised[0]) if latents is None else latents.float()).clone()
    deviation = torch.zeros_like(residual)  # sum of up(q_flipped - q)
    targets, flipped = [], []
    for scale, grid in enumerate(schedule.scales):
        bits = stored.bits[scale]  # [B, T, H_k, W_k, d]
        if scale:
            # one call for both: [B, T, 2d, H, W] -> [B, T, 2d, H_k, W_k]
            both = down(torch.cat([residual, deviation], dim=2), grid, residual_down).movedim(2, -1)
            remaining, shift = both.chunk(2, dim=-1)  # [B, T, H_k, W_k, d]
            after = remaining - shift
            bits = torch.where((shift == 0) | (after.abs() < TIE), bits, after > 0)
        targets.append(bits)
        flipped.append(bits ^ flip_bits[scale])
        residual -= raised[scale]
        if scale + 1 < schedule.num_scales:
            deviation += up(to_values(flipped[scale]).movedim(-1, 2) - values[scale], schedule.grid)
    inputs = video_inputs(Codes(tuple(flipped), schedule), layout, input_down)
    return inputs, Codes(tuple(targets), schedule).tokens()
