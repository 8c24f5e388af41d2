"""Where a run's numbers go: metrics.jsonl, Weights & Biases, the progress line. Only rank 0 writes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pretrain.config import WandbConfig


class MetricsLog:
    """Appends to `metrics.jsonl`; a resumed run first drops the lines after its checkpoint, which it will write again.

    Args:
        out: the run's folder.
        global_step: finished steps of the checkpoint that the run goes on from.
        wandb: its settings.
        config: the run's settings, for Weights & Biases.
    """

    def __init__(self, out: Path, global_step: int, wandb: WandbConfig, config: dict[str, Any]):
        self.file = out / "metrics.jsonl"
        _drop_after(self.file, global_step)
        self._out = self.file.open("a")
        self._run: Any = None
        if wandb.mode != "disabled":
            import wandb as client

            # one run however often it is resumed
            identity = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
            self._run = client.init(
                mode=wandb.mode,
                project=wandb.project,
                name=wandb.name,
                id=identity,
                resume="allow",
                dir=str(out),
                config=config,
                settings=client.Settings(silent=True),
            )

    def write(self, values: dict[str, Any]) -> None:
        """Logs one line; `values` has the key "global_step"."""
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()
        if self._run is not None:
            self._run.log(values, step=values["global_step"])

    def close(self) -> None:
        """Ends the log."""
        self._out.close()
        if self._run is not None:
            self._run.finish()


def _drop_after(file: Path, global_step: int) -> None:
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["global_step"] <= global_step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # a line that a kill cut short
            continue
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text("".join(kept))
    temporary.replace(file)
