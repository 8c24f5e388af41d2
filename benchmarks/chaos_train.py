"""`videoar pretrain` under kills: a tiny network, two stages, two sources, a checkpoint every few steps."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.chaos_encode import VARIANTS
from benchmarks.chaos_scene import Scene
from benchmarks.kills import Life, content
from parallel.checkpoint import latest

VARYING = (
    "seconds", "tokens_per_second", "time", "data_wait", "mfu", "memory_gb", "productive_seconds", "goodput",
)  # fmt: skip
"""What of a line of metrics.jsonl is a matter of time."""


class TrainScene(Scene):
    """Trains on the codes of an encoding run.

    Args:
        folder: for everything.
        codes: of `EncodeScene`.
        tokenizer: that made them.
        steps: of the two stages.
        ranks: data-parallel processes; with more than one under torchrun.
        preloaded: see `Life`.
    """

    name = "train"

    def __init__(
        self,
        folder: Path,
        codes: Path,
        tokenizer: Path,
        steps: tuple[int, int],
        ranks: int = 1,
        preloaded: bool = False,
    ):
        super().__init__(folder, preloaded)
        self.steps, self.ranks = sum(steps), ranks
        self.kinds = ("process", "tree") if ranks == 1 else ("rank", "launcher", "tree")
        mixed = [{"dir": str(codes / variant), "proportion": share} for variant, share in zip(VARIANTS, (0.75, 0.25))]
        stage = {"global_batch_size": 4, "micro_batch_size": 2, "p_mask": 0.3}
        settings: dict[str, Any] = {
            "out": "named on the command line",
            "tokenizer": str(tokenizer),
            "network": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_text_length": 8},
            "optimizer": {"lr": 0.003, "warmup_steps": 2, "ema_decay": 0.9},
            "wandb": {"mode": "disabled"},
            "log_every": 1,
            "log_samples": True,
            "checkpoint_every": 6,
            "data_workers": 1,
            "stages": [
                {"name": "one", "codes": mixed, "steps": steps[0], **stage},
                {"name": "two", "codes": mixed[:1], "steps": steps[1], **stage},
            ],
        }
        self.settings = folder / "pretrain.yaml"
        self.settings.write_text(yaml.safe_dump(settings))

    def words(self, out: Path) -> list[str]:
        return ["pretrain", "--config", str(self.settings), "--out", str(out)]

    def events(self, out: Path) -> list[str]:
        come = ["config"] if (out / "config.yaml").exists() else []
        come += [f"step {number}" for number in range(1, _lines(out / "samples-0.jsonl") + 1)]
        for saving, step in _checkpoints(out):
            come += [f"saving {step}"] if saving else [f"saving {step}", f"saved {step}"]
        return come

    def kill(self, life: Life, kind: str, random: Random) -> bool:
        if kind == "rank":
            launcher = life.pid
            if not life.kill_one(lambda process: process.ppid() == launcher, random):
                return False
            life.wait()  # torchrun ends the others, then itself
            return True
        return life.kill_tree() if kind == "tree" else life.kill()

    def mark(self, out: Path) -> object:
        return _inode(out / "samples-0.jsonl")

    def where(self, out: Path, mark: object) -> tuple[str, str]:
        steps, newest = _lines(out / "samples-0.jsonl"), latest(out / "checkpoints")
        detail = f"{steps} of {self.steps} steps, {newest.name if newest else 'no checkpoint'}"
        if _inode(out / "samples-0.jsonl") in (None, mark):
            return "starting", detail
        if any(saving for saving, _ in _checkpoints(out)):
            return "writing a checkpoint", detail
        return "after the last step" if steps == self.steps else "training", detail

    def killed_problems(self, out: Path) -> list[str]:
        """Each step so far has been logged once, with the clips of the undisturbed run, up to the newest checkpoint at least."""
        found, newest = [], latest(out / "checkpoints")
        saved = int(newest.name.split("-")[1]) if newest else 0
        for rank in range(self.ranks):
            name = f"samples-{rank}.jsonl"
            lines, expected = _whole_lines(out / name), _whole_lines(self.folder / "undisturbed" / name)
            if lines != expected[: len(lines)] or len(lines) < saved:
                found.append(
                    f"{name} has {len(lines)} lines that are not the undisturbed run's first ones ({saved} steps saved)"
                )
        return found

    def problems(self, out: Path) -> list[str]:
        whole, found = self.folder / "undisturbed", []
        for rank in range(self.ranks):
            name = f"samples-{rank}.jsonl"
            if _whole_lines(out / name) != _whole_lines(whole / name):
                found.append(f"{name}: another order")
        if _numbers(out) != _numbers(whole):
            found.append("metrics.jsonl: other losses")
        found += [f"{folder.name}: {problem}" for folder in (whole, out) if (problem := _lost_time(folder))]
        one, other = content(whole), content(out)
        found += [f"{name} is left over" for name in other.keys() - one.keys()]
        found += [f"{name} is missing" for name in one.keys() - other.keys()]
        weights = [name for name in one if name.endswith(".distcp")]
        found += [f"{name}: other weights" for name in weights if one[name] != other.get(name)]
        return found


def _inode(file: Path) -> int | None:
    """A number that changes when a file is written anew; None: there is none."""
    try:
        return os.stat(file).st_ino
    except FileNotFoundError:
        return None


def _lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _whole_lines(file: Path) -> list[str]:
    """Without one that a kill has cut short."""
    return file.read_text().split("\n")[:-1] if file.exists() else []


def _numbers(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in VARYING} for line in lines]


def _lost_time(out: Path) -> str | None:
    """What is wrong with the productive seconds: they are those of the steps that count, each once, whatever was killed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    total, counted = sum(line["seconds"] for line in lines), lines[-1]["productive_seconds"]
    return f"{counted} productive seconds of {total:.3f} in steps" if abs(total - counted) > 0.05 else None


def _checkpoints(out: Path) -> list[tuple[bool, int]]:
    """(whether it is still being written, its step)."""
    found = [re.fullmatch(r"(\.tmp-)?step-(\d+)", folder.name) for folder in (out / "checkpoints").glob("*")]
    return [(match.group(1) is not None, int(match.group(2))) for match in found if match]
