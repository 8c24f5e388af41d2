"""Which batches of a run are left out, because a step on them was bad. The steps' numbers are those of the batches that were trained on.

A run is a function of its settings and of this list. It is kept twice: in each checkpoint's position, and as events, which no
resume cuts back, so that a run that was killed before the next checkpoint leaves out the same batches again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

EVENT = "bad_step"


@dataclass(frozen=True)
class Skip:
    """Batches first..last of a stage's data, counted from 0, that are left out.

    Args:
        stage: its number.
        first, last: of the stage's batches, those left out counted too.
        global_step: finished steps when the bad one was found.
        action: "skip" or "rollback".
        reason: what was wrong.
    """

    stage: int
    first: int
    last: int
    global_step: int
    action: str
    reason: str


class Skips:
    """All of them."""

    def __init__(self) -> None:
        self.entries: list[Skip] = []

    def add(self, skip: Skip) -> None:
        """Notes one, unless it is known."""
        if skip not in self.entries:
            self.entries.append(skip)

    def covers(self, stage: int, batch: int) -> bool:
        """Whether a batch is left out."""
        return any(skip.stage == stage and skip.first <= batch <= skip.last for skip in self.entries)

    def count(self, stage: int) -> int:
        """Bad steps of a stage so far."""
        return sum(skip.stage == stage for skip in self.entries)

    def to_list(self) -> list[dict[str, Any]]:
        """For the checkpoint."""
        return [asdict(skip) for skip in self.entries]

    def read(self, position: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]]) -> None:
        """Takes in what a checkpoint's position and a run's events tell."""
        names = Skip.__dataclass_fields__
        for entry in (*position, *(event for event in events if event["event"] == EVENT)):
            self.add(Skip(**{name: entry[name] for name in names}))
