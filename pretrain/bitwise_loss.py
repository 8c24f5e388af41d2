"""The bit-wise loss (DESIGN section 2): binary cross-entropy on each bit's logit, in pieces of a frame and
some clips, so that beside a batch's logits no tensor of their size exists but their gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.sequence import SequenceLayout

TokenWeight = Literal["uniform", "scale"]
CLIP_PIECES = 16
"""Each frame's clips are gone through in so many parts; an image batch has one frame only."""
LEAST_PIECE = 2**16
"""Logits of a part: smaller ones cost more time than they save memory."""


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
        token_weight: "uniform" (1) or "scale" (sqrt(HW / H_k W_k)), normalised per clip.

    Returns:
        The sum of the clips' losses (to be divided by the clips of the global batch), the number of clips, and sums over clips
        to report: "bit_accuracy" (share of right bits), the same by scale and by frame, and the unweighted loss by scale
        and by frame.
    """
    frames, sizes = layout.num_frames, layout.schedule.split()
    weights = token_weights(layout, token_weight).to(logits.device, logits.dtype).view(frames, -1)
    by_frame = logits.unflatten(1, (frames, -1))  # [B, V, d] -> [B, T, N (+ context), d]
    loss, by_token, right = _BitwiseLoss.apply(by_frame, targets, weights)
    report = {"bit_accuracy": right.mean()}
    for scale, (part, part_loss) in enumerate(zip(right.split(sizes, dim=1), by_token.split(sizes, dim=1))):
        report[f"bit_accuracy/scale_{scale}"] = part.mean()
        report[f"loss/scale_{scale}"] = part_loss.mean()
    for frame in range(frames):
        report[f"bit_accuracy/frame_{frame}"] = right[frame].mean()
        report[f"loss/frame_{frame}"] = by_token[frame].mean()
    return loss, torch.tensor(len(logits), device=logits.device), report


class _BitwiseLoss(torch.autograd.Function):
    """Gives the loss, and the cross-entropy and the share of right bits by token, each summed over clips, [T, N]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logits, targets, weights)
        by_token, right = torch.zeros_like(weights), torch.zeros_like(weights)
        for clips, frame in _pieces(targets):
            piece, wanted = logits[clips, frame, : targets.shape[2]], targets[clips, frame]  # [b, N, d]
            entropy = F.binary_cross_entropy_with_logits(piece, wanted.to(piece.dtype), reduction="none")
            by_token[frame] += entropy.mean(-1).sum(0)
            right[frame] += ((piece > 0) == wanted).to(piece.dtype).mean(-1).sum(0)
        ctx.mark_non_differentiable(by_token, right)
        return (by_token * weights).sum(), by_token, right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, targets, weights = ctx.saved_tensors
        tokens, bits = targets.shape[2:]
        # rows of context blocks get none
        grad_logits = torch.empty_like(logits) if tokens == logits.shape[2] else torch.zeros_like(logits)
        scale = (weights * (grad / bits))[:, :, None]  # [T, N, 1]
        for clips, frame in _pieces(targets):
            own = grad_logits[clips, frame, :tokens]
            torch.sigmoid(logits[clips, frame, :tokens], out=own)
            own.sub_(targets[clips, frame].to(own.dtype)).mul_(scale[frame])
        return grad_logits, None, None


def _pieces(targets: Tensor) -> Iterator[tuple[slice, int]]:
    """(clips, frame) of each piece of targets [B, T, N, d]."""
    size = max(-(-targets.shape[0] // CLIP_PIECES), LEAST_PIECE // (targets.shape[2] * targets.shape[3]), 1)
    for frame in range(targets.shape[1]):
        for start in range(0, targets.shape[0], size):
            yield slice(start, start + size), frame
