"""Causal building blocks of the autoencoder: nothing here lets a frame see a later one (DESIGN section 2, Tokenizer).

All tensors are [B, C, T, H, W]. Before the first frame time is padded with zeros, and kernels start as inflated image kernels: zero
but for their temporally last slice. So training on images moves that slice alone, and clips start from frames seen one by one;
copies of the first frame instead would teach all slices the same, which blurs what moves over time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Carry = dict[nn.Module, Tensor]
"""What causal layers keep of the frames that a stream has brought so far; an empty one starts a stream. Without one a call is a whole
clip."""


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution whose output frame t depends on input frames up to t (up to stride * t when it strides over time).

    Args:
        in_channels, out_channels: widths.
        kernel: spatial kernel size k; `same` padding unless it strides over space.
        temporal_kernel: k_t.
        stride: (time, space) strides; a spatial stride of 2 pads one pixel right and below, as the Infinity tokenizers do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        temporal_kernel: int = 3,
        stride: tuple[int, int] = (1, 1),
    ):
        side = kernel // 2 if stride[1] == 1 else 0
        super().__init__(
            in_channels,
            out_channels,
            (temporal_kernel, kernel, kernel),
            stride=(stride[0], stride[1], stride[1]),
            padding=(0, side, side),
        )

    def reset_parameters(self) -> None:
        """An image convolution's own start in the last slice, zeros in those before it (3-D inflation of a fresh kernel)."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)
        last = torch.empty_like(self.weight[:, :, -1])
        nn.init.kaiming_uniform_(last, a=5**0.5)
        with torch.no_grad():
            self.weight[:, :, -1] = last

    def forward(self, input: Tensor, carry: Carry | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C', 1 + (T - 1) / stride_t, H / stride, W / stride].

        In a stream the first chunk has 1 + stride_t * n frames and later ones stride_t * n, which become n.
        """
        if self.kernel_size == (1, 1, 1):
            # [B, C, T, H, W] -> [B, T, H, W, C] -> [B, C', T, H, W]: a matrix product, where libraries have no good 1x1x1 kernel
            return F.linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        beside = 1 if self.stride[1] > 1 else 0
        before = self.kernel_size[0] - 1
        if carry is not None and before:
            past = carry[self] if self in carry else input.new_zeros(*input.shape[:2], before, *input.shape[3:])
            input = torch.cat([past, input], dim=2)
            # the next output starts a stride after this chunk's last one
            carry[self] = input[:, :, input.shape[2] - (self.kernel_size[0] - self.stride[0]) :].clone()
            if beside:
                input = F.pad(input, (0, beside, 0, beside))
            return super().forward(input)
        if input.shape[2] == 1:
            # an image: the slices before the last one meet zeros only, so a third of the work is enough
            image = F.pad(input, (0, beside, 0, beside)) if beside else input
            return F.conv3d(image, self.weight[:, :, -1:], self.bias, (1, *self.stride[1:]), self.padding)  # type: ignore[arg-type]
        if beside or before:
            input = F.pad(input, (0, beside, 0, beside, before, 0))
        return super().forward(input)

    def after_silu(self, input: Tensor, carry: Carry | None = None) -> Tensor:
        """`self(silu(input))`, but that silu writes right behind the padding: a whole clip is not copied to pad it."""
        if carry is None and input.shape[2] > 1 and self.stride == (1, 1, 1) and not torch.compiler.is_compiling():
            return super().forward(_SiluBehindZeros.apply(input, self.kernel_size[0] - 1))
        return self(F.silu(input), carry)


class _SiluBehindZeros(torch.autograd.Function):
    """silu of [B, C, T, H, W] behind `before` frames of zeros: [B, C, before + T, H, W]."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, before: int) -> Tensor:
        ctx.save_for_backward(input)
        ctx.before = before
        shape = (*input.shape[:2], before + input.shape[2], *input.shape[3:])
        padded = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last_3d)
        padded[:, :, :before].zero_()
        torch.ops.aten.silu.out(input, out=padded[:, :, before:])
        return padded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0][:, :, ctx.before :], input), None


class FrameNorm(nn.GroupNorm):
    """GroupNorm with statistics of each frame by itself: temporal statistics would let a frame see later ones."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__(min(groups, channels), channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape."""
        frames = input.transpose(1, 2).flatten(0, 1)  # [B, C, T, H, W] -> [B * T, C, H, W]
        return super().forward(frames).unflatten(0, (input.shape[0], input.shape[2])).transpose(1, 2)


class ResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, temporal_kernel: int = 3):
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, temporal_kernel=temporal_kernel)
        self.norm2 = FrameNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, temporal_kernel=temporal_kernel)
        self.nin_shortcut = (
            CausalConv3d(in_channels, out_channels, kernel=1, temporal_kernel=1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, features: Tensor, carry: Carry | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]."""
        hidden = self.conv1.after_silu(self.norm1(features), carry)
        hidden = self.conv2.after_silu(self.norm2(hidden), carry)
        hidden += self.nin_shortcut(features)  # in place: no backward pass needs the convolution's output
        return hidden


class Downsample(nn.Module):
    """Halves height and width and, by option, time: T = 1 + 2m -> 1 + m."""

    def __init__(self, channels: int, temporal: bool, temporal_kernel: int = 3):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, temporal_kernel=temporal_kernel, stride=(2 if temporal else 1, 2))

    def forward(self, features: Tensor, carry: Carry | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T or 1 + (T - 1) / 2, H / 2, W / 2]."""
        return self.conv(features, carry)


class Upsample(nn.Module):
    """Doubles height and width and, by option, time (1 + m -> 1 + 2m: every frame but the first twice), then a convolution."""

    def __init__(self, channels: int, temporal: bool, temporal_kernel: int = 3):
        super().__init__()
        self.temporal = temporal
        self.conv = CausalConv3d(channels, channels, temporal_kernel=temporal_kernel)

    def forward(self, features: Tensor, carry: Carry | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T or 1 + 2 (T - 1), 2 H, 2 W]; a stream's later chunks hold no first frame: T -> 2 T."""
        if self.temporal:
            alone = 0 if carry is not None and self in carry else 1
            rest = features[:, :, alone:].repeat_interleave(2, dim=2)
            features = torch.cat([features[:, :, :alone], rest], dim=2)
            if carry is not None:
                carry[self] = features.new_empty(0)  # the first frame has been
        frames = features.transpose(1, 2).flatten(0, 1)  # [B, C, T, H, W] -> [B * T, C, H, W]
        frames = F.interpolate(frames, scale_factor=2.0, mode="nearest")
        return self.conv(frames.unflatten(0, (features.shape[0], features.shape[2])).transpose(1, 2), carry)
