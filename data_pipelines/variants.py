"""What sizes clips are encoded at: fixed ones, or buckets by each clip's own aspect ratio and length."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_pipelines.sampling import ClipTooShort, sample_times
from tokenizer.clip_shape import SPATIAL_COMPRESSION, ClipShape, check_clip_shape
from tokenizer.errors import UserError

LARGEST_RATIO = 3.0
"""Of the longer side of a bucket over its shorter one; clips beyond are cropped."""


@dataclass(frozen=True)
class Variant:
    """One rule for the shape of every clip.

    Written HEIGHTxWIDTHxFRAMES, or SIDExFRAMES for about SIDE x SIDE pixels at each clip's own aspect ratio. FRAMES may list several
    lengths, 17+33+65: each clip takes the longest that it has. An image has one frame.

    Args:
        size: (height, width), or the side.
        frames: lengths, ascending.
    """

    size: tuple[int, int] | int
    frames: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Reads a variant's name.

        Raises:
            UserError: it is none, frames are not 1+4n, or sides not multiples of 16.
        """
        if not re.fullmatch(r"[0-9]+x([0-9]+x)?[0-9]+(\+[0-9]+)*", text):
            raise UserError(
                f"the variant '{text}' is neither HEIGHTxWIDTHxFRAMES nor SIDExFRAMES: write for example 64x64x17, 256x17 or 256x17+33."
            )
        *sides, lengths = text.split("x")
        frames = tuple(int(length) for length in lengths.split("+"))
        if list(frames) != sorted(set(frames)):
            raise UserError(f"the variant '{text}' does not list its lengths in ascending order: mend it.")
        height, width = int(sides[0]), int(sides[-1])
        try:
            for length in frames:
                check_clip_shape(length, height, width)
        except UserError as error:
            raise UserError(f"the variant '{text}' can't be encoded: {error}") from error
        return cls((height, width) if len(sides) == 2 else height, frames)

    def shape(self, record: dict[str, Any], fps: float | None) -> ClipShape:
        """The shape that a raw record's clip gets.

        Args:
            record: its upright width and height, and its timestamps.
            fps: rate that it is sampled at.

        Raises:
            ClipTooShort: it does not have the shortest length.
        """
        size = self.size if isinstance(self.size, tuple) else nearest_size(record["height"], record["width"], self.size)
        for frames in reversed(self.frames[1:]):
            try:
                sample_times(record["timestamps"], fps, frames)
            except ClipTooShort:
                continue
            return ClipShape(*size, frames)
        sample_times(record["timestamps"], fps, self.frames[0])
        return ClipShape(*size, self.frames[0])


def nearest_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The bucket of side^2 pixels for frames of any size: (height, width), multiples of 16, whose ratio is nearest to theirs."""
    wanted = math.log(width / height)
    return min(sizes(side), key=lambda size: (abs(math.log(size[1] / size[0]) - wanted), size))


@lru_cache
def sizes(side: int) -> tuple[tuple[int, int], ...]:
    """All buckets of at most side^2 pixels, (height, width): for each shorter side the longest other one, lying and upright."""
    found = set()
    for short in range(SPATIAL_COMPRESSION, side + 1, SPATIAL_COMPRESSION):
        long = side * side // short // SPATIAL_COMPRESSION * SPATIAL_COMPRESSION
        if long <= LARGEST_RATIO * short:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found))
