"""Short videos in and out of a report: whole files as arrays, and files that any browser plays."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.decode import DecodeError, choose_decoder
from data_pipelines.probe import Rejected, probe
from tokenizer.errors import UserError
from tokenizer.video_file import write_video

SHOWN_SIDE = 192  # pixels: a 64x64 clip is shown at three times its size


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """Every frame of a file, uint8 [T, H, W, 3], and its average rate in frames a second.

    Raises:
        UserError: the file is missing or can't be decoded.
    """
    try:
        info = probe(path)
        frames = choose_decoder("pyav").decode(path.read_bytes(), info.timestamps, info.height, info.width)
    except (Rejected, DecodeError, OSError) as error:
        raise UserError(f"the video {path} can't be read ({error}): make it again.") from error
    return frames, info.fps


def first_of_each_caption(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """At most `count` rows without choosing by looks: the first of each caption, then the second of each, and so on."""
    seen: dict[str, int] = {}
    turns = []
    for row in rows:
        caption = row.get("caption") or ""
        turns.append(seen.setdefault(caption, 0))
        seen[caption] += 1
    order = sorted(range(len(rows)), key=lambda i: turns[i])  # stable: the order of the file within a turn
    return [rows[i] for i in order[:count]]


def enlarge(frames: np.ndarray, side: int = SHOWN_SIDE) -> np.ndarray:
    """Repeats pixels of [..., H, W, 3] by the largest whole factor that keeps the height within `side`, but at least 1."""
    factor = max(1, side // frames.shape[-3])
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def data_video(frames: np.ndarray, fps: float) -> str:
    """A data URI of an H.264 mp4 (4:2:0) of uint8 [T, H, W, 3]; odd sides lose their last row or column."""
    height, width = (side // 2 * 2 for side in frames.shape[1:3])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(frames[:, :height, :width], file, fps, crf=18)
        return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()


def data_image(image: np.ndarray) -> str:
    """A data URI of a PNG of uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def frame_border(frames: np.ndarray, colour: tuple[int, int, int], width: int) -> np.ndarray:
    """Frames [..., H, W, 3] with a border of `width` pixels around them."""
    margins = [(0, 0)] * (frames.ndim - 3) + [(width, width), (width, width), (0, 0)]
    framed = np.pad(frames, margins)
    inside = np.zeros(framed.shape[-3:-1], dtype=bool)
    inside[width:-width, width:-width] = True
    framed[..., ~inside, :] = colour
    return framed


def beside(*clips: np.ndarray, gap: int = 4, grey: int = 128) -> np.ndarray:
    """Clips [T, H, W, 3] of one size side by side, with a grey gap between them."""
    between = np.full((*clips[0].shape[:2], gap, 3), grey, dtype=np.uint8)
    parts = [part for clip in clips for part in (between, clip)]
    return np.concatenate(parts[1:], axis=2)
