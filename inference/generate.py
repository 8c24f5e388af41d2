"""Prompts to video files: one file, a grid in one file, or a folder with a CSV that says what each video is."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.grid import grid, grid_size
from inference.pipeline import VideoARPipeline
from inference.prompt_file import Prompt, check_length
from inference.video_io import read_video
from tokenizer.errors import UserError
from tokenizer.progress import Meter
from tokenizer.receipts import finished, new_folder
from tokenizer.version import program_version
from tokenizer.video_file import write_frames, write_video

FORMATS = ("mp4", "gif", "frames")
"""Of the videos in a folder: files, or a folder of .png frames each."""


@dataclass(frozen=True)
class Given:
    """Frames to begin with.

    Args:
        image: the first frame's file.
        video: a file to go on from.
        video_frames: use only its first so many frames; None: its end, as many as fit.
    """

    image: Path | None = None
    video: Path | None = None
    video_frames: int | None = None

    def options(self, pipe: VideoARPipeline) -> dict[str, Any]:
        """For the pipeline's call.

        Raises:
            UserError: the video has fewer frames than are to be used.
        """
        if self.video_frames is None:
            return {"image": self.image, "video": self.video}
        if self.video is None or self.video_frames < 1:
            raise UserError(f"{self.video_frames} frames of a video were asked for: give --video and at least 1 frame.")
        frames = read_video(self.video, pipe.size, pipe.fps)[: self.video_frames]
        if len(frames) < self.video_frames:
            raise UserError(
                f"{self.video} has {len(frames)} frames at {pipe.fps:g} a second, not {self.video_frames}: ask for fewer."
            )
        return {"video": frames}

    def metadata(self) -> dict[str, Any] | None:
        """What a file says about it: the kind and the hash of the file's bytes.

        Raises:
            UserError: the file is missing or unreadable.
        """
        file = self.image or self.video
        if file is None:
            return None
        try:
            with open(file, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"the file {file} can't be read ({error.strerror}): check the path.") from error
        kind = "image" if self.image else "video"
        return {"kind": kind, "sha256": digest} | ({"frames": self.video_frames} if self.video_frames else {})


def check_prompts(pipe: VideoARPipeline, prompts: Sequence[str]) -> None:
    """Raises UserError for the first prompt that is empty, too long for the model, or no class of it."""
    for prompt in prompts:
        check_length(prompt, "the prompt")
        if pipe.encoder is None:
            if prompt not in (pipe.class_names or ()):
                known = ", ".join((pipe.class_names or [])[:5]) or "numbers only, from Python"
                raise UserError(f"the class '{prompt[:60]}' does not exist: the model knows {known}, ...")
            continue
        tokens = len(pipe.encoder.encode(prompt))
        if not 1 <= tokens <= pipe.config.max_text_length:
            raise UserError(
                f"the prompt '{prompt[:60]}' has {tokens} text tokens: the model takes 1 to {pipe.config.max_text_length}; "
                "write it otherwise."
            )


def generate_file(
    pipe: VideoARPipeline,
    prompt: str,
    out: Path,
    frames: int | None,
    seed: int,
    given: Given | None = None,
    **options: Any,
) -> Path:
    """Generates one video into `out`.

    Args:
        pipe: the model.
        prompt: what to show.
        out: an .mp4, .gif or .png file, or a folder for .png frames where the name has no ending.
        frames: its length, 1+4n; None: as trained.
        seed: of its noise.
        given: frames to begin with.
        options: of the pipeline's call.

    Raises:
        UserError: the prompt does not fit the model, or an argument is wrong.
    """
    given = given or Given()
    check_prompts(pipe, [prompt])
    _check_target(out)
    clip = pipe(prompt=prompt, num_frames=frames, seed=seed, progress=True, **given.options(pipe), **options).frames
    metadata = clip_metadata(pipe, pipe.fingerprint, prompt, seed, clip, given, options)
    _write(clip, out, pipe.fps, metadata, as_frames=not out.suffix)
    return out


def generate_grid(
    pipe: VideoARPipeline,
    prompts: Sequence[str],
    out: Path,
    frames: int | None,
    samples: int,
    seed: int,
    batch_size: int,
    given: Given | None = None,
    **options: Any,
) -> Path:
    """Generates `samples` videos of every prompt into one file: a row a prompt, a column a sample.

    Args:
        out: an .mp4 or .gif; or a .png, which shows the middle frame of each video.
        pipe, frames, given, options: as in `generate_file`.
        prompts: what to show; each has a row.
        samples, seed, batch_size: as in `generate_folder`.

    Raises:
        UserError: a prompt does not fit the model, or the grid would be too large.
    """
    given = given or Given()
    check_prompts(pipe, prompts)
    _check_target(out)
    if not out.suffix:
        raise UserError(f"a grid is one file, {out} has no ending: name an .mp4, .gif or .png.")
    grid_size(len(prompts), samples, *pipe.size)
    jobs = [prompt for prompt in prompts for _ in range(samples)]
    clips: list[np.ndarray] = []
    with Meter("generating", len(jobs)) as meter:
        for batch, _ in _clips(pipe, jobs, frames, seed, batch_size, given, options):
            clips += [clip[len(clip) // 2][None] if out.suffix.lower() == ".png" else clip for clip in batch]
            meter.advance(len(batch))
    rows = [clips[start : start + samples] for start in range(0, len(clips), samples)]
    metadata = clip_metadata(pipe, pipe.fingerprint, list(prompts), seed, clips[0], given, options)
    sheet = grid(prompts, rows)
    write_video(
        sheet,
        out,
        pipe.fps,
        metadata=metadata | {"grid": [len(prompts), samples], "seed": [seed, seed + len(jobs) - 1]},
    )
    return out


def generate_folder(
    pipe: VideoARPipeline,
    prompts: Sequence[Prompt],
    out: Path,
    frames: int | None,
    samples: int,
    seed: int,
    batch_size: int,
    given: Given | None = None,
    format: str = "mp4",
    **options: Any,
) -> Path:
    """Generates `samples` videos of every prompt into a folder with prompts.csv (path, caption, seed);
    the same call again finds them done.

    Args:
        pipe, frames, given, options: as in `generate_file`.
        prompts: what to show.
        out: the folder to make; it appears when all videos are there.
        samples: videos a prompt.
        seed: of the first video; the others count on.
        batch_size: videos at once.
        format: one of `FORMATS`.

    Raises:
        UserError: a prompt does not fit the model, or `out` is there already and holds other videos.
    """
    given = given or Given()
    if format not in FORMATS:
        raise UserError(f"videos can't be written as {format}: choose one of {', '.join(FORMATS)}.")
    texts = [prompt.text for prompt in prompts]
    check_prompts(pipe, texts)
    jobs = [text for text in texts for _ in range(samples)]
    names = _names(prompts, samples, "" if format == "frames" else f".{format}")
    model = pipe.fingerprint
    arguments = {
        "kind": "generated videos", "prompts": jobs, "names": names, "seed": seed, "frames": frames, "batch_size": batch_size,
        "given": given.metadata(), "model": model, **options, **pipe.numbers, **pipe.metadata(),
    }  # fmt: skip
    if finished(out, arguments) is not None:
        return out  # a chain of commands that was killed may ask again
    with new_folder(out, arguments) as (folder, receipt), Meter("generating", len(jobs)) as meter:
        rows: list[dict[str, Any]] = []
        for clips, seeds in _clips(pipe, jobs, frames, seed, batch_size, given, options):
            for clip, clip_seed in zip(clips, seeds):
                prompt, name = jobs[len(rows)], names[len(rows)]
                metadata = clip_metadata(pipe, model, prompt, clip_seed, clip, given, options)
                _write(clip, folder / name, pipe.fps, metadata, as_frames=format == "frames")
                rows.append({"path": name, "caption": prompt, "seed": clip_seed})
            meter.advance(len(clips))
        with open(folder / "prompts.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["path", "caption", "seed"])
            writer.writeheader()
            writer.writerows(rows)
        receipt["videos"] = len(rows)
    return out


def _clips(
    pipe: VideoARPipeline, jobs: list[str], frames: int | None, seed: int, batch_size: int, given: Given, options: Any
) -> Iterator[tuple[list[np.ndarray], list[int]]]:
    """Batches of clips with their seeds."""
    start_from = given.options(pipe)
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        seeds = [seed + start + i for i in range(len(part))]
        yield (
            pipe(prompt=part, num_frames=frames, seed=seeds, batch_size=batch_size, **start_from, **options).frames,
            seeds,
        )


def _names(prompts: Sequence[Prompt], samples: int, ending: str) -> list[str]:
    names = []
    for prompt in prompts:
        for sample in range(samples):
            own = prompt.name if samples == 1 or prompt.name is None else f"{prompt.name}-{sample}"
            names.append(f"{len(names):05d}{ending}" if own is None else f"{own}{ending}")
    folded = [name.casefold() for name in (*names, "prompts.csv", "receipt.json")]
    if len(set(folded)) < len(folded):
        twice = next(name for name in names if folded.count(name.casefold()) > 1)
        raise UserError(f"two files would be called '{twice}': give the prompts other names.")
    return names


def clip_metadata(
    pipe: VideoARPipeline, model: str, prompt: str | list[str], seed: int, clip: np.ndarray, given: Given, options: Any
) -> dict[str, Any]:
    """What makes the same video again."""
    return {
        "program": program_version(), "model": model, "tokenizer": pipe.tokenizer.fingerprint, "prompt": prompt, "seed": seed,
        "frames": len(clip), "size": list(clip.shape[1:3]), "fps": pipe.fps, "given": given.metadata(), **options, **pipe.numbers,
    }  # fmt: skip


def _check_target(out: Path) -> None:
    """Before the work, not after it."""
    if out.suffix and out.suffix.lower() not in (".mp4", ".gif", ".png"):
        raise UserError(
            f"{out} is no kind of file that videos are written to: use .mp4, .gif, .png, or a folder's name."
        )
    if out.is_dir() and (out.suffix or any(out.iterdir())):
        raise UserError(f"{out} is a folder that is there already: delete it or give another name.")
    if not out.suffix and out.is_file():
        raise UserError(f"{out} is a file, which frames can't be written into: give another name.")


def _write(clip: np.ndarray, out: Path, fps: float, metadata: dict[str, Any], as_frames: bool) -> None:
    if as_frames:
        write_frames(clip, out, metadata)
    else:
        write_video(clip, out, fps, metadata=metadata)
