"""Images and videos read as conditions, by the same rule of scaling that training clips follow (`tokenizer.frames`)."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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
        source = np.asarray(to_rgb(source))
    pixels = _check_pixels(np.asarray(source), 3, "an image", "[H, W, 3]")
    return cover(_centre(pixels, size), *size)[None]


def _centre(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cuts off most of what is cropped anyway of a very long strip, which scaled as a whole would not fit into memory."""
    tall, wide = pixels.shape[:2]
    # far beyond the wanted shape, so that ordinary pictures are scaled as a whole, as in training
    most_tall, most_wide = 16 * -(-wide * size[0] // size[1]), 16 * -(-tall * size[1] // size[0])
    top, left = max(0, tall - most_tall) // 2, max(0, wide - most_wide) // 2
    return pixels[top : tall - top, left : wide - left]


def _open_image(file: Path) -> Image.Image | av.VideoFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file)
            image.load()
        return image
    except UnidentifiedImageError:
        with suppress(UserError, StopIteration):
            return next(_decode(file, fps=1.0))
        raise UserError(f"{file} is neither an image nor a video: give a PNG, JPEG or video file.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UserError(f"{file} has more than {most} million pixels: give a smaller image.") from None
    except Exception as error:  # a broken file makes its format's reader fail in ways of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file} can't be read as an image ({reason}): give a PNG, JPEG or video file.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as one shows it: turned upright, transparency on white, 16 and 32 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        largest = values.max(initial=0)
        # the mode I;16 says its range; of the others only the values tell
        whole = 65535.0 if image.mode.startswith("I;") or largest > 255 else (255.0 if largest > 1 else 1.0)
        image = Image.fromarray((values.clip(0, whole) * (255 / whole)).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
