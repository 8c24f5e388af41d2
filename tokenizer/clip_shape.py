"""What shapes of clips the tokenizer takes: 1+4n frames whose sides are multiples of 16."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SPATIAL_COMPRESSION = 16
TEMPORAL_COMPRESSION = 4
RANGE_SLACK = 0.02  # values round in half precision, and sharp resampling overshoots by less


@dataclass(frozen=True, order=True)
class ClipShape:
    """A clip's height, width and number of frames, written HEIGHTxWIDTHxFRAMES, for example 64x64x17."""

    height: int
    width: int
    frames: int

    @classmethod
    def parse(cls, text: str) -> ClipShape:
        """Reads a shape's name.

        Raises:
            UserError: not three numbers, frames not 1+4n, or a side that is not a multiple of 16.
        """
        if not re.fullmatch(r"[0-9]+x[0-9]+x[0-9]+", text):
            raise UserError(f"the clip shape '{text}' is not HEIGHTxWIDTHxFRAMES: write for example 64x64x17.")
        shape = cls(*map(int, text.split("x")))
        try:
            check_clip_shape(shape.frames, shape.height, shape.width)
        except UserError as error:
            raise UserError(f"clips of '{text}' can't be encoded: {error}") from error
        return shape

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


def check_clip_shape(num_frames: int, height: int, width: int) -> None:
    """Raises UserError, with what would fit, unless a clip of this shape can be encoded."""
    check_num_frames(num_frames)
    check_size(height, width)


def check_num_frames(num_frames: int) -> None:
    """Raises UserError unless num_frames is 1 + 4n."""
    if num_frames < 1 or (num_frames - 1) % TEMPORAL_COMPRESSION:
        below = max(1, num_frames - (num_frames - 1) % TEMPORAL_COMPRESSION)
        raise UserError(f"{num_frames} frames are not 1+4n: take {below} or {below + TEMPORAL_COMPRESSION} frames.")


def check_size(height: int, width: int) -> None:
    """Raises UserError unless both sides are multiples of 16."""
    for name, side in (("height", height), ("width", width)):
        if side < SPATIAL_COMPRESSION or side % SPATIAL_COMPRESSION:
            near = max(1, round(side / SPATIAL_COMPRESSION)) * SPATIAL_COMPRESSION
            raise UserError(
                f"the frame {name} {side} is not a multiple of {SPATIAL_COMPRESSION}: resize or crop to {near}, for example."
            )


def check_video(video: Tensor) -> None:
    """Raises UserError unless a tensor is [B, 3, T, 16h, 16w], floating point, with values in [-1, 1]."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise UserError(
            f"a video of shape {tuple(video.shape)} was given: give [clips, 3 channels (RGB), frames, height, width]."
        )
    check_size(*video.shape[-2:])
    if not video.is_floating_point():
        raise UserError(
            f"a video of {video.dtype} was given: convert pixels 0-255 to floating point by video / 127.5 - 1."
        )
    if video.is_meta:
        return
    low, high = (value.item() for value in video.detach().aminmax())
    if not (low >= -1 - RANGE_SLACK and high <= 1 + RANGE_SLACK):  # NaN is no pixel either
        raise UserError(
            f"a video with values from {low:.3g} to {high:.3g} was given: scale pixels to [-1, 1] by value / 127.5 - 1."
        )
