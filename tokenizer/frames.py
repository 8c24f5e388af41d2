"""Decoded frames -> pixels: one rule of time, rotation, scaling and cropping for training, conditions and measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass

import av
import av.container
import av.stream
import av.video.frame
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

# Averaging over areas is the antialiased way down; sharp cubic curves are for the way up.
_ACCURATE = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
DOWN, UP = Interpolation.AREA | _ACCURATE, Interpolation.BICUBIC | _ACCURATE
TOLERANCE = 1e-3  # seconds: containers round timestamps, Matroska to whole milliseconds


class FrameClock:
    """Gives decoded frames their time in seconds; repairs missing and repeated timestamps by the stream's rate."""

    def __init__(self, stream: av.VideoStream):
        rate = stream.average_rate or stream.guessed_rate
        self.gap = 1 / float(rate) if rate else 1 / 25
        self.last = -math.inf

    def __call__(self, frame: av.VideoFrame) -> float:
        time = frame.time
        if time is None or time <= self.last:
            time = self.last + self.gap if self.last > -math.inf else 0.0
        self.last = time
        return time


def only_video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first stream of moving pictures (an audio file's cover picture is none), set to decode in one thread."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            stream.codec_context.thread_count = 1  # processes share the cores; more threads change no pixel
            return stream
    return None


@dataclass(frozen=True)
class Covering:
    """How frames come to a size, in every decoder: scaled (aspect ratio kept) until they cover it, cropped at the centre, turned upright.

    Args:
        tall, wide: what frames are scaled to.
        rows, columns: what is kept of that.
        quarter_turns: counter-clockwise, afterwards.
        smaller: scaling goes down.
    """

    tall: int
    wide: int
    rows: slice
    columns: slice
    quarter_turns: int
    smaller: bool

    @classmethod
    def of(cls, frame_height: int, frame_width: int, rotation: int, height: int, width: int) -> Covering:
        """For frames as they are stored, the degrees that turn them upright, and the size of the result."""
        quarter_turns = round(rotation / 90) % 4
        if quarter_turns % 2:
            height, width = width, height
        scale = max(height / frame_height, width / frame_width)
        tall, wide = max(height, round(frame_height * scale)), max(width, round(frame_width * scale))
        top, left = (tall - height) // 2, (wide - width) // 2
        return cls(tall, wide, slice(top, top + height), slice(left, left + width), quarter_turns, scale < 1)


class Scaler:
    """Frames as pixels: turned upright, scaled (aspect ratio kept) until they cover a size, and cropped at the centre.

    For one thread and the frames of one video, whose common tables it keeps.

    Args:
        height, width: of the results.
    """

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self._reformatter = VideoReformatter()
        self._seen: tuple[int, int, int] | None = None  # height, width and rotation of the last frame
        self._cover: Covering | None = None  # for such frames

    def __call__(self, frame: av.VideoFrame, out: np.ndarray | None = None) -> np.ndarray:
        """Scales a frame.

        Args:
            frame: as decoded.
            out: uint8 [3, height, width] to write to; None: new memory.

        Returns:
            uint8 [height, width, 3], RGB, a view of planes in memory.
        """
        planes = np.empty((3, self.height, self.width), dtype=np.uint8) if out is None else out
        if self._cover is None or self._seen != (frame.height, frame.width, frame.rotation):
            self._seen = (frame.height, frame.width, frame.rotation)
            self._cover = Covering.of(*self._seen, self.height, self.width)
        cover, kind = self._cover, DOWN if self._cover.smaller else UP
        # planes come three times as fast as packed pixels, and are what the networks want
        scaled = self._reformatter.reformat(frame, cover.wide, cover.tall, "gbrp", None, None, kind, threads=1)
        for plane, channel in zip(scaled.planes, (1, 2, 0)):
            pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)  # [tall, wide and padding]
            pixels = pixels[cover.rows, cover.columns]
            planes[channel] = np.rot90(pixels, cover.quarter_turns) if cover.quarter_turns else pixels
        return planes.transpose(1, 2, 0)


def to_array(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """One frame by `Scaler`: uint8 [height, width, 3]."""
    return Scaler(height, width)(frame)


def cover(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """`to_array` for pixels that no file holds: uint8 [H, W, 3] -> uint8 [height, width, 3]."""
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    return to_array(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"), height, width)
