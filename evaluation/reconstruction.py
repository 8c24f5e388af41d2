"""How well a tokenizer brings videos back: their reconstructions as files, and PSNR.

videoar tokenizer reconstruct --tokenizer DIR --videos CSV --out DIR
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.clips import read_clip
from data_pipelines.decode import DecodeError, choose_decoder
from data_pipelines.moving_shapes import parse_caption
from data_pipelines.probe import Rejected, probe
from data_pipelines.shards import Source, find_sources, fingerprint
from evaluation.shapes import moving_foreground
from tokenizer import VideoTokenizer
from tokenizer.clip_shape import check_clip_shape
from tokenizer.errors import UserError
from tokenizer.progress import Meter
from tokenizer.receipts import finished, new_folder
from tokenizer.video_file import write_video

FORMAT = 1
RESULT = "reconstruction.json"
LARGEST_PSNR = 100.0  # dB, given to clips without any error: infinity has no mean and no place in JSON
PROTOCOL = (
    "PSNR in dB of pixel values 0-255 rounded to whole numbers, before any video compression of the reconstruction, "
    "against the decoded originals. psnr: the mean over clips of each clip's own PSNR (from its mean squared error over all "
    "frames, pixels and channels); psnr_pooled: of the mean squared error over all clips. The *_foreground values take only "
    "the moving shape's own pixels, found in the original; clips without one do not count there."
)


@dataclass(frozen=True)
class SquaredError:
    """A sum of squared differences and how many were added."""

    total: float = 0.0
    count: int = 0

    def __add__(self, other: SquaredError) -> SquaredError:
        return SquaredError(self.total + other.total, self.count + other.count)

    @property
    def psnr(self) -> float:
        """10 log10(255^2 / mean squared error) in dB, at most `LARGEST_PSNR`; NaN of no pixels."""
        if not self.count:
            return math.nan
        ratio = self.total / self.count / 255**2
        return LARGEST_PSNR if ratio <= 0 else min(LARGEST_PSNR, -10 * math.log10(ratio))


def squared_error(original: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> SquaredError:
    """Of clips uint8 [T, H, W, 3], over the pixels of a mask, bool [T, H, W], or over all."""
    difference = original.astype(np.int64) - other
    if mask is not None:
        difference = difference[mask]
    return SquaredError(float(np.square(difference).sum()), difference.size)


def psnr_summary(errors: list[SquaredError]) -> tuple[float | None, float | None]:
    """The mean over clips of their PSNR, and the PSNR of the pooled error; clips without pixels do not count."""
    counted = [error for error in errors if error.count]
    if not counted:
        return None, None
    return float(np.mean([error.psnr for error in counted])), sum(counted, SquaredError()).psnr


def reconstruct(
    tokenizer_dir: str | Path,
    videos_csv: str | Path,
    out: str | Path,
    size: int = 64,
    num_frames: int = 17,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, Any]:
    """Encodes and decodes videos, or returns what `out` holds if it was made from the same videos and tokenizer.

    `out` then holds an mp4 a clip, reconstructed.csv (path, original, caption) and reconstruction.json (what is returned); it
    appears under its name when it is whole. Videos that give no such clip are skipped and listed with their reason.

    Args:
        tokenizer_dir: what `VideoTokenizer.from_pretrained` reads.
        videos_csv: a CSV with the columns path and caption, or a folder as `videoar shards` takes it.
        out: the folder to make.
        size: height and width of the clips in pixels, a multiple of 16.
        num_frames: 1+4n, from the middle of each video.
        batch_size: clips at once.
        device: where to run.

    Returns:
        {"clips", "psnr", "psnr_pooled", "psnr_foreground", "psnr_foreground_pooled": dB or None, "protocol",
        "each": [{"path", "psnr", "psnr_foreground"}], "skipped": [{"source", "reason"}], ...}. The foreground is measured where
        the caption is one of the moving shapes.

    Raises:
        UserError: no tokenizer, no videos, an impossible clip shape, or `out` holds something else.
    """
    check_clip_shape(num_frames, size, size)
    if batch_size < 1:
        raise UserError(f"a batch size of {batch_size} is impossible: give 1 or more.")
    videos_csv, out = Path(videos_csv), Path(out)
    tokenizer = VideoTokenizer.from_pretrained(tokenizer_dir, device)
    sources, _ = find_sources(videos_csv)
    arguments = {
        "kind": "reconstructions", "format": FORMAT, "tokenizer": tokenizer.fingerprint, "input": fingerprint(sources),
        "size": size, "num_frames": num_frames, "batch_size": batch_size,
    }  # fmt: skip
    if finished(out, arguments) is not None:
        return json.loads((out / RESULT).read_text())
    whole: list[SquaredError] = []
    foreground: list[SquaredError] = []
    rows: list[dict[str, str]] = []
    skipped: list[dict[str, str]] = []
    with new_folder(out, arguments) as (folder, receipt), Meter("reconstructing", len(sources)) as meter:
        for clips in _batches(sources, num_frames, size, batch_size, skipped):
            originals = np.stack([clip.frames for clip in clips])  # [B, T, H, W, 3]
            for clip, other in zip(clips, _through(tokenizer, originals, device)):
                name = f"{len(rows):05d}.mp4"
                write_video(other, folder / name, clip.fps)
                # relative: a run can be moved as a whole
                original = os.path.relpath(clip.source.path.resolve(), out.resolve())
                rows.append({"path": name, "original": original, "caption": clip.source.caption})
                mask = moving_foreground(clip.frames) if _is_moving_shape(clip.source.caption) else None
                whole.append(squared_error(clip.frames, other))
                foreground.append(SquaredError() if mask is None else squared_error(clip.frames, other, mask))
            meter.advance(len(rows) + len(skipped) - meter.done, f"psnr {whole[-1].psnr:.2f} dB")
        if not rows:
            reasons = "; ".join(f"{item['source']}: {item['reason']}" for item in skipped[:3])
            raise UserError(
                f"no video of {videos_csv} gives {num_frames} frames ({reasons}): ask for fewer or give longer videos."
            )
        with open(folder / "reconstructed.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        result = _result(rows, whole, foreground, skipped) | {"tokenizer": tokenizer.fingerprint}
        (folder / RESULT).write_text(json.dumps(result, indent=1))
        receipt["clips"] = len(rows)
    return result


@dataclass(frozen=True)
class _Clip:
    source: Source
    frames: np.ndarray  # uint8 [T, H, W, 3]
    fps: float


def _batches(
    sources: list[Source], num_frames: int, size: int, batch_size: int, skipped: list[dict[str, str]]
) -> Iterator[list[_Clip]]:
    """Decodes the sources in order; those that can't be used go to `skipped`."""
    decoder = choose_decoder()
    clips: list[_Clip] = []
    for source in sources:
        try:
            info = probe(source.path, num_frames)
            record = {"video": source.path.read_bytes(), "timestamps": info.timestamps}
            clips.append(_Clip(source, read_clip(record, decoder, num_frames, size, size), info.fps))
        except (Rejected, DecodeError, OSError) as error:
            skipped.append({"source": source.name, "reason": str(error)})
        if len(clips) == batch_size:
            yield clips
            clips = []
    if clips:
        yield clips


