"""Prompts to video files: one file, or a folder of them with a CSV that says what each one is."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from inference.checkpoint import fingerprint
from inference.pipeline import VideoARPipeline
from inference.video_io import read_video
from tokenizer.errors import UserError
from tokenizer.progress import Meter
from tokenizer.receipts import finished, new_folder
from tokenizer.video_file import write_video


def read_prompts(file: Path) -> list[str]:
    """The prompts of a CSV with a column caption, or of a text file with one a line.

    Raises:
        UserError: the file is missing, has no column caption, or holds no prompt.
    """
    if not file.is_file():
        raise UserError(f"the prompt file {file} does not exist: give a CSV with a column caption, or a text file.")
    if file.suffix == ".csv":
        with open(file, newline="") as lines:
            reader = csv.DictReader(lines)
            if "caption" not in (reader.fieldnames or []):
                raise UserError(f"the prompt file {file} has no column caption but {reader.fieldnames}: add one.")
            prompts = [row["caption"].strip() for row in reader]
    else:
        prompts = [line.strip() for line in file.read_text().splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"the prompt file {file} holds no prompt: write at least one.")
    return prompts


def generate_file(
    pipe: VideoARPipeline,
    prompt: str,
    out: Path,
    frames: int | None,
    seed: int,
    video: Path | None = None,
    video_frames: int | None = None,
    **options: Any,
) -> Path:
    """Generates one video into `out`.

    Args:
        pipe: the model.
        prompt: what to show.
        out: an .mp4, .gif or .png file.
        frames: its length, 1+4n; None: as trained.
        seed: of its noise.
        video: a file to go on from.
        video_frames: use only its first so many frames.
        options: of the pipeline's call.
    """
    start: Any = video
    if video is not None and video_frames is not None:
        start = read_video(video, pipe.size, pipe.fps)[:video_frames]
    clip = pipe(prompt=prompt, num_frames=frames, seed=seed, video=start, **options).frames
    out.parent.mkdir(parents=True, exist_ok=True)
    write_video(clip, out, pipe.fps)
    return out


def generate_folder(
    pipe: VideoARPipeline,
    prompt_file: Path,
    out: Path,
    frames: int | None,
    samples: int,
    seed: int,
    batch_size: int,
    **options: Any,
) -> Path:
    """Generates `samples` videos of every prompt into a folder with prompts.csv (path, caption, seed);
    the same call again finds them done.

    Args:
        pipe, frames, options: as in `generate_file`.
        prompt_file: see `read_prompts`.
        out: the folder to make; it appears when all videos are there.
        samples: videos a prompt.
        seed: of the first video; the others count on.
        batch_size: videos at once.

    Raises:
        UserError: `out` is there already and holds other videos.
    """
    jobs = [prompt for prompt in read_prompts(prompt_file) for _ in range(samples)]
    arguments = {
        "kind": "generated videos", "prompts": jobs, "seed": seed, "frames": frames, "batch_size": batch_size,
        "model": fingerprint(pipe.model), **options, **pipe.metadata(),
    }  # fmt: skip
    if finished(out, arguments) is not None:
        return out  # a chain of commands that was killed may ask again
    with new_folder(out, arguments) as (folder, receipt), Meter("generating", len(jobs)) as meter:
        rows = []
        for start in range(0, len(jobs), batch_size):
            prompts = jobs[start : start + batch_size]
            seeds = [seed + start + i for i in range(len(prompts))]
            clips = pipe(prompt=prompts, num_frames=frames, seed=seeds, **options).frames
            for prompt, clip_seed, clip in zip(prompts, seeds, clips):
                name = f"{len(rows):05d}.mp4"
                write_video(clip, folder / name, pipe.fps)
                rows.append({"path": name, "caption": prompt, "seed": clip_seed})
            meter.advance(len(prompts))
        with open(folder / "prompts.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["path", "caption", "seed"])
            writer.writeheader()
            writer.writerows(rows)
        receipt["videos"] = len(rows)
    return out
