"""Which moments of a video a clip shows: one rule for all decoders."""

from __future__ import annotations

from typing import Literal

import numpy as np

from data_pipelines.decode import TOLERANCE, DecodeError
from tokenizer.clip_shape import check_num_frames
from tokenizer.errors import UserError

Start = Literal["centre", "random"]


class ClipTooShort(DecodeError):
    """A video does not last as long as the clip that was asked for."""


def sample_times(
    timestamps: np.ndarray,
    fps: float | None,
    num_frames: int,
    start: Start = "centre",
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """The moments that a clip shows.

    A clip starts at one of the video's own frames; by timestamps, because the average rate means nothing where frames are
    not evenly spaced.

    Args:
        timestamps: seconds of all frames of the video, ascending, [frames].
        fps: frames a second of the clip; None: every frame of the video.
        num_frames: 1+4n.
        start: "centre" (the clip's middle is the video's) or "random" (any start that fits).
        generator: for "random".

    Returns:
        float64 [num_frames], seconds on the video's clock.

    Raises:
        UserError: `num_frames` is not 1+4n, or the rate is not positive.
        ClipTooShort: the video ends before the clip.
    """
    check_num_frames(num_frames)
    if fps is not None and fps <= 0:
        raise UserError(f"a rate of {fps} frames a second is impossible: give a positive one.")
    if fps is None:
        starts = len(timestamps) - num_frames + 1
    else:
        span = (num_frames - 1) / fps
        starts = int(np.searchsorted(timestamps, timestamps[-1] - span + TOLERANCE, side="right"))
    if starts < 1:
        rate = "" if fps is None else f" at {fps:g} frames a second"
        raise ClipTooShort(f"{len(timestamps)} frames are too few for {num_frames}{rate}")
    if start == "random":
        if generator is None:
            raise ValueError("a random start needs a generator")
        first = int(generator.integers(starts))
    elif fps is None:
        first = (starts - 1) // 2
    else:
        middle = (timestamps[0] + timestamps[starts - 1]) / 2
        first = int(np.searchsorted(timestamps[:starts], middle + TOLERANCE, side="right")) - 1
    if fps is None:
        return np.asarray(timestamps[first : first + num_frames], dtype=np.float64)
    # the last moment may lie a rounding error past the last frame
    return np.minimum(timestamps[first] + np.arange(num_frames) / fps, timestamps[-1])
