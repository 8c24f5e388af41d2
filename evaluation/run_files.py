"""A pretraining run's folder as its files tell it, at any moment: while it is written to, after a kill, and without the code that trains.

metrics.jsonl (a line every few steps), events.jsonl, heartbeats/, run.json (stages and their costs), best.json, checkpoints/, samples/
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from evaluation.json_lines import whole_lines
from tokenizer.errors import UserError

SIGNS = ("events.jsonl", "heartbeats", "run.json")
"""What a run has, and no other folder."""
LIVES = ("start", "finished", "stopped", "failed")
"""Events of a process's life; all but the first are its last words."""


@dataclass(frozen=True)
class SampleSet:
    """Videos of one checkpoint.

    Args:
        folder: with clips/ and contact.mp4.
        global_step: of the checkpoint.
        stage: that it is of.
        scores: by name; empty where none were asked for.
    """

    folder: Path
    global_step: int
    stage: str
    scores: dict[str, float]


class PretrainRun:
    """Reads what is there; what is not there yet, or only half, is left out.

    Args:
        path: the folder `out` of `videoar pretrain`.

    Raises:
        UserError: it is no such folder.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        metrics = self.lines("metrics.jsonl")
        old = (self.path / "config.yaml").is_file() and metrics and "global_step" in metrics[0]
        if not old and not any((self.path / name).exists() for name in SIGNS):
            inner = next((child for child in sorted(self.path.glob("*")) if (child / SIGNS[0]).is_file()), None)
            name = f"{inner}" if inner else "the folder `out` of `videoar pretrain`"
            raise UserError(f"{path} is no pretraining run: name {name}.")
        self.metrics, self.events = metrics, self.lines("events.jsonl")
        self.facts, self.best = self.json("run.json"), self.json("best.json")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The records of a file of JSON lines; one that is still being written, or was cut short, is left out."""
        file = self.path / name
        if not file.is_file():
            return []
        return [line for line in whole_lines(file) if isinstance(line, dict)]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file; empty where it is missing or damaged."""
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def heartbeats(self) -> list[dict[str, Any]]:
        """The newest one of each process, by rank."""
        files = [file.name for file in (self.path / "heartbeats").glob("rank-*.json")]
        beats = [beat for name in files if (beat := self.json(f"heartbeats/{name}"))]
        return sorted(beats, key=lambda beat: beat["rank"])

    @property
    def training(self) -> list[dict[str, Any]]:
        """The lines of training steps, without validations and samples."""
        return [line for line in self.metrics if "loss" in line]

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(global step, folder) of the complete ones, oldest first."""
        found = []
        for folder in (self.path / "checkpoints").glob("step-*"):
            match = re.fullmatch(r"step-(\d+)", folder.name)
            if match and (folder / "complete.json").is_file():
                found.append((int(match.group(1)), folder))
        return sorted(found)

    def samples(self) -> list[SampleSet]:
        """The finished sets, oldest first."""
        sets = []
        for folder in (self.path / "samples").glob("step-*"):
            result = self.json(f"samples/{folder.name}/samples.json")
            if result and re.fullmatch(r"step-\d+", folder.name):
                sets.append(SampleSet(folder, result["global_step"], result["stage"], result.get("scores", {})))
        return sorted(sets, key=lambda one: one.global_step)


def last_life(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest event of `LIVES`; None: nobody has started yet."""
    return next((event for event in reversed(events) if event.get("event") in LIVES), None)


def lives(pid: int, beat: float) -> bool:
    """Whether the process of this machine that gave a heartbeat is there; another one of its number began later.

    Args:
        pid: its number.
        beat: when it gave it, in seconds since the epoch.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() < beat + 2
    except psutil.Error:
        return False
