"""The multi-scale binary spherical quantiser (DESIGN section 2; after Eq. 2 and 3 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.resample import DownMode, down, to_values, up
from tokenizer.scales import ScaleSchedule


@dataclass(frozen=True)
class QuantizerOutput:
    """What the quantiser returns.

    Args:
        quantized: sum_k up(q_k), [B, d, T, H, W], with a straight-through gradient to the latent.
        codes: the bits of all scales.
        losses: scalars "commitment", "entropy_sample" (mean over tokens of sum_j h(p_j)) and "entropy_batch" (sum_j h(mean p_j)), means
            over scales, unweighted; the entropy loss is entropy_sample - gamma entropy_batch.
        usage: [K, d], the share of ones of each bit on each scale.
    """

    quantized: Tensor
    codes: Codes
    losses: dict[str, Tensor]
    usage: Tensor

    @property
    def bits(self) -> tuple[Tensor, ...]:
        """One bool tensor [B, T, H_k, W_k, d] a scale."""
        return self.codes.bits


class MultiScaleQuantizer(nn.Module):
    """Residual quantisation over scales, frame by frame: r_k = down(F - sum_{i<k} sg[up(q_i)]), b_k = [u(r_k) > 0].

    Args:
        dim: d, bits a token.
        residual_down: how residuals come to a scale's grid: "area" (as the Infinity tokenizers) or "bilinear".
        entropy_beta: sharpness of the soft bits p = sigmoid(4 beta u / sqrt(d)); None: d / 4.
    """

    def __init__(
        self,
        dim: int = 48,
        residual_down: DownMode = "area",
        entropy_beta: float | None = None,
    ):
        super().__init__()
        self.dim = dim
        self.residual_down: DownMode = residual_down
        self.entropy_beta = dim / 4 if entropy_beta is None else entropy_beta

    def forward(self, latent: Tensor, schedule: ScaleSchedule) -> QuantizerOutput:
        """Quantises a latent.

        Args:
            latent: [B, d, T, H, W].
            schedule: its last grid is (H, W).

        Raises:
            UserError: the latent's width or grid does not fit.
        """
        frames = self._frames(latent, schedule)  # [B, T, d, H, W]
        total = torch.zeros_like(frames)
        straight_through = torch.zeros_like(frames)
        bits, usage = [], []
        sample, batch = latent.new_zeros(()), latent.new_zeros(())
        for grid in schedule.scales:
            residual = down(frames - total.detach(), grid, self.residual_down)  # [B, T, d, H_k, W_k]
            unit = F.normalize(residual, dim=2)
            scale_bits = (unit > 0).movedim(2, -1)  # [B, T, H_k, W_k, d]
            value = to_values(scale_bits).to(latent.dtype).movedim(-1, 2)  # [B, T, d, H_k, W_k]
            total = total + up(value, schedule.grid)
            straight_through = straight_through + up(unit + (value - unit).detach(), schedule.grid)
            bits.append(scale_bits)
            usage.append(scale_bits.float().mean(dim=(0, 1, 2, 3)))
            entropies = self._entropies(unit.movedim(2, -1).flatten(0, -2))
            sample, batch = sample + entropies[0], batch + entropies[1]
        # the forward value is the plain sum (to rounding), the gradient that of the normalised residuals
        quantized = straight_through + (total - straight_through).detach()
        losses = {
            "commitment": (frames - total.detach()).square().sum(dim=2).mean(),
            "entropy_sample": sample / schedule.num_scales,
            "entropy_batch": batch / schedule.num_scales,
        }
        return QuantizerOutput(quantized.movedim(1, 2), Codes(tuple(bits), schedule), losses, torch.stack(usage))

    @torch.no_grad()
    def quantize(self, latent: Tensor, schedule: ScaleSchedule) -> Codes:
        """The bits alone: latent [B, d, T, H, W] -> Codes."""
        frames = self._frames(latent, schedule)
        total = torch.zeros_like(frames)
        bits = []
        for grid in schedule.scales:
            residual = down(frames - total, grid, self.residual_down)
            scale_bits = (residual > 0).movedim(2, -1)  # [B, T, H_k, W_k, d]; normalisation never changes a sign
            total = total + up(to_values(scale_bits).to(latent.dtype).movedim(-1, 2), schedule.grid)
            bits.append(scale_bits)
        return Codes(tuple(bits), schedule)

    def dequantize(self, codes: Codes) -> Tensor:
        """sum_k up(q_k): Codes -> [B, d, T, H, W], float32."""
        return accumulate(codes).movedim(1, 2)

    def _frames(self, latent: Tensor, schedule: ScaleSchedule) -> Tensor:
        if latent.ndim != 5 or latent.shape[1] != self.dim or tuple(latent.shape[-2:]) != schedule.grid:
            raise UserError(
                f"a latent of shape {tuple(latent.shape)} does not fit {self.dim} bits on the grid {schedule.grid}: "
                "give [B, d, T, H, W] and the schedule of that grid."
            )
        return latent.movedim(1, 2)  # [B, d, T, H, W] -> [B, T, d, H, W]

    def _entropies(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """unit [M, d] -> mean_m sum_j h(p_mj) and sum_j h(mean_m p_mj); the inner mean runs over all ranks."""
        probability = torch.sigmoid(4 * self.entropy_beta * unit.float() / self.dim**0.5)
        mean = probability.mean(dim=0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            from torch.distributed.nn.functional import all_reduce

            mean = all_reduce(mean) / dist.get_world_size()
        return _bernoulli_entropy(probability).sum(dim=1).mean(), _bernoulli_entropy(mean).sum()


DEAD_BELOW = 0.01
"""A bit that is one (or zero) more rarely carries less than a twelfth of a bit."""


def are_dead(share: Any) -> Any:
    """Bits that are one in less than 1% or more than 99% of the tokens: shares of ones (tensor or array) -> booleans."""
    return (share < DEAD_BELOW) | (share > 1 - DEAD_BELOW)


def accumulate(codes: Codes) -> Tensor:
    """sum_k up(q_k) of every frame: Codes -> [B, T, d, H, W], float32."""
    total = None
    for scale_bits in codes.bits:
        term = up(to_values(scale_bits).movedim(-1, 2), codes.schedule.grid)  # [B, T, d, H, W]
        total = term if total is None else total + term
    assert total is not None
    return total


def _bernoulli_entropy(probability: Tensor) -> Tensor:
    return -(torch.xlogy(probability, probability) + torch.xlogy(1 - probability, 1 - probability))
