"""Decodes a file once from end to end and says what is in it, or why it can't be used."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import av
import av.container
import numpy as np

from tokenizer.frames import FrameClock, only_video_stream


class Rejected(Exception):
    """A file that can't become a clip; the message is the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a whole decode has seen.

    Attributes:
        timestamps: seconds of every frame on the container's own clock, float64 [frames], strictly ascending.
        width, height: in pixels, upright, that is after `rotation`.
        fps: the average rate; of little meaning where frames are not evenly spaced, hence `timestamps`.
        duration: seconds from the first frame to the end of the last.
        codec: FFmpeg's name, such as "h264".
        rotation: degrees counter-clockwise that turn a decoded frame upright: 0, 90, 180 or 270.
    """

    timestamps: np.ndarray
    width: int
    height: int
    fps: float
    duration: float
    codec: str
    rotation: int

    @property
    def frames(self) -> int:
        return len(self.timestamps)


def probe(video: bytes | Path, min_frames: int = 1) -> VideoInfo:
    """Decodes every frame of a video.

    Args:
        video: a file or its content.
        min_frames: fewer than these are too short.

    Raises:
        Rejected: "missing file", "empty file", "no video stream", "corrupt (...)", "truncated (...)" or "too short (...)".
    """
    if isinstance(video, Path):
        if not video.is_file():
            raise Rejected("missing file")
        video = video.read_bytes()
    if not video:
        raise Rejected("empty file")
    try:
        with av.open(io.BytesIO(video), "r") as container:
            info = _decode_all(container)
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise Rejected(f"corrupt ({_plain(error)})") from error
    if info.frames < min_frames:
        raise Rejected(f"too short ({info.frames} frames, {min_frames} wanted)")
    return info


def _decode_all(container: av.container.InputContainer) -> VideoInfo:
    stream = only_video_stream(container)
    if stream is None:
        raise Rejected("no video stream")
    clock = FrameClock(stream)
    times: list[float] = []
    damaged = hidden = 0
    cut = False
    width = height = rotation = 0
    last_length = 0.0
    for packet in container.demux(stream):
        cut = cut or packet.is_corrupt
        hidden += packet.is_discard  # outside the edit list: decoded, never shown
        for frame in packet.decode():
            if not times:
                width, height, rotation = frame.width, frame.height, round(frame.rotation / 90) * 90 % 360
            times.append(clock(frame))
            damaged += frame.is_corrupt
            last_length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
    last_length = last_length or clock.gap
    timestamps = np.array(times, dtype=np.float64)
    _check_complete(container, stream, timestamps, last_length, hidden, cut)
    if damaged:
        raise Rejected(f"corrupt ({damaged} of {len(times)} frames damaged)")
    if not times:
        raise Rejected("corrupt (no frame can be decoded)")
    span = timestamps[-1] - timestamps[0]
    fps = (len(times) - 1) / span if span > 0 else 1 / clock.gap
    if rotation % 180:
        width, height = height, width
    return VideoInfo(
        timestamps, width, height, float(fps), float(span + last_length), stream.codec_context.name, rotation
    )


def _check_complete(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    timestamps: np.ndarray,
    last_length: float,
    hidden: int,
    cut: bool,
) -> None:
    """Compares what was decoded with what the container announces: a cut file can decode without an error."""
    announced, found = stream.frames, len(timestamps)
    # AVI counts dropped frames too; the sample table of mp4 is exact.
    slack = 0 if "mp4" in container.format.name else max(1, announced // 50)
    if announced and announced - hidden - found > slack:
        raise Rejected(f"truncated ({found} frames of {announced})")
    if not announced and found:
        length = _announced_seconds(container, stream)
        seen = timestamps[-1] + last_length - min(0.0, timestamps[0])
        if length is not None and length - seen > max(2 * last_length, 0.05 * length):
            raise Rejected(f"truncated ({seen:.2f} s of {length:.2f} s)")
    if cut:
        raise Rejected(f"truncated (the last of {found} frames is incomplete)")


def _announced_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """The length of this stream by its header; the container's own only if sound can't be what makes it longer."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if tag := stream.metadata.get("DURATION"):
        hours, minutes, seconds = tag.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _plain(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
