"""Uploaded images and videos -> pixels of the wanted size. What a file is, its content says; its name is never looked at."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from inference.serving.config import ServeConfig
from inference.serving.errors import ApiError, is_the_servers, refused
from inference.serving.memory import available
from inference.video_io import read_image, read_video
from tokenizer.errors import UserError
from tokenizer.frames import FrameClock, only_video_stream

IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# a demuxer of playlists would open other files of this machine
VIDEOS = "mov,mp4,matroska,webm,avi,ogg,mpegts"
DECODERS = 2
"""Files that are decoded at once."""
_HINT = "send a PNG, JPEG or WebP image, or an mp4, webm, mkv, mov or avi video"


def read_reference(
    source: BinaryIO, folder: Path, size: tuple[int, int], fps: float, last: int, config: ServeConfig
) -> tuple[str, np.ndarray]:
    """The frames of an uploaded file.

    Args:
        source: the file; of an animation the first picture is taken.
        folder: for a copy, which is gone afterwards.
        size: (height, width) wanted; scaled to cover it and cropped at the centre.
        fps: frames a second wanted.
        last: frames that are kept of a video's end.
        config: the limits.

    Returns:
        "image" or "video", and uint8 [n, height, width, 3].

    Raises:
        ApiError: the file is neither, is damaged, or is over a limit.
        MemoryError, OSError: the server has too little memory, or its disk is full.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours, below
            image = Image.open(source, formats=IMAGES)
    except UnidentifiedImageError:
        return "video", _read_video(source, folder / "upload", size, fps, last, config)
    except Image.DecompressionBombError:
        raise _too_large("image", config) from None
    except Exception as error:  # decoders raise what they please on damaged files
        if is_the_servers(error):
            raise
        raise _damaged("image") from error
    with image:
        _check_pixels("image", image.width, image.height, config)
        try:
            return "image", read_image(_upright_rgb(image), size)
        except Exception as error:
            if is_the_servers(error) or isinstance(error, ApiError):
                raise
            raise _damaged("image") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: turned as its EXIF data says, 16 bits cut to 8, what is transparent on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PNG's 16-bit grey
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _read_video(
    source: BinaryIO, file: Path, size: tuple[int, int], fps: float, last: int, config: ServeConfig
) -> np.ndarray:
    # the frames that are kept are there twice when they are put together
    if DECODERS * 2 * 3 * last * size[0] * size[1] > available():
        raise MemoryError("too little memory for an uploaded video's frames")
    source.seek(0)
    try:
        with file.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        _check_video(file, fps, config)
        # decoded a second time, by the rule that all conditions follow; the first time only counted
        return read_video(file, size, fps, last=last)
    except ApiError:
        raise
    except (av.FFmpegError, UserError, ValueError, OSError, IndexError) as error:
        if is_the_servers(error):
            raise
        raise _damaged("file") from error
    finally:
        file.unlink(missing_ok=True)


def _check_video(file: Path, fps: float, config: ServeConfig) -> None:
    """Decodes all of it within the limits: a small file may hold any number of frames of any size."""
    options = {"format_whitelist": VIDEOS, "protocol_whitelist": "file"}
    with av.open(str(file), options=options) as container:
        stream = only_video_stream(container)
        if stream is None:
            raise refused("bad_input_reference", f"the uploaded file holds no pictures: {_HINT}.")
        _check_pixels("video", stream.width, stream.height, config)
        stream.codec_context.options = {"max_pixels": str(config.max_upload_pixels)}
        clock, start, count, pixels = FrameClock(stream), None, 0, 0
        for frame in container.decode(stream):
            _check_pixels("video", frame.width, frame.height, config)
            pixels += frame.width * frame.height
            if pixels > config.max_upload_video_pixels:  # a black one of gigapixels takes few bytes and many minutes
                raise ApiError(
                    413,
                    "upload_too_large",
                    f"the uploaded video's frames have too many pixels together: send at most {config.max_upload_video_pixels}, "
                    "smaller or fewer frames.",
                )
            time = clock(frame)
            start, count = time if start is None else start, count + 1
            # a gap between two timestamps counts as frames, too
            if max(count, (time - start) * fps) > config.max_upload_frames:
                raise ApiError(
                    413,
                    "upload_too_long",
                    f"the uploaded video has too many frames: send at most {config.max_upload_frames}, "
                    f"{config.max_upload_frames / fps:g} seconds.",
                )
    if not count:
        raise _damaged("video")


def _check_pixels(what: str, width: int, height: int, config: ServeConfig) -> None:
    if width * height > config.max_upload_pixels:
        raise _too_large(what, config)


def _too_large(what: str, config: ServeConfig) -> ApiError:
    return ApiError(
        413,
        "upload_too_large",
        f"the uploaded {what}'s pictures are too large: send at most {config.max_upload_pixels} pixels.",
    )


def _damaged(what: str) -> ApiError:
    return refused("bad_input_reference", f"the uploaded {what} can't be decoded: {_HINT} that is intact.")
