"""Drift: a model goes on from the beginning of real videos of moving shapes, and is compared with what really followed.

The corpus leaves nothing open once two latent frames are given: the background stands still and the shape goes on in a
straight line. So the real end of a clip is the right answer, and how far a continuation is from it, frame by frame, says
how the model's own mistakes add up.

videoar evaluate continuation --model runs/demo/model --videos runs/demo/corpus/validation.csv --out continuation.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.fidelity import SquaredError, squared_error
from evaluation.shapes import places
from evaluation.videos import read_table
from evaluation.wilson import wilson_interval
from inference.pipeline import FRAMES_A_LATENT, VideoARPipeline
from inference.video_io import read_video
from tokenizer.errors import UserError
from tokenizer.files import write_whole
from tokenizer.pixels import from_pixels, to_pixels
from tokenizer.progress import track

NEAR = 1 / 16
"""Of the frame's width: a shape that is at most so far from its real place counts as in place."""


def in_place(made: np.ndarray, real: np.ndarray) -> np.ndarray:
    """In which frames the shape is where it really was: of clips uint8 [T, H, W, 3], bool [T]; without a shape it is not."""
    gap = np.hypot(*(places(made) - places(real)).T) / real.shape[2]  # [T], NaN without a shape
    return gap <= NEAR


def evaluate_continuation(
    model: str | Path,
    videos: Path,
    out: Path,
    clips: int | None = None,
    frames: int | None = None,
    given_frames: int = 5,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Continues real videos and measures how far the result is from what followed.

    Args:
        model: an exported model.
        videos: a CSV with the columns path and caption; they are brought to the model's size and rate.
        out: the JSON file for the result.
        clips: the first so many videos; None: all.
        frames: of each result, 1+4n, given ones included; None: as trained.
        given_frames: real frames that each result begins with, 1+4n.
        seed: of the first video; the others count on.
        device: where the model runs.
        options: guidance and temperature, of the pipeline's call.

    Returns:
        "psnr" in dB and "in_place" (the share of frames whose shape is within `NEAR` of its real place) over all continued
        frames, both by latent frame under "frames"; "last_in_place" for the last frame alone, with its 95% Wilson "interval";
        "reconstruction_psnr", which a perfect model would reach with this tokenizer; what was asked for.

    Raises:
        UserError: lengths do not fit, or a video is too short.
    """
    pipe = VideoARPipeline.from_pretrained(model, device=device)
    total = 1 + FRAMES_A_LATENT * (pipe.config.num_frames - 1) if frames is None else frames
    if not 1 <= given_frames < total or (given_frames - 1) % FRAMES_A_LATENT or (total - 1) % FRAMES_A_LATENT:
        raise UserError(f"{given_frames} given frames of {total}: both must be 1+4n, and something must be left to do.")
    rows = read_table(videos)[:clips]
    count = (total - given_frames) // FRAMES_A_LATENT
    errors, ceiling, near = [SquaredError()] * count, SquaredError(), np.zeros(count)
    last_in_place = 0
    for number, row in enumerate(track(rows, f"continuing {videos}")):
        real = read_video(row["path"], pipe.size, pipe.fps)[:total]
        if len(real) < total:
            raise UserError(
                f"{row['path']} has {len(real)} frames at {pipe.fps:g} a second, not {total}: ask for fewer --frames."
            )
        made = pipe(
            row["caption"], total, seed=seed + number, video=real[:given_frames], given_frames=given_frames, **options
        ).frames
        coded = pipe.tokenizer.encode(from_pixels(real[None], pipe.device), pipe.config.schedule)
        ceiling += squared_error(real[given_frames:], to_pixels(pipe.tokenizer.decode(coded))[0][given_frames:])
        right = in_place(made, real)
        for index in range(count):
            part = slice(given_frames + FRAMES_A_LATENT * index, given_frames + FRAMES_A_LATENT * (index + 1))
            errors[index] += squared_error(real[part], made[part])
            near[index] += right[part].mean()
        last_in_place += int(right[-1])
    shares = near / len(rows)
    result = {
        "clips": len(rows),
        "given_frames": given_frames,
        "num_frames": total,
        "seed": seed,
        **options,
        "psnr": sum(errors, SquaredError()).psnr,
        "reconstruction_psnr": ceiling.psnr,
        "in_place": float(shares.mean()),
        "last_in_place": last_in_place / len(rows),
        "interval": {"last_in_place": list(wilson_interval(last_in_place, len(rows)))},
        "frames": [
            {
                "latent_frame": (given_frames - 1) // FRAMES_A_LATENT + 1 + index,
                "psnr": error.psnr,
                "in_place": float(share),
            }
            for index, (error, share) in enumerate(zip(errors, shares))
        ],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(result, indent=2))
    return result
