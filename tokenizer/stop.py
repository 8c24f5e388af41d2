"""Stopping a training politely: SIGTERM asks, the step under way is finished, and all ranks stop after the same one."""

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
        flag = torch.tensor(int(self.requested))  # on the CPU: gloo carries it beside NCCL
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.stopping = bool(flag)
        return self.stopping


@contextmanager
def stop_on_sigterm() -> Iterator[StopFlag]:
    """Gives a flag that SIGTERM sets while the block runs."""
    flag = StopFlag()

    def ask(*_: Any) -> None:
        flag.requested = True

    try:
        before = signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread: nobody sends signals there
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
