"""Stopping a training politely: SIGTERM, SIGUSR1 or Ctrl-C asks, the step under way is finished, and all ranks stop after the same one."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class StopFlag:
    """Whether to stop; all ranks must answer alike, or one would wait for the others for ever.

    `requested` is this rank's own wish, which a signal sets at any time; `stopping` is what all ranks agreed upon last.
    """

    requested = False
    stopping = False

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call it."""
        return self.agreed_with(False)[0]

    def agreed_with(self, other: bool) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether `other` holds on any: two agreements in one message. Every rank must call it."""
        flags = torch.tensor([self.requested, other], dtype=torch.int)  # on the CPU: gloo carries it beside NCCL
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self.stopping = bool(flags[0])
        return self.stopping, bool(flags[1])


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGUSR1 is what schedulers are told to send some time before a job's end; SIGTERM is what they send at its end."""
SAME = 1.0
"""Seconds within which a second SIGINT is the same Ctrl-C, which launchers pass on; a later one interrupts at once."""


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Gives a flag that SIGTERM, SIGUSR1 or Ctrl-C sets while the block runs."""
    flag, interrupted = StopFlag(), math.inf

    def ask(number: int, frame: Any) -> None:
        nonlocal interrupted
        flag.requested = True
        if number == signal.SIGINT:
            now = time.monotonic()
            if now > interrupted + SAME:
                signal.default_int_handler(number, frame)
            interrupted = min(now, interrupted)

    try:
        before = {number: signal.signal(number, ask) for number in SIGNALS}
    except ValueError:  # not the main thread: nobody sends signals there
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