def _through(tokenizer: VideoTokenizer, clips: np.ndarray, device: str) -> np.ndarray:
    """uint8 [B, T, H, W, 3] -> what the tokenizer makes of it, of the same shape."""
    video = torch.from_numpy(clips).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # [B, 3, T, H, W]
    decoded = tokenizer.decode(tokenizer.encode(video))
    return ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def _result(
    rows: list[dict[str, str]], whole: list[SquaredError], foreground: list[SquaredError], skipped: list[dict[str, str]]
) -> dict[str, Any]:
    psnr, psnr_pooled = psnr_summary(whole)
    psnr_foreground, psnr_foreground_pooled = psnr_summary(foreground)
    each = [
        {"path": row["path"], "psnr": w.psnr, "psnr_foreground": f.psnr if f.count else None}
        for row, w, f in zip(rows, whole, foreground)
    ]
    return {
        "clips": len(rows),
        "psnr": psnr,
        "psnr_pooled": psnr_pooled,
        "psnr_foreground": psnr_foreground,
        "psnr_foreground_pooled": psnr_foreground_pooled,
        "clips_with_foreground": sum(error.count > 0 for error in foreground),
        "protocol": PROTOCOL,
        "each": each,
        "skipped": skipped,
    }


def _is_moving_shape(caption: str) -> bool:
    try:
        parse_caption(caption)
    except UserError:
        return False
    return True
