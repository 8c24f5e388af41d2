"""Commands that get killed: one start of a command with all its processes, and random moments in its life.

A moment is drawn from the events of an undisturbed run and their times (`Timeline`): it lies so and so long after an event. A disturbed
run waits for the event and then for that long, so that the moment means the same on a busy machine, too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil

POLL = 0.002
"""Seconds between two looks at a run's folder."""
LEAVE = 60.0
"""Seconds that what a killed process has started may take to end by itself."""
START, END = "start", "end"
HOUSE = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")

Events = Callable[[], Iterable[str]]
"""Tells which events of a run have come, by its folder."""


class Life:
    """One start of a `videoar` command, in a session of its own, so that all its processes can be found by it and nobody else's.

    Args:
        words: the sub-command and its arguments.
        log: a file that the output is appended to.
        ranks: processes under torchrun; 1: without it.
        preloaded: forks a process that has imported everything, instead of starting Python.
    """

    def __init__(self, words: list[str], log: Path, ranks: int = 1, preloaded: bool = False):
        self.log, self.started = log, time.monotonic()
        self._forked = self._command = None
        if preloaded:
            assert ranks == 1
            SERVER.set_forkserver_preload(["videoar", "data_pipelines.encode_pool", "pretrain.train"])
            self._forked = SERVER.Process(target=_videoar, args=(words, str(log)))
            self._forked.start()
            self.pid = self._forked.pid or 0
        else:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "videoar", *words]
            environment = os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            with log.open("ab") as out:
                self._command = subprocess.Popen(
                    command, cwd=HOUSE, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
                )  # fmt: skip
            self.pid = self._command.pid
        self.sessions = {self.pid}

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    def status(self) -> int | None:
        """The exit status of the process that was started, None while it lives."""
        return self._forked.exitcode if self._forked is not None else self._command.poll()  # type: ignore[union-attr]

    def members(self) -> list[psutil.Process]:
        """All processes of this start that live, orphans too."""
        try:
            # torchrun gives each of its processes a session of its own
            children = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        for child in children:
            self.sessions |= {_session(child.pid)} - {None, _session(os.getpid())}
        found = []
        for pid in psutil.pids():
            if _session(pid) in self.sessions:
                try:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
                except psutil.NoSuchProcess:
                    continue
        return found

    def kill(self) -> bool:
        """kill -9 of the process that was started alone; False if it had ended before."""
        self.members()  # so that its orphans are found later
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return self.wait() == -signal.SIGKILL

    def kill_tree(self) -> bool:
        """kill -9 of all processes; False if the one that was started had ended before."""
        while members := self.members():
            for process in members:
                _kill(process)
        return self.wait() == -signal.SIGKILL

    def kill_one(self, choose: Callable[[psutil.Process], bool], random: Random) -> bool:
        """kill -9 of one of the processes that `choose` picks, as soon as there is one; False if the command ended before."""
        while True:
            chosen = []
            for process in self.members():
                try:
                    if choose(process):
                        chosen.append(process)
                except psutil.NoSuchProcess:
                    continue
            if chosen and _kill(random.choice(chosen)):
                return True
            if self.status() is not None:
                return False
            time.sleep(POLL)

    def wait(self, seconds: float = 300.0) -> int:
        """The exit status of the process that was started, once it has ended.

        Raises:
            TimeoutError: it has not ended after so many seconds; then it has been killed.
        """
        deadline = time.monotonic() + seconds
        while (status := self.status()) is None:
            if time.monotonic() > deadline:
                self.kill_tree()
                raise TimeoutError(f"a command did not end in {seconds:.0f} s: see {self.log}.")
            time.sleep(POLL)
        return status

    def leave(self, agents: bool = True) -> tuple[float, list[str]]:
        """Waits for what it has started to end by itself, and kills the rest.

        Args:
            agents: wait for Ray's agents, too: up to a minute long they try to tell a dead server that their raylet is dead.

        Returns:
            how long that took, in seconds; and the titles of those that had to be killed.
        """
        started = time.monotonic()
        while True:
            titles = [
                title for title in map(_title, self.members()) if title and (agents or not title.endswith("Agent"))
            ]
            if not titles or time.monotonic() > started + LEAVE:
                break
            time.sleep(0.05)
        passed = time.monotonic() - started
        self.kill_tree()
        return passed, titles


