"""One run folder, one run: two that train in the same folder would take away each other's checkpoints and lines."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from evaluation.run_files import LIVES, last_life, lives
from pretrain.events import read_events

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
    beat = _candidate(out)
    if beat is None:
        return None
    name = f"process {beat['pid']} on {beat['host']}" + (f", job {beat['job']}" if beat.get("job") else "")
    if beat["host"] != platform.node():
        wait = 2 * beat.get("every", 10.0) + SLACK
        text = f"{out}: waiting up to {wait:.0f} s to see whether {name} still trains here"
        print(text, file=sys.stderr, flush=True)
        end = time.monotonic() + wait
        while _beat(out) == beat:
            if time.monotonic() >= end:
                return None
            time.sleep(0.5)
        if _candidate(out) is None:
            return None
    return name


def _candidate(out: Path) -> dict[str, Any] | None:
    """The last heartbeat of a rank 0 that may be alive."""
    beat, life = _beat(out), last_life(read_events(out))
    if beat is None or (life is not None and life["event"] != LIVES[0] and beat["time"] < life["time"] + SLACK):
        return None
    if beat.get("job") and beat["job"] == os.environ.get(JOB):
        return None
    if beat["host"] == platform.node() and (beat["pid"] == os.getpid() or not lives(beat["pid"], beat["time"])):
        return None
    return beat


def _beat(out: Path) -> dict[str, Any] | None:
    """Rank 0's heartbeat, without the other ranks' and without what grows with the run."""
    try:
        return json.loads((out / "heartbeats" / "rank-0.json").read_text())
    except (OSError, ValueError):
        return None
