"""Stopping a training politely: SIGTERM or SIGUSR1 asks, the step under way is finished, and all ranks stop after the same one."""

from __future__ import annotations

import signal
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


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what schedulers are told to send some time before a job's end; SIGTERM is what they send at its end."""


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Gives a flag that SIGTERM or SIGUSR1 sets while the block runs."""
    flag = StopFlag()

    def ask(*_: Any) -> None:
        flag.requested = True

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
