"""A model that makes videos for clients: the jobs, the thread that works on them, and where their files lie."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from inference.pipeline import VideoARPipeline
from inference.serving.config import ServeConfig
from inference.serving.jobs import JobStore
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
        self.folder = Path(tempfile.mkdtemp(prefix="videoar-serve-"))
        self.store = JobStore(self.folder, config.max_queue, config.keep_videos, config.keep_bytes)
        self.metrics = Metrics(self.store)
        self.worker = Worker(pipe, self.store, self.metrics)

    def start(self) -> None:
        """Starts to work on jobs."""
        self.worker.start()

    def close(self, seconds: float = 10.0) -> None:
        """Stops after the frames that are at work, at most so many seconds later, and removes all files."""
        self.store.stop()
        if self.worker.ident is not None:
            self.worker.join(seconds)
        shutil.rmtree(self.folder, ignore_errors=True)
