"""Batches that worker processes read ahead, every failure in time and in plain words.

torch's DataLoader notices by SIGCHLD that a worker has died, but says so wherever the main thread is, in the middle of a step, and
without a remedy. It puts a worker's traceback in front of a worker's error. Its time limit does not count while it waits for the memory
of a batch that a worker has announced; a worker that is stopped then stops the training for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tokenizer.errors import Fault, UserError

GRACE = 5.0
"""Seconds by which the reader outwaits its workers, whose own errors say what they could not read."""


class ReadAhead(Iterator[Any]):
    """The items of a dataset in a given order.

    Args:
        dataset: of whole batches.
        plan: the items, without end.
        num_workers: processes, at least 1.
        timeout: seconds that a worker may take for a batch before it raises an error of its own.
        what: names what is read, for messages.

    Raises:
        UserError: while reading, one that a worker raised; a Fault where a worker died or hangs. The workers have ended then.
    """

    def __init__(self, dataset: Dataset[Any], plan: Iterable[Any], num_workers: int, timeout: float, what: str):
        self.timeout, self.what = timeout, what
        loader = DataLoader(
            dataset,
            sampler=plan,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=num_workers,
            timeout=timeout + GRACE,
        )
        others = set(multiprocessing.active_children())
        self._iterator = iter(loader)
        self._workers = [process for process in multiprocessing.active_children() if process not in others]
        self._killed = False
        _DEATHS.watch()

    def __next__(self) -> Any:
        killer = threading.Timer(self.timeout + 2 * GRACE, self._kill)
        killer.daemon = True
        killer.start()
        try:
            with _DEATHS.heard():
                return next(self._iterator)
        except Exception as error:
            self._end(error)
            if (explained := self._explained(error)) is None:
                raise
            raise explained from error
        finally:
            killer.cancel()

    def _kill(self) -> None:
        self._killed = True
        for worker in self._workers:
            worker.kill()

    def _end(self, error: Exception) -> None:
        """Ends the workers without waiting for what they are at, which an outage may make long."""
        for worker in self._workers:
            worker.terminate()
            with suppress(ProcessLookupError):  # it is dead already
                os.kill(worker.pid or 0, signal.SIGCONT)  # one that was stopped would not take the first signal
        # torch's error refers to itself through its frames, and to the iterator: the garbage collector would join the workers
        # at any later time, in any thread
        for each in (error, error.__cause__):
            traceback.clear_frames(each.__traceback__ if each else None)
        self._iterator = iter(())
        _DEATHS.forget()

    def _explained(self, error: Exception) -> UserError | None:
        """torch's error in our words; None for one that is a fault of the program."""
        text = str(error)
        if "Original Traceback" in text:  # a worker's own
            if not isinstance(error, UserError):
                return None
            kind = type(error)
            return kind(text.rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip())
        about_workers = isinstance(error, RuntimeError) and text.startswith("DataLoader")
        if self._killed or (about_workers and "timed out" in text):
            return Fault(
                f"no batch of {self.what} came within {self.timeout:g} s, and the processes that read it say nothing: "
                "look at the machine and its disks, or allow more time (data_timeout)."
            )
        if isinstance(error, UserError):
            return error
        lost = about_workers or isinstance(error, (OSError, EOFError))  # the latter: it died while it sent a batch
        told_by = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error  # the former knows the signal
        return _lost(told_by, self.what) if lost else None


class _Deaths:
    """Handles SIGCHLD: what torch's handler raises wherever the main thread is, is raised only where batches are waited for."""

    def __init__(self) -> None:
        self._torch: Any = None
        self._waiting = False
        self._unsaid: RuntimeError | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self._torch(number, frame)
        except RuntimeError as error:
            if self._waiting:
                raise
            self._unsaid = error

    def watch(self) -> None:
        """To be called when workers have started. Only the main thread can have a handler; in another one the loader's time limit finds
        the death."""
        self.forget()
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is not self:
            self._torch = signal.signal(signal.SIGCHLD, self)

    def forget(self) -> None:
        """Whoever has died until now was meant to."""
        self._unsaid = None

    @contextmanager
    def heard(self) -> Iterator[None]:
        """In this block a death is an error, also one that came before it."""
        self._waiting = True
        try:
            if self._unsaid is not None:
                raise self._unsaid
            yield
        finally:
            self._waiting = False


_DEATHS = _Deaths()


def _lost(error: Exception, what: str) -> Fault:
    return Fault(
        f"a process that read {what} ahead has died ({' '.join(str(error).split()).rstrip('. ')}): if memory ran out, use fewer "
        "data_workers; start again, and the run goes on from its last checkpoint."
    )
