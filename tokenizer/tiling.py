"""Frames too large for memory, in overlapping tiles whose results are blended; off by default.

Tiling changes the result near the seams: a tile's convolutions see zeros beyond its border, where the whole frame would go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.causal_conv import Carry
from tokenizer.clip_shape import SPATIAL_COMPRESSION
from tokenizer.errors import UserError

Carries = dict[tuple[int, int], Carry]
"""What a stream carries, for each tile; an empty one starts a stream."""


@dataclass(frozen=True)
class Tiling:
    """How frames are cut.

    Args:
        size: side of a tile in pixels.
        overlap: pixels that neighbours share and over which they are blended.

    Raises:
        UserError: not multiples of 16, or the overlap is more than half a tile.
    """

    size: int = 512
    overlap: int = 128

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("overlap", self.overlap)):
            if value % SPATIAL_COMPRESSION or value < SPATIAL_COMPRESSION:
                raise UserError(
                    f"the tile {name} {value} is not a multiple of {SPATIAL_COMPRESSION}: choose 512 and 128, for example."
                )
        if 2 * self.overlap > self.size:
            raise UserError(
                f"tiles of {self.size} pixels can't overlap by {self.overlap}: choose an overlap of at most {self.size // 2}."
            )


def run_tiled(
    run: Callable[[Tensor, Carry | None], Tensor], input: Tensor, size: int, overlap: int, carries: Carries | None
) -> Tensor:
    """Runs a network over overlapping tiles and blends the results with linear ramps.

    Args:
        run: (tile, carry) -> its result; both sides of the tile shrink or grow by the same factor.
        input: [B, C, T, H, W].
        size, overlap: of the tiles, in the input's pixels or tokens.
        carries: of a stream; None: the input is a whole clip.

    Returns:
        what `run` gives for the whole input, to the seams' blending.
    """
    height, width = input.shape[-2:]
    total: Tensor | None = None
    weights: Tensor | None = None
    for top, bottom in _spans(height, size, overlap):
        for left, right in _spans(width, size, overlap):
            carry = None if carries is None else carries.setdefault((top, left), {})
            result = run(input[..., top:bottom, left:right], carry)
            up, down = result.shape[-2], bottom - top  # the factor is up / down
            if total is None or weights is None:
                total = result.new_zeros(*result.shape[:-2], height * up // down, width * up // down)
                weights = result.new_zeros(total.shape[-2:])
            ramps = [
                _ramp(b - a, overlap, a > 0, b < end, up, down).to(result)
                for a, b, end in ((top, bottom, height), (left, right, width))
            ]
            window = ramps[0][:, None] * ramps[1]  # [h, w]
            here = (..., slice(top * up // down, bottom * up // down), slice(left * up // down, right * up // down))
            total[here] += result * window
            weights[here[1:]] += window
    assert total is not None and weights is not None
    return total / weights


def _spans(length: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Tiles along one side; the last one ends with the frame and is as large as the others."""
    start = 0
    while start + size < length:
        yield start, start + size
        start += size - overlap
    yield max(0, min(start, length - size)), length


def _ramp(length: int, overlap: int, from_zero: bool, to_zero: bool, up: int, down: int) -> Tensor:
    """Weights along one side of a result: rising and falling over the overlaps, never zero."""
    length, overlap = length * up // down, overlap * up // down
    place = torch.arange(length) + 0.5
    weight = torch.ones(length)
    if from_zero:
        weight = torch.minimum(weight, place / overlap)
    if to_zero:
        weight = torch.minimum(weight, (length - place) / overlap)
    return weight
