"""The 3-D patch discriminator of the tokenizer's objective, randomly initialised; it takes single frames, too."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.errors import UserError


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator's sizes.

    Args:
        base_width: width of the first level; each level doubles it, up to eight times.
        levels: convolutions that halve height and width; all but the first halve time as well.
    """

    base_width: int = 64
    levels: int = 3

    def __post_init__(self) -> None:
        if self.base_width < 1 or self.levels < 1:
            raise UserError(
                f"a discriminator of {self.levels} levels and base width {self.base_width} is none: choose at least 1."
            )
        for width in self.widths[1:]:
            if width % min(32, width):
                raise UserError(
                    f"a discriminator of base_width {self.base_width} has a level of {width} channels, which do not divide "
                    "into 32 groups: choose a multiple of 16."
                )

    @property
    def widths(self) -> list[int]:
        """Width of each level, the first convolution's included."""
        return [self.base_width * min(2**level, 8) for level in range(self.levels + 1)]

    @property
    def least_size(self) -> int:
        """The smallest frames that leave a patch to judge."""
        return 3 * 2**self.levels


class _Conv(nn.Conv3d):
    """A 3-D convolution that looks both ways in time: nothing that judges needs to be causal."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int]):
        super().__init__(in_channels, out_channels, (3, 4, 4), (stride[0], stride[1], stride[1]), padding=(1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, T, H, W]; of one frame the middle slice sees all there is, and time is not strided."""
        if input.shape[2] == 1:
            return F.conv3d(input, self.weight[:, :, 1:2], self.bias, (1, *self.stride[1:]), (0, 1, 1))  # type: ignore[arg-type]
        return super().forward(input)


class Discriminator(nn.Module):
    """Clips [B, 3, T, H, W] in [-1, 1] -> a logit a patch, [B, 1, t, h, w]: above 0 reads as real.

    Args:
        config: its sizes.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        widths = config.widths
        layers: list[nn.Module] = [_Conv(3, widths[0], (1, 2)), nn.LeakyReLU(0.2)]
        for level in range(1, config.levels + 1):
            stride = (2, 2) if level < config.levels else (1, 1)
            layers += [
                _Conv(widths[level - 1], widths[level], stride),
                # batch statistics would mix real and generated clips and differ between ranks
                nn.GroupNorm(min(32, widths[level]), widths[level]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, _Conv(widths[-1], 1, (1, 1)))

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, 1, t, h, w]."""
        return self.layers(video)
