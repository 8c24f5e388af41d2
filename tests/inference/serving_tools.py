"""A real server of a tiny model on a free port, in a thread of this process, for tests that look behind its HTTP interface."""

from __future__ import annotations

import errno
import io
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from inference.pipeline import VideoARPipeline
from inference.serving import ServeConfig
from inference.serving.app import create_app
from inference.serving.server import bound_socket
from inference.serving.service import VideoService


@dataclass
class Running:
    """A server that listens.

    Args:
        url: its address.
        service: what is behind it.
        http: a client of it.
        connections: uvicorn's, which are open.
    """

    url: str
    service: VideoService
    http: httpx.Client
    connections: set[Any]

    def make(self, **fields: Any) -> dict[str, Any]:
        """Asks for a video; its job."""
        answer = self.http.post("/v1/videos", json={"prompt": "a red circle", "num_frames": 9, "seed": 1, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def upload(self, content: bytes, name: str = "file", **fields: Any) -> httpx.Response:
        """Asks for a video with a file."""
        fields = {"prompt": "a red circle", "num_frames": "9", "seed": "1", **fields}
        return self.http.post("/v1/videos", data=fields, files={"input_reference": (name, content)})

    def job(self, name: str) -> dict[str, Any]:
        """A job's state."""
        return self.http.get(f"/v1/videos/{name}").json()

    def wait(self, name: str, *statuses: str, seconds: float = 30.0) -> dict[str, Any]:
        """A job as soon as its status is one of these; none: when it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            job = self.job(name)
            if job["status"] in (statuses or ("completed", "failed", "cancelled")):
                return job
            time.sleep(0.01)
        raise AssertionError(f"the job is still {job['status']}")

    def wait_for(self, fits: Callable[[], bool], seconds: float = 30.0) -> None:
        """Until something is the case."""
        end = time.monotonic() + seconds
        while not fits():
            assert time.monotonic() < end
            time.sleep(0.01)

    def metric(self, line: str) -> float:
        """The value of one line of /metrics."""
        for text in self.http.get("/metrics").text.splitlines():
            if text.startswith(f"{line} "):
                return float(text.rsplit(" ", 1)[1])
        return 0.0


@contextmanager
def running(pipe: Any, api_key: str | None = None, **settings: Any) -> Iterator[Running]:
    """A server of `pipe`; it and its files are gone afterwards."""
    config = ServeConfig(port=0, **settings)
    service = VideoService(pipe, "tiny", config, api_key)
    listener = bound_socket(config)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            log_level="critical",
            access_log=False,
            http="h11",
            lifespan="off",
            timeout_graceful_shutdown=5,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    service.start()
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        while not server.started:
            time.sleep(0.005)
        with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
            yield Running(url, service, http, server.server_state.connections)
    finally:
        service.store.stop()
        if isinstance(pipe, Paced):
            pipe.allow()  # else it waits for ever
        server.should_exit = True
        thread.join(20)
        service.close()
        assert not thread.is_alive() and not service.worker.is_alive() and not service.folder.exists()


@contextmanager
def small_disk(folder: Path, size: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of so many bytes, on which servers that are made meanwhile put their files."""
    disk = folder / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is free."""
    file = disk / "filler"
    with file.open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return file


class Paced:
    """A real pipeline whose chunks of frames come one at a time, when the test lets them.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: VideoARPipeline):
        self._pipe, self._allowed = pipe, threading.Semaphore(0)
        self.asked = self.chunks = 0  # chunks that were to come, and that came

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def allow(self, chunks: int = 10**6) -> None:
        """So many more chunks may come."""
        self._allowed.release(chunks)

    def stream(self, **options: Any) -> Iterator[np.ndarray]:
        """As the pipeline's."""
        parts = self._pipe.stream(**options)

        def paced() -> Iterator[np.ndarray]:
            for part in parts:
                self.asked += 1
                self._allowed.acquire()
                self.chunks += 1
                yield part

        return paced()


def picture(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def film(folder: Path, frames: int, size: int = 64, fps: int = 8, name: str = "film.mp4") -> bytes:
    """A real video file's bytes."""
    file = folder / name
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            pixels = np.full((size, size, 3), 255 * index // max(1, frames - 1), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.read_bytes()
