"""Starts `videoar samples` beside a training, one at a time, and looks after it: the training never waits for it.

A sampler works from a complete checkpoint, so any layout may train, and what it does can't change the training's numbers. It has the
lowest priority, ends with the process that started it, and is given up after its time; its checkpoint stays until it has ended.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from pretrain.watching.config import SamplesConfig
from pretrain.watching.samples import sampled_steps

LOG = "log.txt"
OWNER = "VIDEOAR_SAMPLES_OWNER"
"""Environment variable of a sampler: the process that it ends with."""
LOW = "VIDEOAR_SAMPLES_LOW"
"""Another: it takes the lowest priority."""
LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What torchrun sets for a rank, which a sampler is not; and all that begins with ROLE_ and TORCHELASTIC_."""
COPIES = 4
"""Copies of the float32 weights that must fit into the free memory before a sampler starts."""


@dataclass
class _Running:
    step: int
    checkpoint: Path
    process: subprocess.Popen
    log: IO[bytes]
    started: float


class Sampler:
    """The sets of samples of one run; rank 0 has one.

    Args:
        out: the run's folder.
        config: what to make, and when.
        parameters: of the network.
    """

    def __init__(self, out: Path, config: SamplesConfig, parameters: int):
        self.out, self.config, self.parameters = out, config, parameters
        self._running: _Running | None = None
        self._tried = -1  # newest step that a set was started of, whatever became of it

    @property
    def checkpoint(self) -> Path | None:
        """The one that is being sampled."""
        return self._running.checkpoint if self._running else None

    @property
    def step(self) -> int:
        """Of that one; -1: none is."""
        return self._running.step if self._running else -1

    def due(self, step: int) -> bool:
        """Whether a checkpoint is the first one at or after a multiple of `every`."""
        if not self.config.every:
            return False
        last = max([self._tried, *(done for done in sampled_steps(self.out) if done <= step)])
        return step // self.config.every > max(last, 0) // self.config.every

    def start(self, checkpoint: Path, step: int) -> str | None:
        """Starts a set of a complete checkpoint; returns why not, where that is so."""
        if self._running is not None:
            return f"the set of step {self._running.step} is still being made"
        free, needed = psutil.virtual_memory().available, COPIES * 4 * self.parameters
        if self.config.device == "cpu" and free < needed:
            self._tried = step
            return f"{free / 1e9:.1f} GB of memory are free, a set may need {needed / 1e9:.1f}"
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        self._clear()
        log = (folder / LOG).open("wb")
        words = ["-m", "videoar", "samples", "--run", str(self.out), "--checkpoint", checkpoint.name]
        process = subprocess.Popen(
            [sys.executable, *words],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._running = _Running(step, checkpoint, process, log, time.monotonic())
        self._tried = step
        return None

    def ended(self) -> tuple[int, str | None] | None:
        """(step, what went wrong) of the set that was under way, once it has ended; None: none has."""
        running = self._running
        if running is None:
            return None
        status, problem = running.process.poll(), None
        if status is None:
            if time.monotonic() - running.started < 60 * self.config.minutes:
                return None
            problem = f"given up after {self.config.minutes:g} minutes"
        elif status:
            lines = (self.out / "samples" / LOG).read_text(errors="replace").strip().splitlines()
            problem = lines[-1].strip()[:500] if lines else f"ended with status {status}"
        self.stop()
        return running.step, problem

    def stop(self) -> None:
        """Ends the set that is under way; a later start makes it anew."""
        running, self._running = self._running, None
        if running is None:
            return
        if running.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        running.log.close()
        self._clear()

    def _clear(self) -> None:
        """Takes away what killed samplers of this machine have left: it may hold a whole model."""
        for left in (self.out / "samples").glob(f"step-*.tmp.{glob.escape(socket.gethostname())}.*"):
            if not psutil.pid_exists(int(left.name.split(".")[-2])):
                shutil.rmtree(left, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in LAUNCHER and not name.startswith(("ROLE_", "TORCHELASTIC_", "VIDEOAR_"))
        }
        if self.config.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if self.config.low_priority:
            environment[LOW] = "1"
        return environment | {"OMP_NUM_THREADS": str(self.config.threads), OWNER: str(os.getpid())}


def yield_to_training() -> None:
    """A sampler's first act: it will end with its owner, and takes the lowest priority for processor and disk."""
    owner = os.environ.get(OWNER)
    if owner is None:
        return  # somebody typed the command
    from tokenizer.launcher import end_with_parent

    end_with_parent()
    if os.getppid() != int(owner):
        sys.exit(1)  # it ended in between
    if LOW not in os.environ:
        return
    os.nice(19)
    with suppress(psutil.Error, OSError, AttributeError):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
