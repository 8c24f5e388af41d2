"""A tiny training on an emulated SLURM cluster of two nodes, which is preempted and loses nodes, and must end as an undisturbed one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.chaos_train import VARYING
from pretrain.events import read_events
from tests.cluster.emulated_slurm import EmulatedSlurm
from tests.pretrain.tiny import stage, write_run
from videoar import main

BOOKING = {
    "nodes": 2,
    "gpus_per_node": 0,
    "preflight": "node",
    "env": {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0",
    },
}  # fmt: skip


class SlurmScene:
    """Runs of one training.

    Args:
        folder: for everything.
        slurm: the cluster.
        steps: of the training.
        checkpoint_every: steps.
        stages: of the training, so many steps together; None: one stage.
    """

    def __init__(
        self,
        folder: Path,
        slurm: EmulatedSlurm,
        steps: int,
        checkpoint_every: int,
        stages: list[dict[str, Any]] | None = None,
    ):
        self.folder, self.slurm, self.steps, self.checkpoint_every = folder, slurm, steps, checkpoint_every
        folder.mkdir(parents=True, exist_ok=True)
        self.job = folder / "job.yaml"
        self.job.write_text(yaml.safe_dump(BOOKING))
        self.settings = write_run(
            folder,
            stages=stages or [stage(folder / "codes", steps)],
            checkpoint_every=checkpoint_every,
            parallel={"deterministic": True},
        )

    def submit(self, name: str, *words: str, config: Path | None = None) -> list[str]:
        """`videoar submit`; the jobs' numbers.

        Args:
            name: of the run's folder.
            words: further words; after a "--" for the training.
            config: other settings of the training.
        """
        split = words.index("--") if "--" in words else len(words)
        run = ["--", "--out", str(self.folder / name), *words[split + 1 :]]
        return self.videoar("--config", str(config or self.settings), *words[:split], *run).split()

    def videoar(self, *words: str) -> str:
        """`videoar submit` in this process; its standard output."""
        out = io.StringIO()
        with _environment(self.slurm.environment), contextlib.redirect_stdout(out):
            status = main(["submit", "--job", str(self.job), *words])
        if status:
            raise RuntimeError(f"videoar submit ended with status {status}")
        return out.getvalue()

    def out(self, name: str) -> Path:
        """A run's folder."""
        return self.folder / name

    def reached(self, name: str) -> int:
        """Finished steps, by the last whole line of metrics.jsonl."""
        lines = numbers(self.out(name))
        return lines[-1]["global_step"] if lines else 0

    def starts(self, name: str) -> list[dict[str, Any]]:
        """The events of trainings that began."""
        return [event for event in read_events(self.out(name)) if event["event"] == "start"]

    def wait_for_step(self, job: str, name: str, step: int, since: float = 0.0, seconds: float = 500.0) -> bool:
        """Waits until a training that has begun after some time reaches a step; False if the job ended before."""
        deadline = time.monotonic() + seconds
        while not self._later(name, since) or self.reached(name) < step:
            if self.slurm.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"):
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{name} is at step {self.reached(name)}, start {len(self.starts(name))}: {self.log(name)[-3000:]}"
                )
            time.sleep(0.05)
        return True

    def wait_for_start(self, name: str, since: float, seconds: float = 500.0) -> dict[str, Any]:
        """Waits until the training has begun after some time; the event."""
        deadline = time.monotonic() + seconds
        while not (found := self._later(name, since)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} has not begun again: {self.log(name)[-3000:]}")
            time.sleep(0.05)
        return found[0]

    def wait_for_restart(self, job: str, number: int, seconds: float = 500.0) -> float:
        """Waits for a job's restart; a time at which the start before has ended and the new one does not train yet."""

        def runs(entry: dict[str, str]) -> bool:
            return int(entry["Restarts"]) == number and entry["JobState"] == "RUNNING"

        self.slurm.wait_for(job, runs, seconds)
        return time.time()

    def _later(self, name: str, since: float) -> list[dict[str, Any]]:
        return [event for event in self.starts(name) if event["time"] > since]

    def wait_for_line(self, name: str, step: int, seconds: float = 500.0) -> float:
        """Waits for a step; the time at which its line was there, to a twentieth of a second."""
        deadline = time.monotonic() + seconds
        while self.reached(name) < step and time.monotonic() < deadline:
            time.sleep(0.05)
        return time.time()

    def log(self, name: str) -> str:
        """All logs of a run's jobs."""
        return "".join(file.read_text() for file in sorted(self.out(name).glob("slurm/*.log")))

    def preempt(self, job: str, how: str) -> None:
        """Takes a running job's nodes away, or tells it that its time is nearly over.

        Args:
            job: its number.
            how: "limit" (the signal before the time limit), "requeue" (an administrator's), or "urgent" (a job of a higher partition).
        """
        if how == "limit":
            self.slurm.run("scancel", "--batch", "--signal=USR1", job)
        elif how == "requeue":
            self.slurm.run("scontrol", "requeue", job)
        else:
            self.slurm.run(
                "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
            )

    def same(self, name: str, whole: str = "whole") -> list[str]:
        """What of a run's numbers is not the undisturbed run's, to the last digit."""
        one, other = numbers(self.out(whole)), numbers(self.out(name))
        found = [] if len(one) == len(other) == self.steps else [f"{len(other)} lines instead of {len(one)}"]
        return found + [f"{a} is {b}" for a, b in zip(one, other) if a != b][:3]


def numbers(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times; one that is being written is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in (out / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append({name: value for name, value in json.loads(line).items() if name not in VARYING})
    return lines


def begun(log: str, before: float) -> float:
    """When the last start of a job before some time began, by its log; seconds since the epoch."""
    times = [
        datetime.fromisoformat(text).timestamp() for text in re.findall(r"^\[(\S+) job \d+ start \d+\] on ", log, re.M)
    ]
    return max(start for start in times if start <= before)


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
