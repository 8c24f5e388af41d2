"""Jobs: one video each, in a bounded queue, with their files in a folder that goes when the server ends."""

from __future__ import annotations

import asyncio
import math
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = "queued", "in_progress", "completed", "failed", "cancelled"


@dataclass(frozen=True)
class Wanted:
    """What a client asks for, checked.

    Args:
        prompt: what to show.
        num_frames: frames, 1+4n.
        size: (height, width) in pixels.
        seed: of the noise.
        guidance: a schedule's name or a number.
        temperature: of the drawn bits.
    """

    prompt: str
    num_frames: int
    size: tuple[int, int]
    seed: int
    guidance: str | float
    temperature: float


class QueueFull(Exception):
    """As many jobs wait as may.

    Args:
        retry_after: seconds after which a place may be free.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full: try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """One video: what is wanted, how far it is, and where its files lie.

    Args:
        folder: its own; the files' names are the server's.
        wanted: what to make.
        given: "image" or "video" where frames are given (in given.npy).
        id: what clients name it by; it can't be guessed.
    """

    folder: Path
    wanted: Wanted
    given: str | None = None
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(16)}")
    status: str = QUEUED
    frames_done: int = 0
    created_at: int = field(default_factory=lambda: int(time.time()))
    started_at: int | None = None
    completed_at: int | None = None
    error: tuple[str, str] | None = None  # code and message
    bytes: int = 0
    cancelled: bool = False
    _watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in (COMPLETED, FAILED, CANCELLED)

    @property
    def given_file(self) -> Path:
        """uint8 [n, H, W, 3], as an array file."""
        return self.folder / "given.npy"

    @property
    def video_file(self) -> Path:
        """The finished video."""
        return self.folder / "video.mp4"

    def variant_file(self, variant: str) -> Path:
        """The finished video as another kind of file, or as an mp4."""
        return self.video_file.with_suffix(f".{variant}")

    @property
    def raw_file(self) -> Path:
        """All pixels, while the video is made."""
        return self.folder / "frames.raw"

    @property
    def raw_bytes(self) -> int:
        """Of `raw_file`, when the video is whole."""
        return 3 * self.wanted.num_frames * self.wanted.size[0] * self.wanted.size[1]

    def frame_file(self, index: int) -> Path:
        """A finished frame."""
        return self.folder / f"{index:06d}.jpg"

    @contextmanager
    def watched(self) -> Iterator[asyncio.Event]:
        """An event of the running loop that is set whenever the job gets on."""
        watcher = (asyncio.get_running_loop(), asyncio.Event())
        self._watchers.append(watcher)
        try:
            yield watcher[1]
        finally:
            self._watchers.remove(watcher)

    def changed(self) -> None:
        """Wakes all that watch; called from any thread."""
        for loop, event in list(self._watchers):
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(event.set)


class JobStore:
    """All jobs, the queue among them. Every method may be called from any thread.

    Args:
        folder: where the jobs' folders are made.
        max_queue: jobs that may wait.
        keep_videos: finished jobs that are kept, the newest.
        keep_bytes: of all jobs' files together: the oldest finished ones go to make room, also for those that wait and the one that runs.
    """

    def __init__(self, folder: Path, max_queue: int, keep_videos: int, keep_bytes: int):
        self.folder, self.max_queue, self.keep_videos, self.keep_bytes = folder, max_queue, keep_videos, keep_bytes
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._reserved: set[Path] = set()
        self._durations: deque[float] = deque(maxlen=20)
        self._change = threading.Condition()
        self._stopped = False

    @contextmanager
    def place(self) -> Iterator[Path]:
        """Holds a place in the queue while a request is read and checked, so that uploads in flight are bounded, too.

        Yields:
            A folder for a job; it goes unless `add` took it.

        Raises:
            QueueFull: no place is free.
        """
        with self._change:
            if len(self._waiting) + len(self._reserved) >= self.max_queue:
                mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
                raise QueueFull(min(3600, max(1, math.ceil(mean))))
            folder = self.folder / secrets.token_hex(16)
            self._reserved.add(folder)
        try:
            folder.mkdir()
            yield folder
        finally:
            with self._change:
                unused = folder in self._reserved
                self._reserved.discard(folder)
            if unused:
                shutil.rmtree(folder, ignore_errors=True)

    def add(self, job: Job) -> None:
        """Puts a job at the queue's end; inside `place`."""
        job.bytes = _size(job.folder)
        with self._change:
            self._reserved.discard(job.folder)
            self._jobs[job.id] = job
            self._waiting.append(job)
            gone = self._evicted()
            self._change.notify_all()
        _delete(gone)

    def take(self) -> Job | None:
        """The next job, as soon as there is one; None: the server ends."""
        with self._change:
            while not self._waiting and not self._stopped:
                self._change.wait()
            if self._stopped:
                return None
            job = self._waiting.popleft()
            job.status, job.started_at = RUNNING, int(time.time())
            job.bytes += job.raw_bytes
            gone = self._evicted()
        _delete(gone)
        job.changed()
        return job

    def finish(
        self,
        job: Job,
        status: str,
        seconds: float,
        error: tuple[str, str] | None = None,
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Records how a job ended, and drops the oldest finished ones if there are too many.

        Args:
            job: the one that ran.
            status: how it ended.
            seconds: that it ran.
            error: code and message.
            count: called with the status that is recorded; before clients see it, as are all other effects.
        """
        for file in (job.raw_file, job.given_file):  # nobody reads them again
            file.unlink(missing_ok=True)
        size = _size(job.folder)
        with self._change:
            job.bytes = size
            gone = self._evicted(ending=job)
        _delete(gone)
        with self._change:
            status = CANCELLED if job.cancelled else status
            if status == COMPLETED:
                self._durations.append(seconds)
            count(status)
            job.error, job.completed_at, job.status = error, int(time.time()), status
        if job.cancelled:
            _delete([job])
        job.changed()

    def grown(self, job: Job) -> None:
        """A finished job has one more file.

        Args:
            job: which stays; older ones may have to go.
        """
        size = _size(job.folder)
        with self._change:
            job.bytes = size
            gone = self._evicted(spared=job) if job.id in self._jobs else [job]  # deleted while the file was made
        _delete(gone)

    def _evicted(self, ending: Job | None = None, spared: Job | None = None) -> list[Job]:
        """Takes the oldest finished jobs from the list, as many as have to go; their files are still there."""
        ended = sorted((job for job in self._jobs.values() if job.ended), key=lambda job: job.completed_at or 0)
        count, total = len(ended) + (ending is not None), sum(job.bytes for job in self._jobs.values())
        gone = []
        # the newest stays in any case: its client has not had it yet
        for job in ended if ending is not None else ended[:-1]:
            if count <= self.keep_videos and total <= self.keep_bytes:
                break
            if job is not spared:
                gone.append(self._jobs.pop(job.id))
                count, total = count - 1, total - job.bytes
        return gone

    def get(self, name: str) -> Job | None:
        """A job by its id."""
        with self._change:
            return self._jobs.get(name)

    def remove(self, name: str) -> Job | None:
        """Forgets a job: a queued one never runs, a running one stops after the frames that it is at, a finished one's files go."""
        with self._change:
            job = self._jobs.pop(name, None)
            if job is None:
                return None
            job.cancelled = True
            was, job.status = job.status, CANCELLED
            if was == QUEUED:
                self._waiting.remove(job)
        if was != RUNNING:  # a running one's files are the worker's
            shutil.rmtree(job.folder, ignore_errors=True)
        job.changed()
        return job

    def listed(self) -> list[Job]:
        """All jobs, the oldest first."""
        with self._change:
            return list(self._jobs.values())

    def position(self, job: Job) -> int | None:
        """How many jobs wait before it; None: it does not wait."""
        with self._change:
            return self._waiting.index(job) if job in self._waiting else None

    def waiting(self) -> int:
        """The queue's length."""
        with self._change:
            return len(self._waiting)

    @property
    def stopped(self) -> bool:
        """Whether the server is about to end."""
        return self._stopped

    def stop(self) -> None:
        """Ends it: nothing more is taken, and all that watch are woken."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
            jobs = list(self._jobs.values())
        for job in jobs:
            job.changed()


def _delete(jobs: list[Job]) -> None:
    """Their files."""
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)


def _size(folder: Path) -> int:
    """Bytes of a folder's files."""
    total = 0
    with suppress(FileNotFoundError):  # the folder went meanwhile
        for file in folder.iterdir():
            total += file.stat().st_size
    return total
