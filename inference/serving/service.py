"""A model that makes videos for clients: the jobs, the thread that works on them, and where their files lie."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from inference.pipeline import VideoARPipeline
from inference.serving import memory
from inference.serving.config import ServeConfig
from inference.serving.errors import refused
from inference.serving.jobs import JobStore, Wanted
from inference.serving.metrics import Metrics
from inference.serving.worker import Worker


class VideoService:
    """Everything behind the HTTP interface.

    Args:
        pipe: the model.
        name: what clients call it.
        config: the limits.
        api_key: what clients have to send; None: nothing.
    """

    def __init__(self, pipe: VideoARPipeline, name: str, config: ServeConfig, api_key: str | None = None):
        self.pipe, self.name, self.config, self.api_key = pipe, name, config, api_key
        self._memory = memory.available(pipe.device)
        self.folder = Path(tempfile.mkdtemp(prefix="videoar-serve-"))
        self.store = JobStore(self.folder, config.max_queue, config.keep_videos, config.keep_bytes)
        self.metrics = Metrics(self.store)
        self.worker = Worker(pipe, self.store, self.metrics)

    def start(self) -> None:
        """Starts to work on jobs."""
        self.worker.start()

    def check_memory(self, wanted: Wanted, given: int = 0) -> None:
        """Refuses what no wait would make room for: whether there is room just now is seen when the job's turn has come.

        Args:
            wanted: what to make.
            given: frames that it begins with.

        Raises:
            ApiError: it needs more memory than this server has.
        """
        there = max(self._memory, memory.available(self.pipe.device))
        try:
            memory.check(memory.needed(self.pipe, wanted, given), there)
        except memory.TooMuchMemory as error:
            raise refused("too_much_memory", str(error)) from None

    def close(self, seconds: float = 10.0) -> None:
        """Stops after the frames that are at work, at most so many seconds later, and removes all files."""
        self.store.stop()
        if self.worker.ident is not None:
            self.worker.join(seconds)
        shutil.rmtree(self.folder, ignore_errors=True)
