"""The demo: every step from video files to a report on this machine, each one a `videoar` command that anybody can type."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.local import CommandFailed, videoar_command
from cluster.steps import Ledger, Step
from data_pipelines.moving_shapes import validation_specs
from tokenizer.errors import UserError

SPLITS = ("train", "validation")
HOUSE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class DemoConfig:
    """The demo's sizes.

    Args:
        clips: training clips.
        validation_clips: clips that no training sees; the ruler and the tokenizer are measured on them.
        seed: of the corpus and of the generated videos.
        frames: of each clip, 1+4n.
        size: height and width of the clips.
        variants: HEIGHTxWIDTHxFRAMES that the clips are encoded at.
        latents: store latents beside the bits, so that re-quantised targets are exact.
        shard_size: the largest raw shard; encoding hands out work by the shard.
        tokenizer_config: recipe of the tokenizer, from the project's root.
        pretrain_config: recipe of the transformer, from the project's root.
        processes: of the pretraining, under torchrun.
        samples: videos a held-out prompt.
        guidance: of the generated videos: ucf, t2v or a number.
        temperature: of their bits.
        given_frames: of the video that the continuation sample goes on from, 1+4n.
    """

    clips: int = 1600
    validation_clips: int = 192
    seed: int = 0
    frames: int = 17
    size: int = 64
    variants: tuple[str, ...] = ("32x32x17", "64x64x17")
    latents: bool = True
    shard_size: str = "2mb"
    tokenizer_config: str = "tokenizer/configs/demo.yaml"
    pretrain_config: str = "pretrain/configs/demo/pretrain.yaml"
    processes: int = 2
    samples: int = 6
    guidance: str = "t2v"
    temperature: float = 1.0
    given_frames: int = 9


def demo(config: DemoConfig, out: Path) -> None:
    """Runs every step that is not done yet and writes `report.html` and `metrics.json` into `out`.

    Args:
        config: the sizes.
        out: the folder of the run.

    Raises:
        UserError: a step failed, or `out` holds a run with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    steps = plan(config, out)
    ledger = Ledger(out)
    if changed := ledger.changed(steps):
        raise UserError(
            f"{out} holds a demo with other settings (step {changed[0]}): delete it or name another folder with --out."
        )
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: sys.exit(143))  # leaves through `run`, which ends the step's processes
    try:
        ledger.walk(steps)
    except CommandFailed as error:
        raise UserError(f"the demo stopped at {error}") from error
    print(f"the report is {out / 'report.html'}, the numbers are in {out / 'metrics.json'}", flush=True)


def plan(config: DemoConfig, out: Path) -> list[Step]:
    """All steps, in order."""
    corpus, shards, codes = out / "corpus", out / "shards", out / "codes"
    tokenizer_config, pretrain_config = HOUSE / config.tokenizer_config, HOUSE / config.pretrain_config

    def videoar(*words: object, processes: int = 1) -> tuple[str, ...]:
        return tuple(videoar_command(*map(str, words), processes=processes))

    def encode(split: str) -> tuple[str, ...]:
        return videoar(
            "encode", "--shards", shards / split, "--tokenizer", out / "tokenizer", "--out", codes / split,
            "--variants", json.dumps(config.variants), "--latents", json.dumps(config.latents),
        )  # fmt: skip

    def generate(*words: object) -> tuple[str, ...]:
        return videoar(
            "generate", "--model", out / "model", "--frames", config.frames, "--seed", config.seed,
            "--guidance", config.guidance, "--temperature", config.temperature, *words,
        )  # fmt: skip

    def train_tokenizer() -> tuple[str, ...]:
        return videoar(
            "tokenizer", "train", "--config", tokenizer_config, "--shards", shards / "train", "--out", out / "tokenizer"
        )

    def shapes(videos: Path, name: str) -> tuple[str, ...]:
        return videoar("evaluate", "shapes", "--videos", videos, "--out", out / "scores" / f"{name}.json")

    # a clip that no training has seen gives the image and the beginning that two samples go on from
    given = corpus / "videos" / "validation" / "00000.mp4"
    caption = validation_specs(config.validation_clips, config.seed, config.size, config.frames)[0].combination.caption
    size = ("--size", config.size, "--frames", config.frames)
    samples, reconstructions = out / "samples", out / "reconstructions"
    commands = {
        "corpus": [
            videoar(
                "corpus", "--out", corpus, "--clips", config.clips, "--validation", config.validation_clips, "--seed", config.seed, *size
            )
        ],
        "shards": [
            videoar(
                "shards", "--videos", corpus / f"{split}.csv", "--out", shards / split,
                "--shard-size", config.shard_size, "--min-frames", config.frames,
            )
            for split in SPLITS
        ],
        "tokenizer": [train_tokenizer()],
        "encode": [encode(split) for split in SPLITS],
        "pretrain": [
            videoar("pretrain", "--config", pretrain_config, "--root", out, processes=config.processes)
        ],
        "export": [
            videoar("export", "--checkpoint", out / "pretrain", "--tokenizer", out / "tokenizer", "--out", out / "model", "--verify")
        ],
        "generate": [
            generate("--prompt-file", corpus / "prompts.csv", "--samples", config.samples, "--out", samples / "prompts"),
            generate("--prompt", caption, "--image", given, "--out", samples / "image_to_video.mp4"),
            generate("--prompt", caption, "--video", given, "--video-frames", config.given_frames, "--out", samples / "continuation.mp4"),
        ],
        "evaluate": [
            videoar(
                "evaluate", "reconstruction", "--tokenizer", out / "tokenizer", "--videos", corpus / "validation.csv",
                "--out", reconstructions, *size,
            ),
            shapes(corpus / "validation.csv", "ruler"),
            shapes(reconstructions / "reconstructed.csv", "reconstructed"),
            shapes(samples / "prompts" / "prompts.csv", "generated"),
        ],
        "report": [videoar("report", "--run", out)],
    }  # fmt: skip
    inputs = {"tokenizer": (tokenizer_config,), "pretrain": (pretrain_config,)}
    threads = {"pretrain": 1}  # each process of the pretraining has a core of its own
    return [Step(name, tuple(words), inputs.get(name, ()), threads.get(name)) for name, words in commands.items()]
