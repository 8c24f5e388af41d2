"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference.serving.jobs import JobStore


class Metrics:
    """Counters of one server.

    Args:
        store: whose queue is measured.
    """

    def __init__(self, store: JobStore):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "videoar_requests_total", "HTTP requests answered.", ["method", "path", "status"], registry=self.registry
        )
        self.jobs = Counter("videoar_jobs_total", "Jobs that ended, by how.", ["status"], registry=self.registry)
        self.frames = Counter("videoar_frames_total", "Frames generated.", registry=self.registry)
        self.seconds = Histogram(
            "videoar_job_seconds", "Seconds from a job's start to its finished file.", registry=self.registry,
            buckets=(0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
        )  # fmt: skip
        self.first_frame = Histogram(
            "videoar_first_frame_seconds", "Seconds from a job's start to its first frame.", registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )  # fmt: skip
        Gauge("videoar_queue_length", "Jobs that wait.", registry=self.registry).set_function(store.waiting)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