@dataclass(frozen=True)
class Moment:
    """So many seconds after an event."""

    event: str
    delay: float

    def wait(self, life: Life, events: Events) -> bool:
        """Returns at this moment; False if the command has ended before."""
        while self.event != START and self.event not in set(events()):
            if life.status() is not None:
                return False
            time.sleep(POLL)
        at = life.started + self.delay if self.event == START else time.monotonic() + self.delay
        while (left := at - time.monotonic()) > 0:
            if life.status() is not None:
                return False
            time.sleep(min(left, POLL))
        return life.status() is None


class Timeline:
    """The events of an undisturbed run and when they came.

    Args:
        times: event -> seconds since the start, in their order, with START and END.
    """

    def __init__(self, times: dict[str, float]):
        self.times = times

    @property
    def seconds(self) -> float:
        """How long the run took."""
        return self.times[END]

    @classmethod
    def watch(cls, life: Life, events: Events) -> Timeline:
        """Records a run to its end.

        Raises:
            RuntimeError: it failed.
        """
        times = {START: 0.0}
        while life.status() is None:
            for event in events():
                times.setdefault(event, life.seconds)
            time.sleep(POLL)
        ended = life.seconds
        if life.status():
            raise RuntimeError(f"the undisturbed run ended with status {life.status()}: see {life.log}.")
        for event in events():
            times.setdefault(event, ended)
        return cls(times | {END: ended})

    def scaled(self, factor: float) -> Timeline:
        """The same events, so many times as long."""
        return Timeline({event: factor * seconds for event, seconds in self.times.items()})

    def draw(self, random: Random, come: Iterable[str], first: str = START, last: str = END) -> Moment | None:
        """A random moment of what is left of the run.

        Half of them are even in time; for the others every stretch between two events is as likely, so that short ones (a merge, the
        writing of a checkpoint) are hit as well.

        Args:
            random: draws it.
            come: events that an earlier start has seen: what lies after them is over.
            first, last: the moment lies between these events.

        Returns:
            None where nothing is left between the two.
        """
        names, over = list(self.times), set(come)
        inside = names[names.index(first) : names.index(last) + 1]
        stretches = [
            (event, self.times[after] - self.times[event])
            for event, after in zip(inside, inside[1:])
            if event == START or event not in over
        ]
        if not stretches:
            return None
        weights = (
            [length for _, length in stretches] if random.random() < 0.5 and any(s for _, s in stretches) else None
        )
        [(event, length)] = random.choices(stretches, weights)
        return Moment(event, random.random() * length)


def dead_segments(since: float) -> list[str]:
    """Names in /dev/shm that came after a time (seconds since the epoch) and that no process has open: nobody will remove them."""
    folder = Path("/dev/shm")
    young = {file for file in folder.rglob("*") if file.is_file() and file.lstat().st_ctime >= since}
    if not young:
        return []
    used = set()
    for pid in psutil.pids():
        try:
            used |= {
                Path(entry.path) for entry in psutil.Process(pid).memory_maps() if entry.path.startswith("/dev/shm/")
            }
            used |= {Path(os.readlink(link)) for link in Path(f"/proc/{pid}/fd").iterdir()}
        except (psutil.Error, OSError):
            continue
    return sorted(str(file) for file in young - used if file.exists())


def content(folder: Path) -> dict[str, bytes | None]:
    """All there is in a folder: path -> bytes, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def difference(one: dict[str, bytes | None], other: dict[str, bytes | None]) -> list[str]:
    """What is not the same, a word each."""
    missing = [f"{name} is missing" for name in one.keys() - other.keys()]
    more = [f"{name} is left over" for name in other.keys() - one.keys()]
    return sorted(
        missing + more + [f"{name} differs" for name in one.keys() & other.keys() if one[name] != other[name]]
    )


def _videoar(words: list[str], log: str) -> None:
    """The forked process: as `python -m videoar` would run."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # or what it starts would come from a fork server of its own
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from videoar import main

    sys.exit(main(words))


def _title(process: psutil.Process) -> str:
    """What it calls itself; "": it has ended."""
    try:
        return " ".join(process.cmdline()).strip()[:80]
    except psutil.NoSuchProcess:
        return ""


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _kill(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True
