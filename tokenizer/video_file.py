"""Frames -> video files; the project's only writer of them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, PngImagePlugin

from tokenizer.errors import UserError
from tokenizer.video_metadata import KEY, to_text


def write_video(
    frames: np.ndarray, file: str | Path, fps: float = 8.0, crf: int = 16, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a clip; the file appears whole or not at all.

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        file: .mp4 (H.264), .gif, .webp (animated, lossless), or .png (one frame, or all side by side).
        fps: frames a second.
        crf: quality of H.264, 0 (lossless) to 51; 12 is visually lossless.
        metadata: JSON values to embed, for `tokenizer.video_metadata.read_metadata`.

    Raises:
        UserError: another kind of file, or sides that H.264 can't hold.
    """
    file = Path(file)
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png, ".webp": _write_webp}
    if file.suffix.lower() not in writers:
        raise UserError(f"{file} is no kind of file that videos are written to: use {', '.join(writers)}.")
    text = None if metadata is None else to_text(metadata)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{uuid.uuid4().hex}{file.suffix.lower()}")
    try:
        writers[file.suffix.lower()](np.ascontiguousarray(frames), temporary, fps, crf, text)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_frames(frames: np.ndarray, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a clip as a folder of 00000.png, 00001.png, ...; the folder appears whole or not at all.

    Args:
        frames: uint8 [T, H, W, 3], RGB.
        folder: absent, or empty.
        metadata: as for `write_video`; every frame carries it.

    Raises:
        UserError: the folder holds something already.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already: delete it or name another folder.")
    text = None if metadata is None else to_text(metadata)
    temporary = folder.with_name(f".{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        for index, pixels in enumerate(frames):
            _write_png(pixels[None], temporary / f"{index:05d}.png", 0, 0, text)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_mp4(frames: np.ndarray, file: Path, fps: float, crf: int, text: str | None) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(f"frames of {height}x{width} can't become an .mp4, whose sides are even: write a .gif or .png.")
    with av.open(str(file), "w") as container:
        if text is not None:
            container.metadata["comment"] = text
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        # 4:2:0, which browsers and hardware decoders take
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # the same frames give the same file: else x264 reads past small frames, and decides by what happens to lie there
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "cpu-independent=1"}
        stream.codec_context.thread_count = 1  # small frames; processes share the cores
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(frames: np.ndarray, file: Path, fps: float, _: int, text: str | None) -> None:
    images = [Image.fromarray(pixels) for pixels in frames]
    if text is not None:
        images[0].info["comment"] = text.encode("ascii")
    images[0].save(file, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def _write_webp(frames: np.ndarray, file: Path, fps: float, _: int, text: str | None) -> None:
    images = [Image.fromarray(pixels) for pixels in frames]
    options: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0, "lossless": True}
    if text is not None:
        options["xmp"] = text.encode("ascii")
    images[0].save(file, save_all=True, append_images=images[1:], **options)


def _write_png(frames: np.ndarray, file: Path, _: float, __: int, text: str | None) -> None:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text(KEY, text)
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(file, pnginfo=info)
