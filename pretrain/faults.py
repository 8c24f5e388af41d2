"""Faults on purpose, to see that a run survives them: `VIDEOAR_FAULT="nan@12"` in the environment; unset in production.

nan@12          step 12 has a loss that is not a number, and so have its gradients
spike@12        the loss of step 12, and with it the gradients, is a thousand times what it should be
hang@5:rank1    process 1 stops for ever when it begins step 5
kill@7:rank0    process 0 kills itself (SIGKILL) when it begins step 7; all do without `:rank0`
term@7, usr1@7  process 0 sends itself SIGTERM or SIGUSR1

Several are joined by commas. Each happens once in a run's folder, noted as the event `fault_injected`: a run that is started again does
not meet it again.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.events import write_event
from tokenizer.errors import UserError

VARIABLE = "VIDEOAR_FAULT"
EVENT = "fault_injected"
FACTORS = {"nan": math.nan, "spike": 1000.0}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
KINDS = (*FACTORS, *SIGNALS, "hang")


@dataclass(frozen=True)
class Fault:
    """One of them.

    Args:
        kind: see above.
        step: the global step that it happens in.
        rank: whom it happens to; None: all processes.
        text: as it was written.
    """

    kind: str
    step: int
    rank: int | None
    text: str


def parse(text: str) -> list[Fault]:
    """Reads the variable's value.

    Raises:
        UserError: it says something else.
    """
    faults = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(rf"({'|'.join(KINDS)})@(\d+)(?::rank(\d+))?", part.strip())
        if match is None:
            raise UserError(
                f"{VARIABLE} holds '{part}': write {', '.join(KINDS)}, '@', a step and perhaps ':rank' and a number, as in hang@5:rank1."
            )
        kind, step, rank = match.groups()
        one = 0 if rank is None and kind in ("term", "usr1") else None
        faults.append(Fault(kind, int(step), int(rank) if rank else one, part.strip()))
    return faults


class Faults:
    """Those of one process that have not happened yet.

    Args:
        rank: the process.
        out: the run's folder.
        events: what has happened there so far.
    """

    def __init__(self, rank: int, out: Path, events: Iterable[dict[str, Any]]):
        self.rank, self.out = rank, out
        happened = {event["fault"] for event in events if event["event"] == EVENT}
        self.armed = [fault for fault in parse(os.environ.get(VARIABLE, "")) if fault.text not in happened]
        if self.armed and rank == 0:
            armed = ", ".join(fault.text for fault in self.armed)
            print(f"WARNING: {VARIABLE} is set, this run WILL FAIL ON PURPOSE: {armed}", file=sys.stderr, flush=True)

    def loss_factor(self, step: int) -> float:
        """What the loss of a global step is multiplied by: 1 without a fault."""
        return math.prod(FACTORS[fault.kind] for fault in self._due(step, FACTORS))

    def strike(self, step: int) -> None:
        """Hangs or signals this process if it is to happen in this global step."""
        for fault in self._due(step, (*SIGNALS, "hang")):
            if fault.kind == "hang":
                while True:
                    time.sleep(1)
            os.kill(os.getpid(), SIGNALS[fault.kind])

    def _due(self, step: int, kinds: Iterable[str]) -> list[Fault]:
        due = [fault for fault in self.armed if fault.step == step and fault.kind in kinds]
        for fault in due:
            self.armed.remove(fault)
            if self.rank == (fault.rank or 0):
                write_event(self.out, EVENT, step - 1, fault=fault.text)
        return [fault for fault in due if fault.rank in (None, self.rank)]
