"""Runs a command of this project on this machine and measures it: the peak memory of its whole process tree."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil


class CommandFailed(RuntimeError):
    """A command ended with another status than 0."""


def videoar_command(*words: str, processes: int = 1) -> list[str]:
    """The command line of a `videoar` sub-command, under torchrun when it takes more than one process.

    Args:
        words: sub-command and its arguments.
        processes: torchrun's processes on this machine.
    """
    if processes == 1:
        return [sys.executable, "-m", "videoar", *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, "-m", "videoar", *words]


def run(
    command: Sequence[str],
    log: Path | None = None,
    threads: int | None = None,
    sample: Callable[[float], None] | None = None,
) -> float:
    """Runs a command to its end; its standard error and output go to ours and, if asked for, to a log file as well.

    Args:
        command: the words.
        log: a file to append the output to.
        threads: OMP_NUM_THREADS of each of its processes.
        sample: called every second, and at the end, with the peak memory so far in 10^9 bytes.

    Returns:
        the peak memory of the whole process tree, in 10^9 bytes.

    Raises:
        CommandFailed: it ended with another status than 0; the message names the command and the log.
    """
    environment = dict(os.environ)
    # a process that waits for another must not spin on a core that the other needs
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment["PYTHONUNBUFFERED"] = "1"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    meter = _PeakMemory(process.pid, sample)
    try:
        with meter, open(log or os.devnull, "ab") as file:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
            status = process.wait()
    except BaseException:
        # Ctrl-C or a signal to us: the whole group goes, workers of launchers included
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    if status:
        see = f"; its output is in {log}" if log else ""
        raise CommandFailed(f"'{' '.join(command)}' ended with status {status}{see}.")
    return meter.peak / 1e9


def end_with_parent() -> None:
    """Linux: this process gets SIGTERM when its parent dies, even by SIGKILL, so that no orphan goes on beside a second attempt."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class _PeakMemory(threading.Thread):
    """Samples the proportional set size of a process tree: shared pages are counted once, unlike with resident sizes."""

    def __init__(self, pid: int, sample: Callable[[float], None] | None, interval: float = 1.0):
        super().__init__(daemon=True)
        self.pid, self.sample, self.interval, self.peak = pid, sample, interval, 0
        self._halt = threading.Event()

    def __enter__(self) -> _PeakMemory:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._halt.set()
        self.join()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self._tree_size())
            if self.sample:
                self.sample(self.peak / 1e9)
            if self._halt.wait(self.interval):
                return

    def _tree_size(self) -> int:
        try:
            root = psutil.Process(self.pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.Error:
            return 0
        total = 0
        for process in tree:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it ended between the two calls
                continue
        return total
