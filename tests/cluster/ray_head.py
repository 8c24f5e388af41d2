"""A real Ray cluster of one node, with token authentication, for tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from cluster.local import end_with_parent


class RayHead:
    """A head node.

    Args:
        ports: of the cluster itself, the dashboard and the metrics.
        token: of the cluster.
    """

    process: psutil.Process

    def __init__(self, ports: list[int], token: str):
        self.gcs, self.dashboard, self.metrics = (f"127.0.0.1:{port}" for port in ports)
        self.address, self.token = f"http://{self.dashboard}", token
        # only what a user has who has put the token where it belongs
        rest = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = rest | {
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "1000",
            "RAY_worker_niceness": "0",  # by default a busy machine brings Ray's workers to a standstill
            "OMP_NUM_THREADS": "1",
        }

    def get(self, path: str, host: str = "", method: str = "GET") -> str:
        """The reply of the dashboard, or of another host."""
        request = urllib.request.Request(f"http://{host or self.dashboard}{path}", method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read().decode()

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Submitted jobs by their ids."""
        return {job["submission_id"]: job for job in json.loads(self.get("/api/jobs/")) if job["submission_id"]}

    def process_with(self, is_it: Callable[[list[str]], bool]) -> psutil.Process:
        """The one process of the node whose command line is the one looked for, once it is there."""

        def found() -> list[psutil.Process]:
            return [process for process in self.process.children(recursive=True) if is_it(_words(process))]

        [process] = wait_until(found)
        return process

    def counted(self, prefix: str) -> dict[str, dict[tuple[str, str], float]]:
        """Metrics at the node's Prometheus endpoint: name without the prefix -> (driver's number, variant) -> value, no buckets."""
        found: dict[str, dict[tuple[str, str], float]] = {}
        for family in text_string_to_metric_families(self.get("/metrics", self.metrics)):
            for sample in family.samples:
                if sample.name.startswith(prefix) and "le" not in sample.labels:
                    # Ray names a driver by the job's number of eight digits, filled up with f
                    who = sample.labels["WorkerId"][:8], sample.labels.get("variant", "")
                    found.setdefault(sample.name.removeprefix(prefix), {})[who] = sample.value
        return found


@contextmanager
def ray_head(num_cpus: int) -> Iterator[RayHead]:
    """Starts a head node on free ports, and ends every process of it."""
    ports = _free_ports(5)
    head = RayHead(ports[:3], uuid.uuid4().hex)
    # short: the paths of Ray's sockets have at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="r-"))
    names = ("port", "dashboard-port", "metrics-export-port", "dashboard-agent-listen-port", "ray-client-server-port")
    log = folder / "head.log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--num-cpus={num_cpus}",
             *(f"--{name}={port}" for name, port in zip(names, ports)), "--dashboard-agent-grpc-port=0",
             f"--object-store-memory={100 << 20}", f"--temp-dir={folder}", "--include-log-monitor=false"],
            env=head.environment | {"RAY_AUTH_MODE": "token"}, stdout=out, stderr=out, preexec_fn=end_with_parent,
        )  # fmt: skip
    try:
        head.process = psutil.Process(process.pid)
        wait_until(lambda: process.poll() is not None or _answers(head))
        assert process.poll() is None, log.read_text()
        yield head
    finally:
        _end(process)
        shutil.rmtree(folder)


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The condition's first true value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [""]
    except psutil.Error:  # it has just ended
        return [""]


def _answers(head: RayHead) -> bool:
    try:
        return bool(head.get("/api/version"))
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()


def _end(process: subprocess.Popen) -> None:
    """SIGTERM to `ray start --block`, which ends the node; what is left goes the hard way."""
    if process.poll() is not None:
        return
    root = psutil.Process(process.pid)
    tree = [root, *root.children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(tree, timeout=30)
    for orphan in left:
        orphan.kill()
    process.wait()
