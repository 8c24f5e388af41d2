"""Where a run's numbers go: metrics.jsonl and Weights & Biases. Only rank 0 writes."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from tokenizer.files import write_whole

TRIES, PAUSE = 10, 2.0
"""How often, and after how many seconds each, a start of Weights & Biases is tried."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases.

    Args:
        mode: "offline" writes to the output folder without a network (`wandb sync` uploads later), "online", or "disabled".
        project, name: what the run is called there.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "videoar"
    name: str | None = None


class MetricsLog:
    """Appends to `metrics.jsonl`; a resumed run first drops the lines after its checkpoint, which it will write again.

    Args:
        out: the run's folder.
        finished: steps of the checkpoint that the run goes on from.
        wandb: its settings.
        config: the run's settings, for Weights & Biases.
        key: the entry of each line that counts finished steps.
    """

    def __init__(self, out: Path, finished: int, wandb: WandbConfig, config: dict[str, Any], key: str = "global_step"):
        self.file, self.key = out / "metrics.jsonl", key
        drop_after(self.file, finished, key)
        self._out = self.file.open("a")
        self._run: Any = None
        if wandb.mode != "disabled":
            self._run = _start_wandb(out, wandb, config)

    def write(self, values: dict[str, Any], step: int | None = None) -> None:
        """Logs one line; `values` has the key that counts steps.

        Args:
            values: the line.
            step: where Weights & Biases, which never goes back, shows what comes late; None: at the line's own step.
        """
        try:
            self._out.write(json.dumps(values) + "\n")
            self._out.flush()
        except OSError as error:  # what is not written stays in the buffer until there is space again
            print(
                f"{self.file} can't be written ({error.strerror}): its lines come later.", file=sys.stderr, flush=True
            )
        if self._run is not None:
            self._run.log(values, step=values[self.key] if step is None else step)

    def picture(self, name: str, file: Path, step: int) -> None:
        """Shows a picture that lies in the run's folder in Weights & Biases, too."""
        if self._run is not None:
            import wandb as client

            self._run.log({name: client.Image(str(file))}, step=step)

    def rewind(self, finished: int) -> None:
        """Drops the lines after so many finished steps, which the run will write again. Weights & Biases keeps its first ones."""
        _close(self._out, self.file)
        drop_after(self.file, finished, self.key)
        self._out = self.file.open("a")

    def video(self, name: str, file: Path, step: int) -> None:
        """Shows an .mp4 that lies in the run's folder in Weights & Biases, too."""
        if self._run is not None:
            import wandb as client

            self._run.log({name: client.Video(str(file), format="mp4")}, step=step)

    def close(self) -> None:
        """Ends the log."""
        _close(self._out, self.file)
        if self._run is not None:
            self._run.finish()


def _close(out: IO[str], file: Path) -> None:
    try:
        out.close()
    except OSError as error:
        print(f"{file} lacks its last lines ({error.strerror}).", file=sys.stderr, flush=True)


def _start_wandb(out: Path, wandb: WandbConfig, config: dict[str, Any]) -> Any:
    """The run there, or None: a logger that does not start must not stop a training."""
    import wandb as client

    problem = ""
    for _ in range(TRIES):
        try:
            return client.init(
                mode=wandb.mode,
                project=wandb.project,
                name=wandb.name,
                # one run however often it is resumed
                id=hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(out),
                config=config,
                settings=client.Settings(silent=True),
            )
        except Exception as error:  # of many kinds; a killed process's service may hold the run for some seconds more
            problem = " ".join(str(error).split())[:200]
            time.sleep(PAUSE)
    print(f"Weights & Biases does not start ({problem}): the run's numbers go to metrics.jsonl only.", file=sys.stderr)
    return None


def drop_after(file: Path, finished: int, key: str) -> None:
    """Takes from a file of JSON lines, if it is there, what a run that goes on will write again: later lines, and a line cut short.

    Args:
        file: of a run that may have been killed.
        finished: steps of the checkpoint that the run goes on from.
        key: the entry of each line that counts finished steps.
    """
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)[key] <= finished:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # a line that a kill cut short
            continue
    write_whole(file, "".join(kept))
