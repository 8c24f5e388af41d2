"""Where a run's numbers go: metrics.jsonl and Weights & Biases. Only rank 0 writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from tokenizer.files import write_whole
from tokenizer.wandb_log import WandbConfig, WandbLog


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
        self.wandb = WandbLog(out, wandb, config)

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
        self.wandb.write(values, values[self.key] if step is None else step)

    def rewind(self, finished: int) -> None:
        """Drops the lines after so many finished steps, which the run will write again. Weights & Biases keeps its first ones."""
        _close(self._out, self.file)
        try:
            drop_after(self.file, finished, self.key)
        except OSError:  # a full disk: what needs no space is to cut it at the first of them
            cut_after(self.file, finished, self.key)
        self._out = self.file.open("a")

    def close(self) -> None:
        """Ends the log."""
        _close(self._out, self.file)
        self.wandb.close()


def _close(out: IO[str], file: Path) -> None:
    try:
        out.close()
    except OSError as error:
        print(f"{file} lacks its last lines ({error.strerror}).", file=sys.stderr, flush=True)


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


def cut_after(file: Path, finished: int, key: str) -> None:
    """Ends a file of JSON lines before its first line of a step after `finished`, in place: older ones that came late go, too."""
    end = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                if json.loads(line)[key] > finished:
                    break
            except (ValueError, KeyError):  # cut short
                break
            end += len(line)
    os.truncate(file, end)
