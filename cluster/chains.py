"""Several chains of steps side by side on this machine, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from cluster.local import CommandFailed, end_with_parent
from cluster.steps import Ledger, Step


@dataclass(frozen=True)
class Chain:
    """Steps that follow each other.

    Args:
        name: for the lines that announce its steps.
        folder: where its steps.json and logs are.
        steps: in their order.
    """

    name: str
    folder: Path
    steps: tuple[Step, ...]


def run_chains(chains: Sequence[Chain], at_once: int, ended: Callable[[Chain, bool], None]) -> None:
    """Walks all chains in their order, `at_once` at a time; finished steps are not done again.

    When this process ends, by a signal or an exception, so do the chains, and the same call goes on from there.

    Args:
        chains: what to run.
        at_once: how many at a time, at least 1.
        ended: called as each chain ends, with whether all of its steps are done; the others go on either way.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = list(chains), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                process = context.Process(target=_walk, args=(waiting[0], os.getpid()))
                process.start()
                running[process.sentinel] = process, waiting.pop(0)
            for sentinel in wait(list(running)):
                process, chain = running.pop(sentinel)
                process.join()
                ended(chain, process.exitcode == 0)
    except BaseException:
        _end([process for process, _ in running.values()])
        raise


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=30)  # longer than a command is given to end
        process.kill()


def _walk(chain: Chain, parent: int) -> None:
    """What a chain's process does."""
    end_with_parent()
    if os.getppid() != parent:
        sys.exit(143)  # it was gone already
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(name, lambda *_: sys.exit(143))  # leaves through `run`, which ends the step's processes
    try:
        Ledger(chain.folder).walk(chain.steps, f"{chain.name}, ")
    except CommandFailed as error:
        print(f"{chain.name} stopped at {error}", file=sys.stderr, flush=True)
        sys.exit(1)
