"""One run of a command under kills: start, kill at random moments, start again until it ends by itself, and look at what is there."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from benchmarks.kills import END, START, Life, Moment, Timeline, dead_segments

TRIES = 5
"""How often a run is begun anew whose first kill came after its end."""
PATIENCE = 10.0
"""Seconds for a shared memory segment that is just being made to be opened or removed."""


@dataclass(frozen=True)
class Kill:
    """One kill that hit.

    Args:
        kind: what was killed.
        life: which start of the command it was, from 0.
        moment: what it waited for.
        seconds: since that start.
        where: in which part of its work the run was.
        detail: how far it was.
    """

    kind: str
    life: int
    moment: Moment
    seconds: float
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} killed at {self.seconds:.2f} s of start {self.life + 1}, {self.where} ({self.detail})"


@dataclass
class Outcome:
    """What became of a run.

    Args:
        kills: those that hit.
        starts: of the command.
        problems: what is not as in an undisturbed run.
        seconds: it took.
        leave_seconds: after the last start's end until everything that had been started was gone.
        left: titles of processes that did not go by themselves.
        shared_memory: segments that nobody will remove.
    """

    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    leave_seconds: float = 0.0
    left: list[str] = field(default_factory=list)
    shared_memory: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether it ended as an undisturbed run does."""
        return not self.problems


class Scene(ABC):
    """A command with its inputs, and what it leaves when nobody disturbs it.

    Args:
        folder: for everything.
        preloaded: see `Life`.
    """

    name: str
    kinds: tuple[str, ...]
    """What can be killed; the runs take turns."""
    ranks = 1

    def __init__(self, folder: Path, preloaded: bool):
        self.folder, self.preloaded, self.ended = folder, preloaded, 0.0
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def words(self, out: Path) -> list[str]:
        """The command."""

    @abstractmethod
    def events(self, out: Path) -> list[str]:
        """What has come."""

    @abstractmethod
    def kill(self, life: Life, kind: str, random: Random) -> bool:
        """Kills; False if there was nothing left to kill."""

    @abstractmethod
    def mark(self, out: Path) -> object:
        """What `where` compares with, taken at the start of a life."""

    @abstractmethod
    def where(self, out: Path, mark: object) -> tuple[str, str]:
        """In which part of its work a killed run was, and how far."""

    @abstractmethod
    def problems(self, out: Path) -> list[str]:
        """How a finished run differs from the undisturbed one."""

    def killed_problems(self, out: Path) -> list[str]:
        """What must not be in the folder of a run that was just killed."""
        return []

    def window(self, kind: str) -> tuple[str, str]:
        """Between which events this kind of kill makes sense."""
        return START, END

    def goes_on(self, kind: str) -> bool:
        """Whether the command that was started survives this kind of kill."""
        return False

    def start(self, out: Path) -> Life:
        """Starts the command."""
        return Life(self.words(out), self.folder / f"{out.name}.log", self.ranks, self.preloaded)

    def undisturbed(self) -> Timeline:
        """Runs the command once, and keeps its times and its output."""
        out = self.folder / "undisturbed"
        life = self.start(out)
        self.timeline = Timeline.watch(life, lambda: self.events(out))
        life.leave()
        return self.timeline

    def disturbed(self, number: int, seed: int, most_kills: int = 3, agents: bool = True) -> Outcome:
        """Runs the command with one to three kills.

        Args:
            number: of the run; with the seed it decides what is killed and when.
            seed: of all runs.
            most_kills: at most so many of them.
            agents: see `Life.leave`.
        """
        random, outcome, began = Random(f"{seed} {self.name} {number}"), Outcome(), time.time()
        wanted = min(most_kills, random.choices((1, 2, 3), (5, 3, 2))[0])
        out = self.folder / f"{number}"
        for _ in range(TRIES):
            shutil.rmtree(out, ignore_errors=True)
            self._live(out, self.kinds[number % len(self.kinds)], wanted, random, outcome, agents)
            if outcome.kills:
                break
            # it was faster than the undisturbed one: the machine has more time for it now
            self.timeline = self.timeline.scaled(min(1.0, self.ended / self.timeline.seconds))
        else:
            outcome.problems.append(f"no kill came in time in {TRIES} tries")
        outcome.problems += self.problems(out)
        deadline = time.monotonic() + PATIENCE
        while (dead := dead_segments(began)) and time.monotonic() < deadline:
            time.sleep(0.1)
        outcome.shared_memory = dead
        outcome.seconds = time.time() - began
        if outcome.equal:
            shutil.rmtree(out)
        return outcome

    def _live(self, out: Path, kind: str, wanted: int, random: Random, outcome: Outcome, agents: bool) -> None:
        lives, mark = [self.start(out)], self.mark(out)
        for _ in range(wanted):
            moment = self.timeline.draw(random, self.events(out), *self.window(kind))
            if moment is None or not moment.wait(lives[-1], lambda: self.events(out)):
                break
            seconds = lives[-1].seconds
            if not self.kill(lives[-1], kind, random):
                break
            kill = Kill(kind, len(lives) - 1, moment, seconds, *self.where(out, mark))
            outcome.kills.append(kill)
            if not self.goes_on(kind):
                outcome.problems += [f"{problem} after {kill}" for problem in self.killed_problems(out)]
                mark = self.mark(out)
                lives.append(self.start(out))
            kind = random.choice(self.kinds)
        outcome.starts += len(lives)
        try:
            status: int | str = lives[-1].wait()
            self.ended = lives[-1].seconds
        except TimeoutError:
            status = "none, it stood still"
        if status:
            outcome.problems.append(f"the last start ended with status {status}: see {lives[-1].log}")
        for life in lives:
            seconds, titles = life.leave(agents)
            outcome.leave_seconds = max(outcome.leave_seconds, seconds)
            outcome.left += titles


def summary(name: str, scenes: Sequence[Scene], outcomes: Sequence[Outcome]) -> dict[str, object]:
    """What the runs of a kind say together."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    return {
        f"{name}_runs": len(outcomes),
        f"{name}_equal": sum(outcome.equal for outcome in outcomes),
        f"{name}_kills": len(kills),
        f"{name}_starts": sum(outcome.starts for outcome in outcomes),
        f"{name}_killed": _counts(kill.kind for kill in kills),
        f"{name}_where": _counts(kill.where for kill in kills),
        f"{name}_left_processes": sum(len(outcome.left) for outcome in outcomes),
        f"{name}_left_shared_memory": sum(len(outcome.shared_memory) for outcome in outcomes),
        f"{name}_orphans_gone_after_seconds": round(max(outcome.leave_seconds for outcome in outcomes), 1),
        f"{name}_undisturbed_seconds": [round(scene.timeline.seconds, 1) for scene in scenes],
        f"{name}_seconds": round(sum(outcome.seconds for outcome in outcomes)),
    }


def _counts(words) -> dict[str, int]:
    listed = list(words)
    return {word: listed.count(word) for word in sorted(set(listed))}
