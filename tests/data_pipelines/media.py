"""Small real video files whose frame i is a grey of its own, so that a test can tell which frames it was given."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def grey(index: int) -> int:
    return 20 + 4 * index


def indices(clip: np.ndarray) -> list[int]:
    """Which frames these are, by their grey; uint8 [T, H, W, 3]."""
    return [round((float(value) - 20) / 4) for value in clip[:, 4:-4, 4:-4].mean((1, 2, 3))]


def write_video(
    path: Path,
    frames: int = 24,
    size: tuple[int, int] = (48, 64),
    fps: int = 8,
    codec: str = "libx264",
    times: list[float] | None = None,
    rotation: int | None = None,
    images: np.ndarray | None = None,
    faststart: bool = False,
    gop: int = 8,
) -> Path:
    """Writes frames at `times` (seconds; default evenly spaced); `images` uint8 [T, H, W, 3] instead of greys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = np.stack([np.full((*size, 3), grey(i), np.uint8) for i in range(frames)])
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], "yuv420p"
        stream.codec_context.gop_size = gop
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        if codec == "libx264":
            stream.options = {"crf": "4", "preset": "veryfast"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * times[i])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path, seconds: float = 1.0) -> Path:
    """An mp4 with sound and no picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        wave = np.sin(np.arange(int(16000 * seconds)) / 10).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float) -> Path:
    """Drops the end of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path
