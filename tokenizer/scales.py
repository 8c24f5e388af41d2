"""Scale schedules: the grids, coarse to fine, on which a latent frame is quantised and predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizer.errors import UserError

LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The sides that a square grid of any of these sizes goes through: a larger grid's first scales are a smaller one's."""


@dataclass(frozen=True)
class ScaleSchedule:
    """The grids (H_k, W_k) of the K scales of one latent frame; the last one is the latent's own grid (H, W).

    Args:
        scales: one (height, width) a scale, in tokens, coarse to fine.

    Raises:
        UserError: no scale, a grid below 1x1, or a scale that is smaller than the one before it.
    """

    scales: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple((int(h), int(w)) for h, w in self.scales))
        if not self.scales or min(min(grid) for grid in self.scales) < 1:
            raise UserError(
                f"the scale schedule {self.scales} is empty or has a grid below 1x1: give grids such as (1, 1), (2, 2)."
            )
        for coarse, fine in zip(self.scales, self.scales[1:]):
            if fine[0] < coarse[0] or fine[1] < coarse[1] or fine == coarse:
                raise UserError(
                    f"the scale schedule {self.scales} shrinks from {coarse} to {fine}: order the scales coarse to fine."
                )

    @classmethod
    def square(cls, size: int, num_scales: int) -> ScaleSchedule:
        """The square schedule of `num_scales` scales up to size x size: square(8, 6) is 1, 2, 3, 4, 6, 8.

        It follows the ladder where that has so many steps up to `size`, and is about geometric otherwise.
        """
        return cls(tuple((side, side) for side in _sides(size, num_scales)))

    @classmethod
    def for_grid(cls, height: int, width: int, num_scales: int) -> ScaleSchedule:
        """The schedule for a grid of any aspect ratio; on a square grid it is `square`.

        Args:
            height, width: the latent's grid, in tokens.
            num_scales: K; the shorter side must hold K different sizes unless the longer one does.
        """
        longer = max(height, width)
        sides = _sides(longer, num_scales)
        grids = [(max(1, round(side * height / longer)), max(1, round(side * width / longer))) for side in sides]
        return cls(tuple(grids[:-1]) + ((height, width),))

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.scales)

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W), the last grid."""
        return self.scales[-1]

    def tokens(self, scale: int) -> int:
        """H_k * W_k."""
        height, width = self.scales[scale]
        return height * width

    @property
    def tokens_per_frame(self) -> int:
        """The sum of H_k * W_k over all scales."""
        return sum(height * width for height, width in self.scales)

    def split(self) -> list[int]:
        """H_k * W_k for each scale, as `torch.split` wants it."""
        return [height * width for height, width in self.scales]

    def to_list(self) -> list[list[int]]:
        """As plain lists, for JSON and YAML."""
        return [list(grid) for grid in self.scales]

    @classmethod
    def from_list(cls, scales: Sequence[Sequence[int]]) -> ScaleSchedule:
        """The schedule that `to_list` wrote."""
        return cls(tuple((int(h), int(w)) for h, w in scales))


def natural_scales(size: int) -> int:
    """How many scales the ladder has up to a grid of `size`: 6 up to 8, 8 up to 16."""
    return sum(side < size for side in LADDER) + 1


def _sides(size: int, num_scales: int) -> list[int]:
    if num_scales < 1 or num_scales > size:
        raise UserError(f"{num_scales} scales do not fit a grid of {size}: choose 1 to {size} scales.")
    if num_scales == 1:
        return [size]
    if num_scales == natural_scales(size):
        return [*(side for side in LADDER if side < size), size]
    sides: list[int] = []
    for scale in range(num_scales):
        # the slack keeps an exact power such as 8^(3/3) from being rounded up
        side = math.ceil(size ** (scale / (num_scales - 1)) - 1e-9)
        sides.append(max(side, sides[-1] + 1 if sides else 1))
    # strictly growing sides may overshoot near the end of a dense schedule: cap them from above
    for back in range(num_scales):
        sides[-1 - back] = min(sides[-1 - back], size - back)
    return sides
