"""README.md of an exported model: what it is, what it was trained on and how well, a sample, and how to load it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from data_pipelines.codes import MANIFEST, CodeDataset, Manifest
from inference.config import ModelConfig
from inference.pipeline import VideoARPipeline
from inference.weight_files import WeightFiles
from tokenizer.errors import UserError
from tokenizer.files import write_whole

CARD, PICTURE = "README.md", "sample.gif"
SMALL = 100_000_000
"""Parameters up to which a sample is made unasked: seconds on a CPU."""


@dataclass(frozen=True)
class Sampling:
    """The card's sample.

    Args:
        show: "yes", "no", or "auto": where the model is small and a prompt is at hand.
        prompt: what it shows; None: the first caption of the last stage's clips, or the first class.
        seed: of its noise.
    """

    show: Literal["auto", "yes", "no"] = "auto"
    prompt: str | None = None
    seed: int = 0


def write_card(
    model_dir: Path, common: Mapping[str, Any], checkpoint: Path, sampling: Sampling, device: str | torch.device = "cpu"
) -> None:
    """Writes README.md, and a sample beside it, into a folder that is a whole model but for them.

    Args:
        model_dir: config.json, the weights and tokenizer/.
        common: of the checkpoint (see `parallel.checkpoint.load_common`).
        checkpoint: its folder; metrics.jsonl is looked for in the run's folder above it.
        sampling: of the sample.
        device: where the sample is made.

    Raises:
        UserError: a sample was asked for and can't be made.
    """
    config, position = common["config"], common["position"]
    model = ModelConfig.from_dict(common["model"])
    stages = config["stages"][: position["stage"] + (position["step"] > 0)]
    sample = _sample(model_dir, model, common["export"], stages, sampling, device)
    sections = [
        _front(model),
        _network(model, common["export"], WeightFiles(model_dir)),
        sample,
        _loading(model),
        _data(stages),
        _training(config, stages, position),
        _metrics(checkpoint, config, position["global_step"]),
        "## Licence\n\nNot stated. Whoever publishes this model states the licence here and under `license` above.\n",
    ]
    write_whole(model_dir / CARD, "\n".join(sections))


def _front(model: ModelConfig) -> str:
    kind = "class-to-video" if model.num_classes else "text-to-video"
    # Hugging Face knows no tag for classes
    tag = "" if model.num_classes else f"pipeline_tag: {kind}\n"
    return (
        f"---\nlibrary_name: videoar\n{tag}tags: [videoar, {kind}]\nlicense: other\n---\n\n"
        f"# VideoAR, {_count(model.parameter_count())} parameters, {kind}\n\n"
        "A visual-autoregressive video model: next-frame and next-scale prediction of bits (*VideoAR*, Ji et al., 2026).\n"
    )


def _network(model: ModelConfig, export: Mapping[str, Any], weights: WeightFiles) -> str:
    height, width = (16 * side for side in model.schedule.grid)
    dtypes = sorted({str(weights[name].dtype).removeprefix("torch.") for name in weights.shapes})
    rows = {
        "layers x width, heads": f"{model.num_layers} x {model.hidden_size}, {model.num_attention_heads}",
        "parameters": f"{model.parameter_count():,}",
        "stored as": ", ".join(dtypes),
        "clips": f"{1 + 4 * (model.num_frames - 1)} frames of {height}x{width} at {model.fps:g} frames a second",
        "scales": " ".join(f"{h}x{w}" for h, w in model.scales),
        "bits a token": str(model.bits),
        "rotary positions, window": f"{model.rope}, {model.window or 'all frames'}",
        "condition": f"{model.num_classes} classes" if model.num_classes else f"text encoder `{_encoder(export)}`",
        "tokenizer": f"`{export['tokenizer_fingerprint']}`",
    }
    return "## Network\n\n" + _table(("", ""), rows.items())


def _encoder(export: Mapping[str, Any]) -> str:
    """Its specification without the folders of this machine."""
    kind, _, folder = export["text_encoder"].partition(":")
    return f"{kind}:{Path(folder).name}" if folder else kind


def _sample(
    model_dir: Path, model: ModelConfig, export: Mapping[str, Any], stages: list[Any], sampling: Sampling,
    device: str | torch.device,
) -> str:  # fmt: skip
    title = "## Sample\n\n"
    if sampling.show == "no":
        return title + "None was asked for.\n"
    if sampling.show == "auto" and model.parameter_count() > SMALL:
        return title + "None was made: the model is large. `videoar export --sample yes` makes one.\n"
    try:
        prompt = sampling.prompt or next(known_prompts(export, stages), None)
        if prompt is None:
            raise UserError("no caption is at hand to show: give one with --sample-prompt.")
        pipe = VideoARPipeline.from_pretrained(model_dir, device)
        guidance = "ucf" if model.num_classes else "t2v"
        pipe(prompt, guidance=guidance, seed=sampling.seed).save(model_dir / PICTURE)
    except UserError as error:
        if sampling.show == "yes":
            raise
        return title + f"None was made: {error}\n"
    return f"{title}![{prompt}]({PICTURE})\n\n`{prompt}`, seed {sampling.seed}, guidance `{guidance}`, temperature 1.\n"


def known_prompts(export: Mapping[str, Any], stages: Sequence[Any]) -> Iterator[str]:
    """All classes, or the different captions of the last stage's validation or training clips.

    Args:
        export: of the checkpoint's `common`.
        stages: the settings of those that were trained in, as dictionaries.
    """
    if export.get("class_names"):
        yield from export["class_names"]
        return
    last, seen = stages[-1] if stages else {"validation": None, "codes": []}, {""}
    for folder in filter(None, (last["validation"], *(source["dir"] for source in last["codes"]))):
        clips = CodeDataset(folder, bucket=0) if (Path(folder) / MANIFEST).is_file() else ()
        for row in range(len(clips)):
            caption = clips[row]["caption"].strip()
            if caption not in seen:
                seen.add(caption)
                yield caption


def _loading(model: ModelConfig) -> str:
    call = 'pipe("A_CLASS", guidance="ucf", seed=0)' if model.num_classes else 'pipe("a prompt", seed=0)'
    return (
        "## Use\n\n```python\nfrom inference import VideoARPipeline\n\n"
        f'pipe = VideoARPipeline.from_pretrained("THIS_FOLDER")\n{call}.save("clip.mp4")\n```\n\n'
        "or `videoar generate --model THIS_FOLDER --prompt TEXT --out clip.mp4`.\n"
    )


def _data(stages: list[Any]) -> str:
    rows = []
    for stage in stages:
        for source in stage["codes"]:
            frames = "all" if source["num_frames"] is None else str(1 + 4 * (source["num_frames"] - 1))
            # two levels name a set of codes; the rest is a machine's business
            name = "/".join(Path(source["dir"]).parts[-2:])
            clips, shapes, manifest = _codes(source["dir"])
            rows.append((stage["name"], f"`{name}`", manifest, clips, shapes, frames, f"{source['proportion']:g}"))
    titles = ("stage", "codes", "manifest", "clips", "stored as", "first frames used", "proportion")
    return "## Data\n\n" + _table(titles, rows)


def _codes(folder: str) -> tuple[str, str, str]:
    """Number of clips, shapes, and the manifest's hash, as far as they can be told."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        return "?", "?", "not at hand at export"
    manifest = Manifest.read(folder)
    shapes = ", ".join(f"{bucket.clip_frames}x{bucket.height}x{bucket.width}" for bucket in manifest.buckets)
    return str(manifest.rows), shapes, f"`{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}`"


