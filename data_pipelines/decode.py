"""Encoded bytes and wanted times -> frames: one interface, with a back end that `choose_decoder` picks."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import av
import av.container
import numpy as np
import torch

from tokenizer.errors import UserError
from tokenizer.frames import TOLERANCE, FrameClock, Scaler, only_video_stream

logger = logging.getLogger(__name__)

OPENING = {"skip_frame": "all"}
"""For FFmpeg while it looks at a file's streams: it would decode the first frame to learn what decoding shows anyway."""
SEEK_FROM = 2.0  # seconds: decoding from the start is faster for earlier frames


class DecodeError(Exception):
    """A video can't be decoded, or not as far as was asked."""


class Decoder(Protocol):
    """Decodes videos; threads may share one."""

    def decode(
        self, video: bytes, times: Sequence[float] | np.ndarray, height: int, width: int, rotation: int = 0
    ) -> np.ndarray:
        """The frames that are on screen at the wanted times.

        Args:
            video: an encoded file.
            times: seconds on the container's own clock, ascending; each takes the last frame at or before it.
            height, width: of the result. Frames are turned upright, scaled (with antialiasing, aspect ratio kept) until
                they cover this size, and cropped at the centre.
            rotation: degrees counter-clockwise that turn a decoded frame upright, for back ends that do not find it in the file.

        Returns:
            uint8 [len(times), height, width, 3], RGB.

        Raises:
            DecodeError: the file is damaged, or ends before the last wanted time.
        """
        ...


def ascending(times: Sequence[float] | np.ndarray) -> np.ndarray:
    """The wanted times of a `Decoder`, checked, float64 [T]."""
    wanted = np.asarray(times, dtype=np.float64)
    if wanted.size == 0 or (np.diff(wanted) < 0).any():
        raise ValueError("times must be ascending and at least one")
    return wanted


def choose_decoder(name: str = "auto") -> Decoder:
    """The one place where a back end is chosen.

    Args:
        name: "pyav" (FFmpeg on the CPU); "dali" (on this process's GPU, without one DALI's CPU operators; files that it can't decode are
            errors); or "auto": DALI where there is a GPU and DALI is installed, and PyAV for what it can't decode, else PyAV.

    Raises:
        UserError: there is no such back end, or it is not installed.
    """
    if name not in ("auto", "pyav", "dali"):
        raise UserError(f"there is no video decoder '{name}': choose 'auto', 'pyav' or 'dali'.")
    device = "cuda" if name != "pyav" and torch.cuda.is_available() else "cpu"
    installed = importlib.util.find_spec("nvidia.dali") is not None
    if name == "dali" and not installed:
        raise UserError("the decoder 'dali' needs NVIDIA DALI: install requirements.txt, or choose 'pyav'.")
    if name == "dali" or (name == "auto" and device == "cuda" and installed):
        from data_pipelines.dali_decoder import DALIDecoder

        fallback = PyAVDecoder() if name == "auto" else None
        where = "the GPU" if device == "cuda" else "the CPU"
        logger.info(
            "video decoder: NVIDIA DALI on %s (%s)", where, "as asked" if fallback is None else "there is a GPU"
        )
        return DALIDecoder(device, fallback)
    why = "as asked" if name == "pyav" else "there is no GPU" if installed else "DALI is not installed"
    logger.info("video decoder: PyAV %s on the CPU (%s)", av.__version__, why)
    return PyAVDecoder()


class PyAVDecoder:
    """FFmpeg's software decoders: every codec, on any machine, exact to the frame."""

    def decode(
        self, video: bytes, times: Sequence[float] | np.ndarray, height: int, width: int, rotation: int = 0
    ) -> np.ndarray:
        wanted = ascending(times)
        planes = np.empty((3, len(wanted), height, width), dtype=np.uint8)
        try:
            for seek in (True, False) if wanted[0] > SEEK_FROM else (False,):
                if self._fill(planes, video, wanted, seek):
                    return planes.transpose(1, 2, 3, 0)  # [T, H, W, 3]
        except (av.FFmpegError, ValueError, EOFError) as error:
            raise DecodeError(f"decoding failed: {error}") from error
        raise DecodeError(f"the first frame comes after {wanted[0]:.3f} s")

    def _fill(self, planes: np.ndarray, video: bytes, wanted: np.ndarray, seek: bool) -> bool:
        """Writes the frames at the wanted times to [3, T, H, W]; False if decoding started too late to know the first one."""
        scale, moments = Scaler(*planes.shape[2:]), wanted.tolist()
        filled = 0
        shown: av.VideoFrame | None = None
        time = -math.inf

        def fill(frame: av.VideoFrame, until: float) -> int:
            # at once, while it is in the processor's cache, and so that the decoder gets its memory back
            stop = filled
            while stop < len(moments) and moments[stop] < until - TOLERANCE:
                stop += 1
            if stop > filled:
                scale(frame, planes[:, filled])
                if stop > filled + 1:
                    planes[:, filled + 1 : stop] = planes[:, filled : filled + 1]
            return stop

        with av.open(io.BytesIO(video), "r", options=OPENING) as container:
            for time, frame in _frames(container, float(wanted[0]) if seek else None):
                if shown is None and time > wanted[0] + TOLERANCE:
                    if seek:
                        return False
                    shown = frame  # nothing comes before the file's first frame
                if shown is not None:
                    filled = fill(shown, time)
                if filled == len(wanted):
                    return True
                shown = frame
        if shown is None or wanted[-1] > time + TOLERANCE:
            if seek:
                return False
            raise DecodeError(f"the video ends at {time:.3f} s, {wanted[-1]:.3f} s was wanted")
        fill(shown, math.inf)
        return True


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
