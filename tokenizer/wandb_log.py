"""Weights & Biases: a log that is nice to have, so whatever happens to it happens to it alone."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizer.files import write_whole

TRIES, PAUSE = 10, 2.0
"""How often, and after how many seconds each, a start is tried."""
ID = "wandb-id.txt"


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


class WandbLog:
    """The run there.

    Its service is a process of its own, which may die, of a signal to all processes of a job, too: the numbers of the rest of this start
    are in metrics.jsonl only then, and the next start goes on with it.

    Args:
        out: the run's folder.
        wandb: its settings.
        config: the run's settings.
    """

    def __init__(self, out: Path, wandb: WandbConfig, config: dict[str, Any]):
        self._run = None if wandb.mode == "disabled" else _start(out, wandb, config)

    def write(self, values: dict[str, Any], step: int) -> None:
        """One line."""
        self._try(lambda run: run.log(values, step=step))

    def picture(self, name: str, file: Path, step: int) -> None:
        """A picture that lies in the run's folder."""
        self._try(lambda run: run.log({name: _client().Image(str(file))}, step=step))

    def video(self, name: str, file: Path, step: int) -> None:
        """An .mp4 that lies in the run's folder."""
        self._try(lambda run: run.log({name: _client().Video(str(file), format="mp4")}, step=step))

    def close(self) -> None:
        """Ends the log."""
        self._try(lambda run: run.finish())
        self._run = None

    def _try(self, act: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # of many kinds
            self._run = None
            with suppress(Exception):  # which would be tried at the process's end
                _client().teardown()
            problem = " ".join(str(error).split())[:200] or type(error).__name__
            print(
                f"WARNING: Weights & Biases has failed ({problem}): the numbers go to metrics.jsonl only until the next start.",
                file=sys.stderr,
                flush=True,
            )


def _client() -> Any:
    import wandb

    return wandb


def _start(out: Path, wandb: WandbConfig, config: dict[str, Any]) -> Any:
    """The run there, or None: a logger that does not start must not stop a training."""
    client, problem = _client(), ""
    for _ in range(TRIES):
        try:
            return client.init(
                mode=wandb.mode,
                project=wandb.project,
                name=wandb.name,
                id=_id(out),
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


def _id(out: Path) -> str:
    """One run however often it is resumed, and another one in a folder that was made anew."""
    file = out / ID
    if not file.exists():
        write_whole(file, secrets.token_hex(8))
    return file.read_text()
