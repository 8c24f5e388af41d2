"""One run folder, one run: two that train in the same folder would take away each other's checkpoints and lines."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from evaluation.run_files import LIVES, PretrainRun, lives

JOB = "SLURM_JOB_ID"
"""A job that its scheduler has started again has ended before."""
SLACK = 2.0
"""Seconds, beside two heartbeats, after which a folder whose heartbeat does not change has no owner."""


def owner(out: Path) -> str | None:
    """Who trains in a folder, for a message; None: nobody.

    It takes time only if a run on another machine has ended without a last word: until it is clear that its heartbeat has stopped.

    Args:
        out: the run's folder.
    """
    beat = now = _candidate(out)
    if beat is None:
        return None
    name = f"process {beat['pid']} on {beat['host']}" + (f", job {beat['job']}" if beat.get("job") else "")
    if beat["host"] != platform.node():
        wait = 2 * beat.get("every", 10.0) + SLACK
        text = f"{out}: waiting up to {wait:.0f} s to see whether {name} still trains here"
        print(text, file=sys.stderr, flush=True)
        end = time.monotonic() + wait
        while now == beat and time.monotonic() < end:
            time.sleep(0.5)
            now = _candidate(out)
        if now is None or now == beat:
            return None
    return name


def _candidate(out: Path) -> dict[str, Any] | None:
    """The last heartbeat of a rank 0 that may be alive."""
    if not (out / "heartbeats").is_dir():
        return None
    run = PretrainRun(out)
    beat = next((beat for beat in run.heartbeats() if beat["rank"] == 0), None)
    life = next((event for event in reversed(run.events) if event.get("event") in LIVES), None)
    if beat is None or (life is not None and life["event"] != LIVES[0] and beat["time"] < life["time"] + SLACK):
        return None
    if beat.get("job") and beat["job"] == os.environ.get(JOB):
        return None
    if beat["host"] == platform.node() and (beat["pid"] == os.getpid() or not lives(beat["pid"], beat["time"])):
        return None
    return beat
