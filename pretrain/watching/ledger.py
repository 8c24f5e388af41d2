"""Where a process's time goes, to the last second: the basis of goodput.

Goodput is the share of a run's wall time, since its first start, that went into steps that counted: waiting for data, forward, backward and
update of steps whose weights are the run's. The seconds of those steps travel in the position that checkpoints carry, so that steps
that a crash lost or a rollback undid are not among them, whoever counts; starts, downtime, validation, waiting for saves, and
steps whose update was left out never are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

Kind = Literal["starting", "steps", "left_out", "validation", "saving", "samples", "other"]


class Ledger:
    """Every second of this process, since it began, belongs to one kind; the kinds add up to its age.

    "steps" are steps that were done, "left_out" those whose update was not made, "saving" what saves make the training wait, "samples" the
    wait for a last set of samples.
    """

    _first = True

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        # imports belong to the first run of a process; who calls for another one had them before
        self._last = time.monotonic() - (process_age() if Ledger._first else 0.0)
        Ledger._first = False

    def spend(self, kind: Kind) -> float:
        """What passed since the last call was of this kind; the seconds of it."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        self.seconds[kind] = self.seconds.get(kind, 0.0) + passed
        return passed

    def leave_out(self, seconds: float) -> None:
        """So much of "steps" was a step whose update was not made."""
        self.seconds["steps"] -= seconds
        self.seconds["left_out"] = self.seconds.get("left_out", 0.0) + seconds

    def rounded(self) -> dict[str, float]:
        """For a log."""
        return {kind: round(seconds, 3) for kind, seconds in self.seconds.items()}


def process_age() -> float:
    """Seconds since this process began, its imports included."""
    try:  # to the tick; psutil knows the boot time to a second only
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = time.time() - psutil.Process().create_time()
    return max(0.0, age)


def run_began(events: Sequence[dict[str, Any]]) -> float | None:
    """When a run's first process began, in seconds since the epoch, by its events; None: it has not started yet."""
    for event in events:
        if event["event"] == "start":
            return event["time"] - event.get("starting_seconds", 0.0)
    return None
