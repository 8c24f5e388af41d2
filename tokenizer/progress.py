"""Progress for long work: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class Meter:
    """Counts finished items of `total`; `note` is a short text beside the bar (a loss, a rate).

    Args:
        label: what is being done.
        total: the number of items (None: unknown).
        every: seconds between two plain lines where there is no terminal.
        done: items that an earlier start has finished.
    """

    def __init__(self, label: str, total: int | None = None, every: float = 10.0, done: int = 0):
        self.label, self.total, self.every = label, total, every
        self.done, self.before, self.note = done, done, ""
        self.started = self.last_print = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                transient=False,
            )
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind, value, trace) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._print()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Records `count` more finished items."""
        self.done += count
        self.note = note or self.note
        if self._bar:
            self._bar.update(self._task, completed=self.done, note=self.note)
        elif time.monotonic() - self.last_print >= self.every:
            self._print()

    def _print(self) -> None:
        self.last_print = time.monotonic()
        elapsed = self.last_print - self.started
        rate = (self.done - self.before) / max(elapsed, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total and rate > 0 else ""
        of = f"/{self.total}" if self.total else ""
        print(
            f"{self.label}: {self.done}{of} ({rate:.2f}/s, {elapsed:.0f} s{left}) {self.note}",
            file=sys.stderr,
            flush=True,
        )


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and shows how many are done.

    Args:
        items: anything that can be iterated over.
        label: what is being done.
        total: the number of items where `len(items)` does not tell it.
    """
    count = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    with Meter(label, count) as meter:
        for item in items:
            yield item
            meter.advance()
