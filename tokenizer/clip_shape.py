"""What shapes of clips the tokenizer takes: 1+4n frames whose sides are multiples of 16."""

from __future__ import annotations

from tokenizer.errors import UserError

SPATIAL_COMPRESSION = 16
TEMPORAL_COMPRESSION = 4


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
