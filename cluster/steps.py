"""A chain of commands that is walked once: finished steps are not done again, a killed one is run again and goes on by itself."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.local import CommandFailed, run


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        name: as in steps.json.
        commands: run one after the other; each must go on from where it was killed.
        inputs: files whose content the step depends on (configurations); a change is refused, not ignored.
        threads: OMP_NUM_THREADS of each process.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    inputs: tuple[Path, ...] = ()
    threads: int | None = None

    def fingerprint(self) -> str:
        """Of the commands and the inputs' content."""
        digest = hashlib.sha256(json.dumps(self.commands).encode())
        for file in self.inputs:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


class Ledger:
    """What each step has taken so far, in `steps.json`: seconds (killed attempts included), peak memory, and whether it is done.

    Args:
        root: the folder of the run; logs go to `root/logs`.
    """

    def __init__(self, root: Path):
        self.file, self.logs = root / "steps.json", root / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, dict] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def changed(self, steps: Sequence[Step]) -> list[str]:
        """Names of the steps that were begun with other commands or settings."""
        return [s.name for s in steps if s.name in self.steps and self.steps[s.name]["fingerprint"] != s.fingerprint()]

    def run(self, step: Step, position: str) -> None:
        """Runs a step unless it is done.

        Args:
            step: what to run.
            position: such as "3/8", for the line that announces it.

        Raises:
            CommandFailed: a command failed; what it took is kept.
        """
        entry = self.steps.setdefault(
            step.name, {"seconds": 0.0, "peak_gb": 0.0, "attempts": 0, "done": False, "fingerprint": step.fingerprint()}
        )
        if entry["done"]:
            print(f"[{position}] {step.name}: done already ({entry['seconds']:.0f} s)", flush=True)
            return
        print(f"[{position}] {step.name}", flush=True)
        entry["attempts"] += 1
        before, started = entry["seconds"], time.monotonic()

        def sample(peak_gb: float) -> None:
            # written while the step runs, so that the time of an attempt that is killed counts too
            entry["seconds"] = round(before + time.monotonic() - started, 1)
            entry["peak_gb"] = round(max(entry["peak_gb"], peak_gb), 3)
            self._write()

        for command in step.commands:
            run(command, self.logs / f"{step.name}.log", step.threads, sample)
        entry["done"] = True
        sample(0.0)
        print(f"[{position}] {step.name}: {entry['seconds']:.0f} s, peak {entry['peak_gb']:.2f} GB", flush=True)

    def walk(self, steps: Sequence[Step], prefix: str = "") -> None:
        """Runs the steps of a chain that are not done.

        Args:
            steps: in their order.
            prefix: stands before "3/8" in the lines that announce them.

        Raises:
            CommandFailed: a command failed; the message begins with its step.
        """
        for number, step in enumerate(steps, 1):
            try:
                self.run(step, f"{prefix}{number}/{len(steps)}")
            except CommandFailed as error:
                raise CommandFailed(f"step {step.name}: {error}") from error

    def _write(self) -> None:
        temporary = self.file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(self.steps, indent=2))
        os.replace(temporary, self.file)
