"""Frames in and out: images and videos read as conditions, generated frames written as files."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.errors import UserError

TOLERANCE = 1e-3
"""Seconds by which a container's rounded timestamp may miss its frame."""


def write_video(frames: np.ndarray, file: str | Path, fps: float = 8.0) -> None:
    """Writes a clip; the file appears whole or not at all.

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        file: .mp4 (H.264), .gif, or .png (one frame, or all side by side).
        fps: frames a second.

    Raises:
        UserError: another kind of file, or sides that H.264 can't hold.
    """
    file = Path(file)
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
    if file.suffix.lower() not in writers:
        raise UserError(f"{file} is no kind of file that videos are written to: use {', '.join(writers)}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{uuid.uuid4().hex}{file.suffix.lower()}")
    try:
        writers[file.suffix.lower()](np.ascontiguousarray(frames), temporary, fps)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


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
    from PIL import Image

    if isinstance(source, str | Path):
        _check_exists(source)
        source = _open_image(Path(source))
    if isinstance(source, Image.Image):
        source = np.asarray(source.convert("RGB"))
    pixels = _check_pixels(np.asarray(source), 3, "an image", "[H, W, 3]")
    return _cover(pixels, size)[None]


def _open_image(file: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

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
        frames = deque((_cover(frame, size) for frame in _decode(Path(source), fps)), maxlen=last)
        if not frames:
            raise UserError(f"{source} holds no video frames: give a video file.")
        return np.stack(list(frames))
    pixels = _check_pixels(np.asarray(source), 4, "a video", "[T, H, W, 3]")
    return np.stack([_cover(frame, size) for frame in pixels[-last if last else 0 :]])


def _decode(file: Path, fps: float) -> Iterator[np.ndarray]:
    """The frame on screen at each multiple of 1 / fps, uint8 [H, W, 3], upright."""
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise UserError(f"{file} holds no video stream: give a video file.")
            shown, time, start, count = None, 0.0, None, 0
            for frame in container.decode(container.streams.video[0]):
                time = frame.time if frame.time is not None else time
                start = time if start is None else start
                while shown is not None and start + count / fps < time - TOLERANCE:
                    yield _upright(shown)
                    count += 1
                shown = frame
            while shown is not None and start is not None and start + count / fps <= time + TOLERANCE:
                yield _upright(shown)
                count += 1
    except av.FFmpegError as error:
        raise UserError(f"{file} can't be decoded ({error}): give an intact video file.") from error


def _upright(frame: Any) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


def _cover(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales [H, W, 3] to cover the size, aspect ratio kept, and crops at the centre."""
    from PIL import Image

    height, width = size
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    tall, wide = max(height, round(pixels.shape[0] * scale)), max(width, round(pixels.shape[1] * scale))
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    scaled = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((wide, tall), kind))
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(scaled[top : top + height, left : left + width])


def _check_exists(file: str | Path) -> None:
    if not Path(file).is_file():
        raise UserError(f"the file {file} does not exist: check the path.")


def _check_pixels(pixels: np.ndarray, ndim: int, what: str, shape: str) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise UserError(
            f"{what} of shape {pixels.shape} and type {pixels.dtype} was given: give uint8 {shape} or a file."
        )
    return pixels


def _write_mp4(frames: np.ndarray, file: Path, fps: float) -> None:
    from fractions import Fraction

    import av

    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"frames of {height}x{width} can't become an .mp4, whose sides are even: write a .gif or .png.")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "16"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(frames: np.ndarray, file: Path, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(pixels) for pixels in frames]
    images[0].save(file, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def _write_png(frames: np.ndarray, file: Path, fps: float) -> None:
    from PIL import Image

    Image.fromarray(np.concatenate(list(frames), axis=1)).save(file)
