"""Signs of life, and the end of a run that gives none: every process writes all its stacks to the log, and the run ends with status 4.

    heartbeats/rank-1.json    {"rank": 1, "host": "n1", "pid": 71, "time": ..., "global_step": 5, "doing": "computing", "since": 3.2}

A process whose `since` (seconds) grows hangs; one whose `time` stays behind is dead. The processes find each other by these files: the
first one that sees no progress for `hang_timeout` leaves a file `hang` there, upon which all write their stacks, also those that only
wait in a collective for the one that hangs. Only then do they end.

Under `ft_launcher` of NVIDIA's resiliency extension its rank monitor, which gets a heartbeat at each progress, ends the processes and
starts them again; it writes no stacks, so that part stays ours.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.setup import ProcessInfo
from pretrain.events import write_event
from pretrain.owner import JOB, owner
from pretrain.resilience import ResilienceConfig
from tokenizer.errors import UserError

HUNG = 4
"""The exit status of a run that hung: whatever started it may start it again, and it goes on from its newest checkpoint."""
FOLDER = "heartbeats"
GRACE = 20.0
"""Seconds that the others have for their stacks, at most, before a process ends."""
MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
"""What ft_launcher sets for the processes that it starts."""


class Watchdog:
    """Watches over this process, from a thread of its own.

    Args:
        config: time-out and interval.
        out: the run's folder, which all processes share.
        info: this process.
        monitor: NVIDIA's client, which ends the process in this one's place; None: this one does.
    """

    def __init__(self, config: ResilienceConfig, out: Path, info: ProcessInfo, monitor: Any = None):
        self.timeout, self.every, self.info, self.monitor = config.hang_timeout, config.heartbeat_every, info, monitor
        self.out, self.folder = out, out / FOLDER
        self._global_step, self._doing, self._progress = 0, "starting", time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        others = [owner(out) if info.rank == 0 else None]
        dist.broadcast_object_list(others, src=0)
        if others[0] is not None:
            raise UserError(f"{out} is being trained in by {others[0]}: end that run first, or name another `out`.")
        if info.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier start
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.broadcast_object_list([None], src=0)  # nobody looks into it before that
        self.beat("starting")
        self._thread.start()

    def beat(self, doing: str, global_step: int | None = None) -> None:
        """Progress: called by the loop before whatever may take long.

        Args:
            doing: what comes now.
            global_step: finished steps; None: as many as before.
        """
        self._doing, self._progress = doing, time.monotonic()
        if global_step is not None:
            self._global_step = global_step
        if self.timeout:
            # for a hang in which no thread of Python's gets a turn; status 1 then
            faulthandler.dump_traceback_later(self.timeout + 2 * GRACE, exit=self.monitor is None, file=2)
        if self.monitor is not None:
            self.monitor.send_heartbeat()

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self.monitor is not None:
            self.monitor.shutdown_workload_monitoring()

    def _watch(self) -> None:
        pause = min(self.every, GRACE / 4, self.timeout / 4 or GRACE)
        written, alarmed = -self.every, None
        while not self._closed.wait(pause):
            since = time.monotonic() - self._progress
            if time.monotonic() - written >= self.every:
                written = time.monotonic()
                self._write(since)
            if alarmed is not None and alarmed != self._progress:  # it went on before the monitor's time was over
                (self.folder / "hang").unlink(missing_ok=True)
                (self.folder / f"stacks-{self.info.rank}.txt").unlink(missing_ok=True)
                alarmed = None
            if alarmed is None and self.timeout and (since > self.timeout or (self.folder / "hang").exists()):
                alarmed = self._progress
                self._end(since)

    def _write(self, since: float) -> None:
        content = {
            "rank": self.info.rank, "host": platform.node(), "pid": os.getpid(), "time": round(time.time(), 3),
            "every": self.every, "job": os.environ.get(JOB),
            "global_step": self._global_step, "doing": self._doing, "since": round(since, 1),
        }  # fmt: skip
        temporary = self.folder / f".rank-{self.info.rank}"
        with suppress(OSError):  # of a full disk others speak
            temporary.write_text(json.dumps(content))
            temporary.replace(self.folder / f"rank-{self.info.rank}.json")

    def _end(self, since: float) -> None:
        """Stacks of all threads into the log and the run's folder; then the process ends, once the others have done so, too."""
        rank, size = self.info.rank, self.info.world_size
        with suppress(OSError):
            (self.folder / "hang").open("x").close()
            write_event(self.out, "hang", self._global_step, rank=rank, doing=self._doing, seconds=round(since, 1))
        print(
            f"HANG: process {rank} of {size} on {platform.node()}: no progress for {since:.1f} s (resilience.hang_timeout "
            f"{self.timeout:g}), {self._doing}, {self._global_step} steps finished; its stacks:",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(file=2, all_threads=True)
        with suppress(OSError), (self.folder / f"stacks-{rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and len(list(self.folder.glob("stacks-*.txt"))) < size:
            time.sleep(0.1)
        if self.monitor is None:
            os._exit(HUNG)


@contextmanager
def watch(config: ResilienceConfig, out: Path, info: ProcessInfo) -> Iterator[Watchdog]:
    """Watches over this process while the block runs. Every rank must call it.

    Raises:
        UserError: NVIDIA's monitor was demanded and isn't there.
    """
    monitor, reason = _nvidia(config)
    if info.rank == 0:
        print(f"hang detection: {'NVIDIA rank monitor' if monitor else 'own'}: {reason}", file=sys.stderr, flush=True)
    watchdog = Watchdog(config, out, info, monitor)
    try:
        yield watchdog
    finally:
        watchdog.close()


def _nvidia(config: ResilienceConfig) -> tuple[Any, str]:
    """NVIDIA's client, or None; and why."""
    if config.hang_monitor == "own":
        return None, "resilience.hang_monitor says so"
    missing = None
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        missing = "nvidia_resiliency_ext is not installed"
    elif MONITOR not in os.environ:
        missing = "this process was not started by ft_launcher"
    elif not config.hang_timeout:
        missing = "resilience.hang_timeout is 0"
    if missing is not None:
        if config.hang_monitor == "nvidia":
            raise UserError(
                f"resilience.hang_monitor is nvidia, but {missing}: install nvidia-resiliency-ext and start the run with ft_launcher, "
                "or set it to auto."
            )
        return None, missing
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient  # type: ignore[import-not-found]

    client = RankMonitorClient()
    # ours, plus the time for the stacks, in place of the launcher's own time-outs
    timeout = config.hang_timeout + 2 * GRACE
    beats = {"initial": timeout, "subsequent": timeout, "were_calculated": True}
    client.load_state_dict({RankMonitorClient.CURRENT_TIMEOUTS_STATE_KEY: {"heartbeat": beats}})
    client.init_workload_monitoring()
    return client, "installed, and this process was started by ft_launcher, which also starts it again"
