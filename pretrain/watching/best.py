"""The best checkpoint of a run, which stays whatever `keep` says: `best.json`.

    {"metric": "validation/loss", "value": 0.512, "global_step": 4000, "stage": "II", "checkpoint": "checkpoints/step-4000"}

videoar export --checkpoint RUN/best --out DIR
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pretrain.watching.config import WatchConfig
from tokenizer.files import write_whole

FILE = "best.json"


class Best:
    """Knows the best checkpoint so far.

    Args:
        out: the run's folder.
        config: which metric, and what is better.
        stages: their names, in order.
    """

    def __init__(self, out: Path, config: WatchConfig, stages: list[str]):
        self.out, self.config, self.stages = out, config, stages

    def consider(self, checkpoint: Path, line: dict[str, Any]) -> bool:
        """Takes a checkpoint for the best one if the numbers at its step are better than the best one's so far.

        Args:
            checkpoint: a complete one, in the run's folder.
            line: of metrics.jsonl, of the checkpoint's own step.

        Returns:
            Whether it is the best one now.
        """
        metric = self.config.best_metric
        value = line.get(metric) if metric else None
        if value is None or not math.isfinite(value) or not self._better(line["stage"], value):
            return False
        entry = {
            "metric": metric, "value": value, "global_step": line["global_step"], "stage": line["stage"],
            "checkpoint": str(checkpoint.relative_to(self.out)),
        }  # fmt: skip
        write_whole(self.out / FILE, json.dumps(entry, indent=1))
        return True

    def folder(self) -> Path | None:
        """The best checkpoint so far."""
        found = best_checkpoint(self.out)
        return found if self.config.best_metric else None

    def _better(self, stage: str, value: float) -> bool:
        before = read_best(self.out)
        if before is None or before["metric"] != self.config.best_metric or best_checkpoint(self.out) is None:
            return True
        if before["stage"] != stage:  # other clips, other numbers: the later stage's count
            return before["stage"] not in self.stages or (
                stage in self.stages and self.stages.index(stage) > self.stages.index(before["stage"])
            )
        return value < before["value"] if self.config.best_is == "lowest" else value > before["value"]


def read_best(out: Path) -> dict[str, Any] | None:
    """What best.json of a run's folder says; None: there is none."""
    try:
        return json.loads((out / FILE).read_text())
    except (OSError, ValueError):
        return None


def best_checkpoint(out: Path) -> Path | None:
    """The folder of a run's best checkpoint; None: there is none, or it is gone."""
    entry = read_best(out)
    folder = None if entry is None else out / entry["checkpoint"]
    return folder if folder is not None and folder.is_dir() else None
