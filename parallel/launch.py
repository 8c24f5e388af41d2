"""torchrun for one node of a SLURM job: ranks that are told to stop have the time that they need, and the exit status says how it ended.

    srun ... python -m parallel.launch --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HEAD:PORT ... -m videoar pretrain --config FILE

The arguments are torchrun's; the node's number is SLURM's. torchrun itself would kill its ranks 30 seconds after a SIGTERM, die of a
SIGUSR1, and end with status 1 whatever its ranks ended with. Here both signals reach the ranks as SIGTERM, and the status is

    0  all ranks are done                     2  a rank says that a setting must be mended
    3  told to stop, and saved or not begun   1  anything else
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

DONE, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 3
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
CRASHES = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
"""Exit codes of a rank that did not end by itself, nor by another one's fault, as NCCL's SIGABRT would be."""


class _Stop(threading.Thread):
    """Waits for a signal and passes it on to the ranks, also while the main thread is deep in a rendezvous and can't answer."""

    def __init__(self) -> None:
        super().__init__(name="stop", daemon=True)
        self.asked = False
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for name in SIGNALS:
            signal.signal(name, lambda *_: None)  # what counts is the byte in the pipe
        self.start()

    def run(self) -> None:
        while not set(os.read(self._woken, 1)) & set(SIGNALS):  # torchrun's own signals wake it, too
            continue
        self.asked = True
        told: set[int] = set()
        while True:
            ranks = set(_children())
            if not ranks and not told:
                os._exit(STOPPED)  # no rank has begun: nothing is lost
            for pid in ranks - told:  # each once: a second one would cut short what follows the saving
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            told |= ranks
            time.sleep(0.2)


def _children() -> list[int]:
    """The processes that torchrun has started."""
    return [child.pid for child in psutil.Process().children()]


def exit_status(codes: Iterable[int], asked: bool) -> int:
    """What the ranks' exit codes say together.

    Args:
        codes: of the ranks that did not end with 0; negative: the signal that ended it.
        asked: whether they had been told to stop.
    """
    codes = set(codes)
    if USER_ERROR in codes:
        return USER_ERROR
    # torchrun ends the other ranks by SIGTERM once the first has ended, and one that has not begun yet dies of a signal
    if codes <= {STOPPED, *(-name for name in SIGNALS)} and (STOPPED in codes or asked):
        return STOPPED
    return FAILED


def main(words: list[str]) -> int:
    """Runs torchrun in this process; its exit status."""
    stop = (
        _Stop()
    )  # at once: a signal while torch is imported must not end this process with a status that says nothing
    if "SLURM_NODEID" in os.environ:
        os.environ.setdefault("PET_NODE_RANK", os.environ["SLURM_NODEID"])
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = run.parse_args(["--signals-to-handle=SIGINT,SIGHUP", *words])
    status = FAILED
    try:
        run.run(arguments)
        status = DONE
    except ChildFailedError as error:
        status = exit_status((failure.exitcode for failure in error.failures.values()), stop.asked)
        if status != STOPPED:
            print(error, file=sys.stderr)
        if "parallel.preflight" in words:
            _blame({rank: failure.exitcode for rank, failure in error.failures.items()})
    finally:
        if status == FAILED:
            _tell_script()
    return status


def _blame(codes: Mapping[int, int]) -> None:
    """Says "bad NODE: reason" for ranks of the pre-flight check that could not say so themselves."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    for rank, code in codes.items():
        if code in CRASHES:
            print(f"bad {node}: rank {rank} died of {signal.Signals(-code).name}", flush=True)


def _tell_script() -> None:
    """The job's script need not wait for the other nodes any more, one of which may be gone."""
    if file := os.environ.get("VIDEOAR_FAILED"):
        with contextlib.suppress(OSError):
            Path(file).touch()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
