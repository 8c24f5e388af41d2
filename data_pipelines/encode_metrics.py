"""What a driver of `videoar encode` counts; the Prometheus endpoint of its Ray node shows it, with `ray_` before the names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tokenizer.clip_shape import ClipShape

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
from ray.util.metrics import Counter, Gauge, Histogram

# from small clips on a GPU to long ones on a core
SHARD_SECONDS = [1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0]


class EncodeMetrics:
    """Counters and gauges of one driver, by variant where that makes sense; Ray adds the driver's own WorkerId.

    Where nothing collects them, counting is all that happens: some microseconds a shard.
    """

    def __init__(self):
        tags = ("variant",)
        self._clips = Counter("videoar_encode_clips_total", "Clips encoded.", tags)
        self._frames = Counter("videoar_encode_frames_total", "Video frames of the encoded clips.", tags)
        self._dead = Counter("videoar_encode_dead_letters_total", "Clips that could not be encoded.", tags)
        self._seconds = Histogram(
            "videoar_encode_shard_seconds",
            "Seconds from handing a raw shard to a worker to its receipt.",
            SHARD_SECONDS,
            tags,
        )
        self._waiting = Gauge("videoar_encode_waiting_clips", "Clips of the raw shards that no worker has yet.", tags)
        self._workers = Gauge("videoar_encode_workers", "Workers that are up.")
        self._restarts = Counter(
            "videoar_encode_worker_restarts_total", "Workers replaced because they died or failed at a shard."
        )

    def shard_done(self, variant: str, receipt: Mapping[str, Any], seconds: float | None = None) -> None:
        """Counts a finished shard.

        Args:
            variant: its name.
            receipt: its receipt.
            seconds: how long the worker took; None: nobody saw it finish.
        """
        tags, clips, dead = {"variant": variant}, receipt["rows_out"], len(receipt["dead"])
        # Ray's counters refuse to be raised by 0
        if clips:
            self._clips.inc(clips, tags)
            self._frames.inc(sum(ClipShape.parse(name).frames * rows for name, rows in receipt["shapes"].items()), tags)
        if dead:
            self._dead.inc(dead, tags)
        if seconds is not None:
            self._seconds.observe(seconds, tags)

    def worker_lost(self) -> None:
        """Counts a worker that is being replaced."""
        self._restarts.inc()

    def show(self, waiting: Mapping[str, int], workers: int) -> None:
        """Sets the gauges.

        Args:
            waiting: variant -> clips of the shards that no worker has.
            workers: workers that are up.
        """
        for variant, clips in waiting.items():
            self._waiting.set(clips, {"variant": variant})
        self._workers.set(workers)
