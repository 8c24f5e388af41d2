"""Encoded bytes and wanted times -> frames: one interface, with a back end that `choose_decoder` picks."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import av
import av.container
import numpy as np

from tokenizer.errors import UserError
from tokenizer.frames import TOLERANCE, FrameClock, only_video_stream, to_array

logger = logging.getLogger(__name__)

SEEK_FROM = 2.0  # seconds: decoding from the start is faster for earlier frames


class DecodeError(Exception):
    """A video can't be decoded, or not as far as was asked."""


class Decoder(Protocol):
    """Decodes videos; threads may share one."""

    def decode(self, video: bytes, times: Sequence[float] | np.ndarray, height: int, width: int) -> np.ndarray:
        """The frames that are on screen at the wanted times.

        Args:
            video: an encoded file.
            times: seconds on the container's own clock, ascending; each takes the last frame at or before it.
            height, width: of the result. Frames are turned upright, scaled (with antialiasing, aspect ratio kept) until
                they cover this size, and cropped at the centre.

        Returns:
            uint8 [len(times), height, width, 3], RGB.

        Raises:
            DecodeError: the file is damaged, or ends before the last wanted time.
        """
        ...


def choose_decoder(name: str = "auto") -> Decoder:
    """The one place where a back end is chosen.

    Args:
        name: "pyav" (FFmpeg on the CPU), or "auto".

    Raises:
        UserError: there is no such back end.
    """
    if name not in ("auto", "pyav"):
        raise UserError(f"there is no video decoder '{name}': choose 'auto' or 'pyav'.")
    logger.info(
        "video decoder: PyAV %s on the CPU (%s)", av.__version__, "the default" if name == "auto" else "as asked"
    )
    return PyAVDecoder()


class PyAVDecoder:
    """FFmpeg's software decoders: every codec, on any machine, exact to the frame."""

    def decode(self, video: bytes, times: Sequence[float] | np.ndarray, height: int, width: int) -> np.ndarray:
        wanted = np.asarray(times, dtype=np.float64)
        if wanted.size == 0 or (np.diff(wanted) < 0).any():
            raise ValueError("times must be ascending and at least one")
        try:
            for seek in (True, False) if wanted[0] > SEEK_FROM else (False,):
                frames = self._pick(video, wanted, seek)
                if frames is not None:
                    return np.stack([to_array(frame, height, width) for frame in frames])
        except (av.FFmpegError, ValueError, EOFError) as error:
            raise DecodeError(f"decoding failed: {error}") from error
        raise DecodeError(f"the first frame comes after {wanted[0]:.3f} s")

    def _pick(self, video: bytes, wanted: np.ndarray, seek: bool) -> list[av.VideoFrame] | None:
        """The frames at the wanted times; None if decoding started too late to know the first one."""
        picked: list[av.VideoFrame] = []
        shown: av.VideoFrame | None = None
        time = -math.inf
        with av.open(io.BytesIO(video), "r") as container:
            for time, frame in _frames(container, float(wanted[0]) if seek else None):
                if shown is None and time > wanted[0] + TOLERANCE:
                    if seek:
                        return None
                    shown = frame  # nothing comes before the file's first frame
                while len(picked) < len(wanted) and time > wanted[len(picked)] + TOLERANCE and shown is not None:
                    picked.append(shown)
                if len(picked) == len(wanted):
                    return picked
                shown = frame
        if shown is None or wanted[-1] > time + TOLERANCE:
            if seek:
                return None
            raise DecodeError(f"the video ends at {time:.3f} s, {wanted[-1]:.3f} s was wanted")
        return picked + [shown] * (len(wanted) - len(picked))


def _frames(container: av.container.InputContainer, start: float | None) -> Iterator[tuple[float, av.VideoFrame]]:
    stream = only_video_stream(container)
    if stream is None:
        raise DecodeError("no video stream")
    clock = FrameClock(stream)
    if start is not None and stream.time_base is not None:
        container.seek(int(start / stream.time_base), stream=stream, backward=True)
    for frame in container.decode(stream):
        if start is not None and frame.time is None:
            raise ValueError("there are no timestamps to seek by")
        yield clock(frame), frame
