"""Frames -> video files; the project's only writer of them."""

from __future__ import annotations

import uuid
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tokenizer.errors import UserError


def write_video(frames: np.ndarray, file: str | Path, fps: float = 8.0, crf: int = 16) -> None:
    """Writes a clip; the file appears whole or not at all.

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        file: .mp4 (H.264), .gif, or .png (one frame, or all side by side).
        fps: frames a second.
        crf: quality of H.264, 0 (lossless) to 51; 12 is visually lossless.

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
        writers[file.suffix.lower()](np.ascontiguousarray(frames), temporary, fps, crf)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _write_mp4(frames: np.ndarray, file: Path, fps: float, crf: int) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"frames of {height}x{width} can't become an .mp4, whose sides are even: write a .gif or .png.")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        # 4:2:0, which browsers and hardware decoders take
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        stream.codec_context.thread_count = 1  # small frames; processes share the cores
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(frames: np.ndarray, file: Path, fps: float, _: int) -> None:
    images = [Image.fromarray(pixels) for pixels in frames]
    images[0].save(file, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def _write_png(frames: np.ndarray, file: Path, *_: float) -> None:
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(file)
