"""What happened to a run, one JSON line an event, in `events.jsonl`: starts, saves, faults and what was done about them, the end.

    {"time": 1764172800.0, "event": "start", "global_step": 120, "world_size": 8, "host": "n1"}

Unlike metrics.jsonl it is never cut back: a step that was lost stays lost in it. Only rank 0 writes, but for events of one rank.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from evaluation.json_lines import whole_lines

FILE = "events.jsonl"


def write_event(out: Path, event: str, global_step: int, now: float | None = None, **details: Any) -> None:
    """Appends one event; a single write, so that lines of several processes do not mix.

    Args:
        out: the run's folder.
        event: its name: lower case, words joined by underscores.
        global_step: finished steps of all stages.
        now: when it happened, in seconds since the epoch; None: at this moment.
        details: what else a reader should know; JSON values.
    """
    line = json.dumps(
        {"time": round(time.time() if now is None else now, 3), "event": event, "global_step": global_step, **details}
    )
    try:
        with (out / FILE).open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = "\n" + line  # after a line that was cut short
            file.write(f"{line}\n".encode())
    except OSError as error:  # a full disk is one of the things that happen to a run
        print(f"{out / FILE} can't be written ({error.strerror}): {line}", file=sys.stderr, flush=True)


def read_events(out: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a line that a kill or a full disk cut short is left out."""
    file = out / FILE
    return list(whole_lines(file)) if file.exists() else []
