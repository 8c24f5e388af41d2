"""VBench: videos of its prompts under the names that it wants, its package on them where it is installed, and the table.

videoar evaluate vbench --model DIR --prompts VBench_full_info.json --out DIR
python -m torch.distributed.run --nproc-per-node 8 -m videoar evaluate vbench --device cuda ...     8 processes share the prompts

DIR/videos/PROMPT-0.mp4 ... -4.mp4     DIR/request.json: model, seeds, prompts
DIR/results/*_eval_results.json        DIR/vbench.json, vbench.md
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from evaluation.fvd_protocol import versions
from evaluation.vbench_prompts import VBenchPrompt, of_dimensions, read_suite
from evaluation.vbench_scores import DIMENSIONS, read_results, summarise, tables
from inference.generate import Given, clip_metadata
from inference.pipeline import VideoARPipeline
from tokenizer.data_parallel import Ranks, joined
from tokenizer.errors import UserError
from tokenizer.files import write_whole
from tokenizer.progress import Meter
from tokenizer.video_file import write_video

SAMPLES = 5
"""Of a prompt: VBench looks for the numbers 0 to 4."""
PAUSE = 1.0
"""Seconds between two looks for the videos of other processes."""


def evaluate_vbench(
    model: str | Path,
    prompts: str | Path,
    out: str | Path,
    dimensions: Sequence[str] = (),
    samples: int = SAMPLES,
    seconds: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    device: str = "cpu",
    generate_only: bool = False,
    **options: Any,
) -> dict[str, Any] | None:
    """Goes as far as it can: makes the videos that are missing, measures the dimensions that are, and writes the table.

    A video's seed follows from the prompt's place in the suite and the sample's number, so it is the same for any number of
    processes, any dimensions asked for, and after any interruption; with the same batch size and threads the files are equal, too. Every
    process under torchrun calls it.

    Args:
        model: an exported model, steered by text.
        prompts: see `evaluation.vbench_prompts.read_suite`.
        out: the folder; what it holds of the same request is kept.
        dimensions: to measure; none: all that the prompts are for.
        samples: videos a prompt. VBench advises 25 for temporal_flickering, of which its static filter picks 5.
        seconds: length of the videos; None: as trained.
        seed: of the first video.
        batch_size: videos at once.
        device: where the model and VBench run.
        generate_only: ends when the videos are there.
        options: of the pipeline's call.

    Returns:
        the result on the first process: {"summary": total, quality and semantic score, "scores", "missing", "request", "versions"};
        None on the others, and with `generate_only`.

    Raises:
        UserError: an input is wrong, `out` is of another request, or VBench is not installed and scores are missing.
    """
    out = Path(out)
    suite = read_suite(Path(prompts))
    wanted = list(dimensions) or [name for name in DIMENSIONS if any(name in one.dimensions for one in suite)]
    chosen = of_dimensions(suite, wanted) if wanted else suite  # a list of no dimension has videos, but no scores
    if samples < 1 or batch_size < 1 or not 0 <= seed < 2**62:
        raise UserError(
            f"{samples} samples in batches of {batch_size} with the seed {seed} are impossible: give 1 or more."
        )
    with joined(device) as ranks:
        pipe = VideoARPipeline.from_pretrained(model, ranks.device)
        if pipe.encoder is None:
            raise UserError(f"{model} is steered by classes: VBench needs a model that is steered by text.")
        frames = None if seconds is None else pipe.frames_for(seconds)
        texts = [prompt.text for prompt in suite]
        request = {
            "model": pipe.fingerprint, **pipe.metadata(), "prompts": texts, "samples": samples, "frames": frames, "seed": seed, **options,
        }  # fmt: skip
        if ranks.rank == 0:
            _claim(out, request)
        if ranks.size > 1:
            dist.barrier()  # nobody writes into a folder of something else
        _make(pipe, chosen, out, samples, frames, seed, batch_size, ranks, options)
        if ranks.rank:
            return None
        _wait(chosen, out, samples)
    del pipe  # VBench's own networks need the memory
    if generate_only:
        return None
    (out / "results").mkdir(exist_ok=True)
    problem = _measure(out, Path(prompts), wanted, device)
    result = _report(out, Path(model).name, wanted, request)
    if problem is not None:
        raise UserError(problem)
    return result


def _claim(out: Path, request: dict[str, Any]) -> None:
    """Raises UserError if the folder is of another request."""
    file = out / "request.json"
    if file.is_file():
        try:
            known = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} can't be read ({error}): name another folder.") from error
        now = json.loads(json.dumps(request))
        differing = sorted(key for key in {*known, *now} if known.get(key) != now.get(key))
        if differing:
            raise UserError(f"{out} was made with other values of {', '.join(differing)}: name another folder.")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and was not written by this command: name another folder.")
    (out / "videos").mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(request, indent=1))


def _make(
    pipe: VideoARPipeline,
    prompts: Sequence[VBenchPrompt],
    out: Path,
    samples: int,
    frames: int | None,
    seed: int,
    batch_size: int,
    ranks: Ranks,
    options: dict[str, Any],
) -> None:
    videos, model = out / "videos", pipe.fingerprint
    jobs = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    # of fixed members, whoever makes them and however often: pixels are rounded, and batch mates decide ties
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)][ranks.rank :: ranks.size]
    with Meter("VBench videos", len(jobs)) if ranks.rank == 0 else nullcontext() as meter:
        for batch in batches:
            missing = [not (videos / prompt.file_name(sample)).exists() for prompt, sample in batch]
            seeds = [seed + samples * prompt.index + sample for prompt, sample in batch]
            clips = _clips(pipe, [prompt.text for prompt, _ in batch], frames, seeds, options) if any(missing) else []
            for (prompt, sample), clip_seed, clip, wanted in zip(batch, seeds, clips, missing):
                if not wanted:
                    continue
                metadata = clip_metadata(pipe, model, prompt.text, clip_seed, clip, Given(), options)
                # VBench takes the ending of whatever it finds first in the folder: nothing else may lie there, not even for a moment
                staged = out / "writing" / f"{ranks.rank}.mp4"
                write_video(clip, staged, pipe.fps, metadata=metadata)
                staged.replace(videos / prompt.file_name(sample))
            if meter is not None:
                meter.advance(min(len(batch) * ranks.size, len(jobs) - meter.done))


def _clips(
    pipe: VideoARPipeline, texts: list[str], frames: int | None, seeds: list[int], options: dict[str, Any]
) -> list[np.ndarray]:
    with warnings.catch_warnings():
        # the prompts are VBench's: what the model can't read of them is cut
        warnings.filterwarnings("ignore", message="a prompt is cut")
        return pipe(prompt=texts, num_frames=frames, seed=seeds, batch_size=len(texts), **options).frames


def _wait(prompts: Sequence[VBenchPrompt], out: Path, samples: int) -> None:
    """Until the other processes are done; torchrun ends this one should one of them fail."""
    for prompt in prompts:
        for sample in range(samples):
            while not (out / "videos" / prompt.file_name(sample)).exists():
                time.sleep(PAUSE)
    shutil.rmtree(out / "writing", ignore_errors=True)


def _measure(out: Path, prompts: Path, wanted: Sequence[str], device: str) -> str | None:
    """Runs VBench on the dimensions without a score; a sentence where it can't be."""
    left = [name for name in wanted if name not in read_results(out / "results")]
    if not left:
        return None
    if importlib.util.find_spec("vbench") is None:
        return (
            f"the videos are in {out / 'videos'}, but VBench is not installed here: `pip install vbench` in an environment of its own (it "
            f"pins old versions), measure there, put its *_eval_results.json into {out / 'results'}, and repeat this command for the table."
        )
    vbench = importlib.import_module("vbench")
    info = prompts if prompts.suffix.lower() == ".json" else Path(str(vbench.__file__)).parent / "VBench_full_info.json"
    judge = vbench.VBench(device, str(info), str(out / "results"))
    for name in left:
        print(f"VBench: {name}", file=sys.stderr)
        try:
            # one at a time: a failure or a kill loses one dimension only
            judge.evaluate(videos_path=str(out / "videos"), name=name, dimension_list=[name])
        except Exception as error:  # of any of its many networks
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            return f"VBench failed on {name} ({reason}): mend that and repeat the command, which goes on from there."
    return None


def _report(out: Path, name: str, wanted: Sequence[str], request: dict[str, Any]) -> dict[str, Any]:
    scores = read_results(out / "results")
    result = {
        "summary": summarise(scores), "scores": scores, "missing": [one for one in DIMENSIONS if one not in scores],
        "asked_for": list(wanted), "request": request, "versions": versions() | {"vbench": _vbench_version()},
    }  # fmt: skip
    write_whole(out / "vbench.json", json.dumps(result, indent=1))
    write_whole(out / "vbench.md", tables(name, scores))
    return result


def _vbench_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vbench")
    except PackageNotFoundError:
        return "not installed"
