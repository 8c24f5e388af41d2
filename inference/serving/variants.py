"""A finished video in other kinds of files, made when one is first asked for."""

from __future__ import annotations

import numpy as np

from inference.serving.errors import ApiError
from inference.serving.jobs import Job
from inference.video_io import read_video
from tokenizer.errors import UserError
from tokenizer.video_file import write_video

MEDIA_TYPES = {"mp4": "video/mp4", "gif": "image/gif", "png": "image/png"}
MAX_PIXELS = 64_000_000
"""Of all frames together: those of a GIF, or of a PNG that holds them side by side, are held in memory at once."""


def make_variant(job: Job, variant: str, fps: float) -> None:
    """Writes a kind of file of a finished job, if it is not there.

    Args:
        job: completed.
        variant: "mp4", "gif", or "png" (all frames side by side).
        fps: frames a second.

    Raises:
        ApiError: the video is too long for this kind of file, or was deleted meanwhile.
    """
    file = job.variant_file(variant)
    if file.is_file():  # another one has asked for it meanwhile
        return
    height, width = job.wanted.size
    if job.wanted.num_frames * height * width > MAX_PIXELS:
        raise ApiError(409, "too_long_for_variant", f"this video is too long for a {variant}: take the mp4.")
    try:
        frames: np.ndarray = read_video(job.video_file, job.wanted.size, fps)
        write_video(frames, file, fps)
    except (OSError, UserError):
        if job.video_file.is_file():
            raise  # a full disk, say
        raise ApiError(404, "unknown_video", "this video was deleted meanwhile: make it again.") from None
