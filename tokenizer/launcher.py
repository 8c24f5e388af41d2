"""What a process that torchrun started owes its launcher: to end with it."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Linux: a process of torchrun's is killed when torchrun is, however that ends.

    torchrun ends its processes when it is asked to end, not when it is killed: they would train on, and the same command, started again,
    would write the same files beside them. Call it early: a launcher that is dead already can't be told from one that lives.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """Linux: this process is killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
