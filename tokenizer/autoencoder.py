"""The causal 3-D autoencoder: video [B, 3, 1+4n, 16H, 16W] <-> latent [B, d, 1+n, H, W] (DESIGN section 2, Tokenizer).

Module names follow the published Infinity image tokenizers, whose weights can start it by inflation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer.causal_conv import Carry, CausalConv3d, Downsample, FrameNorm, ResidualBlock, Upsample
from tokenizer.clip_shape import SPATIAL_COMPRESSION
from tokenizer.errors import UserError


@dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoder's sizes; the defaults are the paper's.

    Args:
        dim: d, the latent's width and the bits a token.
        base_width: width of the first level.
        multipliers: width of each level over the base width; each level after the first halves height and width, and the last two halve
            time as well.
        blocks: residual blocks a level in the encoder; the decoder has one more.
        patch: side of the pixel patches that enter as channels (1: plain pixels). patch * 2^(levels - 1) must be 16.
        temporal_kernel: k_t of the convolutions, at least the temporal stride 2.
    """

    dim: int = 48
    base_width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    blocks: int = 2
    patch: int = 1
    temporal_kernel: int = 3

    def __post_init__(self) -> None:
        compression = self.patch * 2 ** (len(self.multipliers) - 1)
        if compression != SPATIAL_COMPRESSION or len(self.multipliers) < 3:
            raise UserError(
                f"patch {self.patch} and {len(self.multipliers)} levels compress space {compression}-fold: "
                "choose patch 1 with 5 levels, 2 with 4, or 4 with 3 (16-fold)."
            )
        if self.temporal_kernel < 2:
            raise UserError(
                f"temporal_kernel {self.temporal_kernel} is below the temporal stride 2: choose 3, for example."
            )
        for width in self.widths:
            if width < 1 or width % min(32, width):
                raise UserError(
                    f"a level of width {width} (base_width {self.base_width} times a multiplier) does not divide into 32 groups: choose "
                    "base_width as a multiple of 32."
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each level."""
        return tuple(self.base_width * multiplier for multiplier in self.multipliers)

    def halves_time(self, level: int) -> bool:
        """Does the step between `level` and `level + 1` halve time?"""
        return level >= len(self.multipliers) - 3


def _through(block: nn.Module, features: Tensor, carry: Carry | None, recompute: bool) -> Tensor:
    if recompute and carry is None and torch.is_grad_enabled():
        return checkpoint(block, features, use_reentrant=False)  # type: ignore[return-value]
    return block(features, carry)


class _Level(nn.Module):
    is_shard_unit = True  # of FSDP2
    recompute = False

    def __init__(self, widths: list[int], temporal_kernel: int):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(a, b, temporal_kernel) for a, b in zip(widths, widths[1:]))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, features: Tensor, carry: Carry | None = None) -> Tensor:
        for block in self.block:
            features = _through(block, features, carry, self.recompute)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                features = resample(features, carry)
        return features


class _Middle(nn.Module):
    is_shard_unit = True
    recompute = False

    def __init__(self, width: int, temporal_kernel: int):
        super().__init__()
        self.block_1 = ResidualBlock(width, width, temporal_kernel)
        self.block_2 = ResidualBlock(width, width, temporal_kernel)

    def forward(self, features: Tensor, carry: Carry | None = None) -> Tensor:
        for block in (self.block_1, self.block_2):
            features = _through(block, features, carry, self.recompute)
        return features


class Encoder(nn.Module):
    """Video [B, 3, 1+4n, 16H, 16W] in [-1, 1] -> latent [B, d, 1+n, H, W]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, kernel = config.widths, config.temporal_kernel
        self.patch = config.patch
        self.conv_in = CausalConv3d(3 * config.patch**2, widths[0], temporal_kernel=kernel)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            level = _Level([widths[max(index - 1, 0)]] + [width] * config.blocks, kernel)
            if index < len(widths) - 1:
                level.downsample = Downsample(width, config.halves_time(index), kernel)
            self.down.append(level)
        self.mid = _Middle(widths[-1], kernel)
        self.norm_out = FrameNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.dim, temporal_kernel=kernel)

    def forward(self, video: Tensor, carry: Carry | None = None) -> Tensor:
        batch, _, frames = video.shape[:3]
        # [B, 3, T, H, W] -> [B * T, 3 p^2, H / p, W / p] -> [B, 3 p^2, T, H / p, W / p]
        pixels = (
            F.pixel_unshuffle(video.transpose(1, 2).flatten(0, 1), self.patch)
            .unflatten(0, (batch, frames))
            .transpose(1, 2)
        )
        features = self.conv_in(pixels.contiguous(memory_format=torch.channels_last_3d), carry)
        for level in self.down:
            features = level(features, carry)
        return self.conv_out.after_silu(self.norm_out(self.mid(features, carry)), carry)


class Decoder(nn.Module):
    """Latent [B, d, 1+n, H, W] -> video [B, 3, 1+4n, 16H, 16W], not clamped. `up.0` is the finest level."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, kernel = config.widths, config.temporal_kernel
        self.patch = config.patch
        self.conv_in = CausalConv3d(config.dim, widths[-1], temporal_kernel=kernel)
        self.mid = _Middle(widths[-1], kernel)
        self.up = nn.ModuleList()
        for index, width in enumerate(widths):
            level = _Level([widths[min(index + 1, len(widths) - 1)]] + [width] * (config.blocks + 1), kernel)
            if index > 0:
                level.upsample = Upsample(width, config.halves_time(index - 1), kernel)
            self.up.append(level)
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = CausalConv3d(widths[0], 3 * config.patch**2, temporal_kernel=kernel)

    def forward(self, latent: Tensor, carry: Carry | None = None, with_features: bool = False) -> Any:
        """[B, d, 1+n, H, W] -> [B, 3, 1+4n, 16H, 16W], and with `with_features` also what went into the last convolution."""
        features = self.conv_in(latent.contiguous(memory_format=torch.channels_last_3d), carry)
        features = self.mid(features, carry)
        for level in reversed(self.up):
            features = level(features, carry)
        features = F.silu(self.norm_out(features))
        video = self.to_pixels(self.conv_out(features, carry))
        return (video, features) if with_features else video

    def to_pixels(self, patches: Tensor) -> Tensor:
        """[B, 3 p^2, T, H, W] -> [B, 3, T, p H, p W]."""
        batch, _, frames = patches.shape[:3]
        # [B, 3 p^2, T, H, W] -> [B * T, 3, p H, p W] -> [B, 3, T, p H, p W]
        return (
            F.pixel_shuffle(patches.transpose(1, 2).flatten(0, 1), self.patch)
            .unflatten(0, (batch, frames))
            .transpose(1, 2)
        )


def recompute_blocks(module: nn.Module, on: bool) -> None:
    """Whether the residual blocks inside a module are computed again in the backward pass instead of being kept."""
    for child in module.modules():
        if isinstance(child, _Level | _Middle):
            child.recompute = on