def _training(config: Mapping[str, Any], stages: list[Any], position: Mapping[str, Any]) -> str:
    lines = [f"## Training\n\n{position['global_step']} steps, seed {config['seed']}.\n"]
    names = ("global_batch_size", "p_mask", "condition_dropout", "token_weight")
    rows = []
    for index, stage in enumerate(stages):
        whole = index < position["stage"]
        steps = str(stage["steps"]) if whole else f"{position['step']} of {stage['steps']}"
        lr = config["optimizer"]["lr"] if stage["lr"] is None else stage["lr"]
        flips = stage["error_correction"]
        ratio = ", ".join(f"{key} {value:g}" for key, value in flips.items() if isinstance(value, int | float))
        rows.append((stage["name"], steps, f"{lr:g}", *(str(stage[name]) for name in names), ratio))
    titles = (
        "stage",
        "steps",
        "peak learning rate",
        "clips a step",
        "p_mask",
        "dropped conditions",
        "token weight",
        "flips",
    )
    lines.append(_table(titles, rows))
    rest = {"optimizer": config["optimizer"], "parallel": config["parallel"]}
    lines.append(f"```yaml\n{yaml.safe_dump(rest, sort_keys=False)}```\n")
    return "\n".join(lines)


def _metrics(checkpoint: Path, config: Mapping[str, Any], global_step: int) -> str:
    title = "## Validation\n\n"
    last = None
    for file in (checkpoint.absolute().parents[1] / "metrics.jsonl", Path(config["out"]) / "metrics.jsonl"):
        if file.is_file():
            last = _last_validation(file, global_step)
            break
    if last is None:
        return title + "No validation was recorded up to this checkpoint.\n"
    values = {name.removeprefix("validation/"): value for name, value in last.items() if name.startswith("validation/")}
    rows = [(name, f"{value:.4g}") for name, value in values.items() if isinstance(value, int | float)]
    return f"{title}Stage {last['stage']}, step {last['global_step']}; teacher-forced, on held-out clips.\n\n" + _table(
        ("", ""), rows
    )


def _last_validation(file: Path, global_step: int) -> dict[str, Any] | None:
    found = None
    for line in file.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # a line that a kill cut short
            continue
        if "validation/loss" in values and values["global_step"] <= global_step:
            found = values
    return found


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(titles)]
    lines += [("---",) * len(lines[0]), *(tuple(row) for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
