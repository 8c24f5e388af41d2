"""Videos of a checkpoint, while its run goes on: what `videoar samples` does.

videoar samples --run runs/ucf101-l                                    of the newest checkpoint
videoar samples --run runs/ucf101-l --checkpoint step-4000 --per-prompt 4

RUN/samples/step-4000/     clips/ (an mp4 a video, prompts.csv), contact.mp4 and contact.webp (all of them in one), samples.json (scores)
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from evaluation.fvd_protocol import evaluate_fvd
from evaluation.media import read_video
from evaluation.shapes import ATTRIBUTES
from evaluation.videos import read_table, score_videos
from inference.generate import generate_folder
from inference.grid import grid
from inference.pipeline import VideoARPipeline
from inference.prompt_file import Prompt, read_prompts
from parallel import checkpoint as checkpoints
from pretrain.config import PretrainConfig
from pretrain.export import export
from pretrain.model_card import Sampling, known_prompts
from pretrain.watching.best import best_checkpoint
from pretrain.watching.config import SamplesConfig
from tokenizer import settings
from tokenizer.errors import UserError
from tokenizer.files import write_whole
from tokenizer.receipts import temporary_folder
from tokenizer.video_file import write_video

RESULT = "samples.json"


def make_samples(run: Path, checkpoint: str | None = None, overrides: Sequence[str] = ()) -> Path:
    """Generates and scores videos of one checkpoint. Needs one process, whatever layout trains, and no part of the training.

    One model is in memory at a time: some three times the size of its float32 weights at the peak, while they are gathered.

    Args:
        run: the folder of a pretraining run.
        checkpoint: the name of one of its checkpoints, such as "step-4000", or "best"; None: the newest one.
        overrides: words of a command line, settings of `SamplesConfig` in the run's own's place.

    Returns:
        RUN/samples/step-N, which is left as it is if it is there already.

    Raises:
        UserError: it is no run, the checkpoint is missing, or a setting does not fit the model.
    """
    started = time.monotonic()
    config = read_config(run, overrides)
    folder = _checkpoint(run, checkpoint)
    common = checkpoints.load_common(folder)
    step = common["position"]["global_step"]
    out = run / "samples" / f"step-{step}"
    if (out / RESULT).exists():
        return out
    temporary = temporary_folder(out)
    try:
        model = temporary / "model"
        export(folder, model, verify=False, sampling=Sampling("no"))
        gc.collect()  # megatron's objects know each other
        pipe = VideoARPipeline.from_pretrained(model, config.device)
        prompts = _prompts(config, common)
        options = {"guidance": config.guidance, "temperature": config.temperature}
        clips = temporary / "clips"
        generate_folder(pipe, prompts, clips, None, config.per_prompt, config.seed, config.batch_size, **options)
        size, fps = pipe.size, pipe.fps
        del pipe
        frames = _contact_sheets(clips / "prompts.csv", temporary, config.per_prompt, fps)
        result = {
            **_place(common), "checkpoint": folder.name, "prompts": [prompt.text for prompt in prompts],
        }  # fmt: skip
        result["scores"], result["problems"] = _scores(config, clips, f"{size[0]}x{size[1]}x{frames}")
        result["seconds"] = round(time.monotonic() - started, 1)
        shutil.rmtree(model)
        write_whole(temporary / RESULT, json.dumps(result, indent=1))
        shutil.rmtree(out, ignore_errors=True)  # without a result it is nobody's
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def read_config(run: Path, overrides: Sequence[str] = ()) -> SamplesConfig:
    """The settings of a run's samples.

    Raises:
        UserError: the folder is no run, or a setting is wrong.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} is no pretraining run (config.yaml is missing): name the folder `out` of a run.")
    words = [f"--samples.{word[2:]}" if word.startswith("--") else word for word in overrides]
    config = settings.load(PretrainConfig, file, words).samples
    config.check_files()
    return config


def _checkpoint(run: Path, name: str | None) -> Path:
    newest = checkpoints.latest(run / "checkpoints")
    found = (
        newest if name is None else best_checkpoint(run) if name == "best" else run / "checkpoints" / Path(name).name
    )
    if found is None:
        raise UserError(f"{run} has no complete checkpoint{'' if name is None else f' {name}'} yet: wait for one.")
    return found


def _prompts(config: SamplesConfig, common: dict[str, Any]) -> list[Prompt]:
    if config.prompts is not None:
        return read_prompts(Path(config.prompts))[: config.count]
    trained = common["position"]["stage"] + (common["position"]["step"] > 0)
    known = known_prompts(common["export"], common["config"]["stages"][:trained])
    prompts = [Prompt(text) for text in islice(known, config.count)]
    if not prompts:
        raise UserError(
            "the clips have no captions that samples could be made of: name a file of them with samples.prompts."
        )
    return prompts


def _place(common: dict[str, Any]) -> dict[str, Any]:
    """Stage and steps, as a line of metrics.jsonl names them."""
    position, stages = common["position"], common["config"]["stages"]
    begun = position["step"] > 0
    stage = stages[position["stage"] if begun else position["stage"] - 1]
    step = position["step"] if begun else stage["steps"]
    return {"stage": stage["name"], "step": step, "global_step": position["global_step"]}


def _contact_sheets(table: Path, out: Path, columns: int, fps: float) -> int:
    """All clips in one, a row a prompt; returns the frames of each."""
    rows = read_table(table)
    clips = [read_video(Path(row["path"]))[0] for row in rows]
    captions = [row["caption"] for row in rows[::columns]]
    sheet = grid(captions, [clips[start : start + columns] for start in range(0, len(clips), columns)])
    for ending in ("mp4", "webp"):
        write_video(sheet, out / f"contact.{ending}", fps)
    return len(clips[0])


def _scores(config: SamplesConfig, clips: Path, shape: str) -> tuple[dict[str, float], list[str]]:
    """The scores, and a sentence for each that this checkpoint's clips can't have (an early stage's may be single frames)."""
    scores: dict[str, float] = {}
    problems = []
    try:
        if config.shapes:
            shares = score_videos(clips / "prompts.csv")
            scores |= {f"shapes_{name}": shares[name] for name in (*ATTRIBUTES, "all")}
        if config.fvd_real is not None:
            file, batch = clips.parent / "fvd.json", config.batch_size
            result = evaluate_fvd(
                config.fvd_real, file, config.i3d, clips, shape=shape, batch_size=batch, device=config.device
            )
            assert result is not None  # one process
            scores["fvd"] = result["fvd"]
    except UserError as error:
        problems.append(str(error))
    return scores, problems


def sampled_steps(out: Path) -> dict[int, Path]:
    """The finished sets of a run: global step -> folder, oldest first."""
    found = {}
    for folder in (out / "samples").glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", folder.name)
        if match and (folder / RESULT).is_file():
            found[int(match.group(1))] = folder
    return dict(sorted(found.items()))
