"""The one thread that generates. What goes wrong in a job is that job's; the next one is taken."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from inference.pipeline import VideoARPipeline
from inference.serving import memory
from inference.serving.errors import DISK_FULL, disk_is_full
from inference.serving.jobs import CANCELLED, COMPLETED, FAILED, Job, JobStore
from inference.serving.metrics import Metrics
from tokenizer.errors import UserError
from tokenizer.video_file import write_video

SERVERS_FAULT = ("server_error", "disk_full")
"""Codes of jobs' errors that will not end by other requests."""
MOST_FAILURES = 3
"""After so many in a row no videos are being made: a GPU that is lost fails every job."""
log = logging.getLogger("videoar.serve")


class _Cancelled(Exception):
    """Nobody wants the rest."""


class Worker(threading.Thread):
    """Takes job after job from the queue until the store is stopped.

    Args:
        pipe: the model.
        store: the jobs.
        metrics: what is counted.
    """

    def __init__(self, pipe: VideoARPipeline, store: JobStore, metrics: Metrics):
        # a frame may take long: the end of the process does not wait for it
        super().__init__(name="videoar-worker", daemon=True)
        self.pipe, self.store, self.metrics = pipe, store, metrics
        self.failures = 0  # one after the other, by the server's own fault

    @property
    def well(self) -> bool:
        """Whether videos are being made."""
        return self.is_alive() and self.failures < MOST_FAILURES

    def run(self) -> None:
        """Until the store is stopped."""
        while (job := self.store.take()) is not None:
            start, error = time.monotonic(), None
            try:
                self._generate(job, start)
                status = COMPLETED
            except _Cancelled:
                status = CANCELLED
            except Exception as problem:  # whatever it is, the server lives on
                status, error = FAILED, _explained(problem, job)
            if error is not None and error[0] == "out_of_memory":
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if status == COMPLETED:
                self.failures = 0
            elif error is not None and error[0] in SERVERS_FAULT:
                self.failures += 1
            seconds = time.monotonic() - start
            self.store.finish(job, status, seconds, error, lambda status, seconds=seconds: self._count(status, seconds))

    def _count(self, status: str, seconds: float) -> None:
        self.metrics.jobs.labels(status).inc()
        if status == COMPLETED:
            self.metrics.seconds.observe(seconds)

    def _generate(self, job: Job, start: float) -> None:
        """Frames as they come: a JPEG each for those who watch, and pixels on disk for the video."""
        wanted, shape = job.wanted, (job.wanted.num_frames, *job.wanted.size, 3)
        if shutil.disk_usage(job.folder).free < job.raw_bytes:  # better now than after an hour
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(job.raw_file))
        given = np.load(job.given_file, mmap_mode="r", allow_pickle=False) if job.given else None
        if self.pipe.device.type != "cuda":  # whose allocator says by itself that it has too little
            memory.check(memory.needed(self.pipe, wanted, 0 if given is None else len(given)), memory.available())
        frames = self.pipe.stream(
            num_frames=wanted.num_frames, guidance=wanted.guidance, temperature=wanted.temperature, seed=wanted.seed,
            size=wanted.size, **self._condition(wanted.prompt), **_condition_frames(job, given),
        )  # fmt: skip
        # on disk: memory does not grow with the length. Written, not mapped: a full disk is an error then, no signal that ends the process
        with job.raw_file.open("wb") as raw:
            for chunk in frames:
                for frame in chunk:
                    raw.write(np.ascontiguousarray(frame).data)
                    _write_frame(frame, job.frame_file(job.frames_done))
                    if job.frames_done == 0:
                        self.metrics.first_frame.observe(time.monotonic() - start)
                    job.frames_done += 1
                self.metrics.frames.inc(len(chunk))
                job.changed()
                if job.cancelled or self.store.stopped:
                    raise _Cancelled
        write_video(np.memmap(job.raw_file, np.uint8, "r", shape=shape), job.video_file, self.pipe.fps)

    def _condition(self, prompt: str) -> dict[str, Any]:
        if self.pipe.config.num_classes and not self.pipe.class_names:
            return {"class_label": int(prompt)}
        return {"prompt": prompt}


def _condition_frames(job: Job, given: np.ndarray | None) -> dict[str, Any]:
    if given is None:
        return {}
    return {"image": given[0]} if job.given == "image" else {"video": given}


def _write_frame(frame: np.ndarray, file: Path) -> None:
    buffer = io.BytesIO()
    # full chroma: small frames are shown enlarged
    Image.fromarray(frame).save(buffer, "JPEG", quality=92, subsampling=0)
    file.write_bytes(buffer.getvalue())


def _explained(problem: Exception, job: Job) -> tuple[str, str]:
    """Code and message for the job's client; the log gets all of it."""
    if isinstance(problem, memory.TooMuchMemory):
        return "out_of_memory", str(problem)
    if isinstance(problem, UserError):
        return "invalid_request", str(problem)
    log.error("%s failed", job.id, exc_info=problem)
    if disk_is_full(problem):
        return DISK_FULL
    # torch's CPU allocator raises a plain RuntimeError
    if isinstance(problem, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(problem):
        return "out_of_memory", "the server ran out of memory for this video: ask for a shorter or a smaller one."
    return (
        "server_error",
        "the server failed at this video: try again, and tell its owner, whose log says why, if it fails again.",
    )
