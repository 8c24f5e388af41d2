"""Images and videos read as conditions, by the same rule of scaling that training clips follow (`tokenizer.frames`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from tokenizer.errors import UserError
from tokenizer.frames import TOLERANCE, FrameClock, cover, only_video_stream, to_array


def read_image(source: Any, size: tuple[int, int]) -> np.ndarray:
    """An image as a clip of one frame.

    Args:
        source: a file (of a video its first frame), a PIL image, or uint8 [H, W, 3].
        size: (height, width) wanted; the image is scaled to cover it and cropped at the centre.

    Returns:
        uint8 [1, height, width, 3].

    Raises:
        UserError: the file is missing or holds no picture.
    """
    if isinstance(source, str | Path):
        _check_exists(source)
        source = _open_image(Path(source))
    if isinstance(source, av.VideoFrame):
        return to_array(source, *size)[None]
    if isinstance(source, Image.Image):
        source = np.asarray(source.convert("RGB"))
    pixels = _check_pixels(np.asarray(source), 3, "an image", "[H, W, 3]")
    return cover(pixels, *size)[None]


def _open_image(file: Path) -> Image.Image | av.VideoFrame:
    try:
        image = Image.open(file)
        image.load()
        return image
    except UnidentifiedImageError:
        with suppress(UserError, StopIteration):
            return next(_decode(file, fps=1.0))
        raise UserError(f"{file} is neither an image nor a video: give a PNG, JPEG or video file.") from None
    except OSError as error:
        raise UserError(f"{file} can't be read as an image ({error}): give a PNG, JPEG or video file.") from error


def read_video(source: Any, size: tuple[int, int], fps: float, last: int | None = None) -> np.ndarray:
    """A clip at the wanted rate and size.

    Args:
        source: a file, or uint8 [T, H, W, 3] that has the rate already.
        size: (height, width) wanted; frames are scaled to cover it and cropped at the centre.
        fps: frames a second wanted; sampled by the file's timestamps.
        last: only this many frames from the end; None: all.

    Returns:
        uint8 [T, height, width, 3].

    Raises:
        UserError: the file is missing or holds no video.
    """
    if isinstance(source, str | Path):
        _check_exists(source)
        # only the frames that are kept are ever held: the file may be long
        frames = deque((to_array(frame, *size) for frame in _decode(Path(source), fps)), maxlen=last)
        if not frames:
            raise UserError(f"{source} holds no video frames: give a video file.")
        return np.stack(list(frames))
    pixels = _check_pixels(np.asarray(source), 4, "a video", "[T, H, W, 3]")
    return np.stack([cover(frame, *size) for frame in pixels[-last if last else 0 :]])


def _decode(file: Path, fps: float) -> Iterator[av.VideoFrame]:
    """The frame on screen at each multiple of 1 / fps."""
    try:
        with av.open(str(file)) as container:
            stream = only_video_stream(container)
            if stream is None:
                raise UserError(f"{file} holds no video stream: give a video file.")
            clock, shown, time, start, count = FrameClock(stream), None, 0.0, None, 0
            for frame in container.decode(stream):
                time = clock(frame)
                start = time if start is None else start
                while shown is not None and start + count / fps < time - TOLERANCE:
                    yield shown
                    count += 1
                shown = frame
            while shown is not None and start is not None and start + count / fps <= time + TOLERANCE:
                yield shown
                count += 1
    except av.FFmpegError as error:
        raise UserError(f"{file} can't be decoded ({error}): give an intact video file.") from error


def _check_exists(file: str | Path) -> None:
    if not Path(file).is_file():
        raise UserError(f"the file {file} does not exist: check the path.")


def _check_pixels(pixels: np.ndarray, ndim: int, what: str, shape: str) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise UserError(
            f"{what} of shape {pixels.shape} and type {pixels.dtype} was given: give uint8 {shape} or a file."
        )
    return pixels
