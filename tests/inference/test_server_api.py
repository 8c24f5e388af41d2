"""The HTTP interface: jobs from their making to their end, over real HTTP with a real model."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import threading
import time
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.responses import PlainTextResponse
from starlette.types import Message

from inference.serving import ServeConfig, variants
from inference.serving.app import create_app
from inference.serving.guard import Guard
from inference.serving.jobs import COMPLETED, RUNNING, Job, JobStore, Wanted
from inference.serving.metrics import Metrics
from inference.serving.service import VideoService
from tests.inference.serving_tools import Paced, Running, film, picture, running
from tests.inference.test_pipeline import pixels, tiny_pipeline
from tokenizer import UserError, settings
from tokenizer.video_file import write_video


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def server(pipe):
    with running(pipe, max_queue=8) as server:
        yield server


def decoded(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def off(frames: np.ndarray, expected: np.ndarray, folder: Path) -> float:
    """Mean difference from what the expected frames become in the same kind of file."""
    write_video(expected, folder / "expected.mp4", 8)
    encoded = decoded((folder / "expected.mp4").read_bytes())
    assert frames.shape == encoded.shape
    return float(np.abs(frames.astype(int) - encoded).mean())


def events(text: str) -> list[tuple[str, dict]]:
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    return [(kind, json.loads(data)) for kind, data in found]


def test_a_video_from_request_to_file(server: Running, pipe, tmp_path):
    made = server.make(seconds=1.0, num_frames=None, guidance=2.5, temperature=0.5, seed=7, size="48x32")
    assert made["status"] in ("queued", "in_progress") and made["object"] == "video" and made["id"].startswith("video_")
    assert (made["seconds"], made["num_frames"], made["size"], made["seed"]) == ("1.125", 9, "48x32", 7)
    job = server.wait(made["id"])
    assert (job["status"], job["progress"], job["error"], job["model"]) == ("completed", 100, None, "tiny")
    assert job["created_at"] <= job["started_at"] <= job["completed_at"] <= time.time()
    content = server.http.get(f"/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    frames = decoded(content.content)
    expected = pipe("a red circle", num_frames=9, guidance=2.5, temperature=0.5, seed=7, size=(32, 48)).frames
    assert off(frames, expected, tmp_path) < 1.5  # streamed pixels are rounded otherwise in places
    part = server.http.get(f"/v1/videos/{job['id']}/content", headers={"Range": "bytes=4-7"})
    assert part.status_code == 206 and part.content == content.content[4:8] == b"ftyp"


def test_defaults_are_the_models_and_the_seed_is_told(server: Running, pipe):
    first, second = (server.http.post("/v1/videos", json={"prompt": "a square"}).json() for _ in range(2))
    assert (first["num_frames"], first["size"], first["fps"]) == (9, "32x32", 8.0)
    assert first["guidance"] == "t2v" and first["temperature"] == 1.0 and first["seed"] != second["seed"]
    assert server.wait(first["id"])["status"] == server.wait(second["id"])["status"] == "completed"


def test_variants(server: Running, monkeypatch):
    job = server.wait(server.make()["id"])
    plain = server.service.store.get(job["id"]).bytes
    gif = server.http.get(f"/v1/videos/{job['id']}/content", params={"variant": "gif"})
    png = server.http.get(f"/v1/videos/{job['id']}/content", params={"variant": "png"})
    with Image.open(io.BytesIO(gif.content)) as image:  # equal neighbours become one picture that is shown longer
        shown = sum(image.seek(index) or image.info["duration"] for index in range(image.n_frames))
    assert gif.headers["content-type"] == "image/gif" and abs(shown - 9 * 125) < 9 * 10
    assert png.headers["content-type"] == "image/png" and Image.open(io.BytesIO(png.content)).size == (9 * 32, 32)
    # they count as what is kept
    assert server.service.store.get(job["id"]).bytes == plain + len(gif.content) + len(png.content)
    monkeypatch.setattr(variants, "MAX_PIXELS", 9 * 32 * 32 - 1)
    other = server.wait(server.make(seed=2)["id"])
    answer = server.http.get(f"/v1/videos/{other['id']}/content", params={"variant": "gif"})
    assert answer.status_code == 409 and "take the mp4" in answer.json()["error"]["message"]


def test_frames_are_shown_while_the_rest_is_made(pipe):
    paced = Paced(pipe)
    with running(paced) as server:
        job = server.make()
        paced.allow(1)
        seen, kinds = [], []
        with server.http.stream("GET", f"/v1/videos/{job['id']}/frames") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            text = ""
            for piece in stream.iter_text():
                text += piece
                *whole, text = text.split("\n\n")
                for kind, data in events("\n\n".join([*whole, ""]) if whole else ""):
                    kinds.append(kind)
                    if kind != "frame":
                        state = data
                        continue
                    seen.append(data)
                    if len(seen) in (1, 5):  # no more than these chunks have been allowed
                        assert paced.chunks == (1 if len(seen) == 1 else 2)
                        state = server.job(job["id"])
                        assert (state["status"], state["frames_done"]) == ("in_progress", len(seen))
                        assert state["progress"] == 100 * len(seen) // 9
                        paced.allow(1)
        assert [frame["index"] for frame in seen] == list(range(9))
        assert kinds[-1] == "end" and state["status"] == "completed"
        prefix = "data:image/jpeg;base64,"
        pictures = [Image.open(io.BytesIO(base64.b64decode(frame["image"].removeprefix(prefix)))) for frame in seen]
        expected = pipe("a red circle", num_frames=9, seed=1).frames
        jpegs = [Image.open(io.BytesIO(picture(frame, "JPEG", quality=92, subsampling=0))) for frame in expected]
        stacks = [np.stack([np.asarray(image) for image in images]).astype(int) for images in (pictures, jpegs)]
        assert np.abs(stacks[0] - stacks[1]).mean() < 1.5
        # who comes late gets all of it, or the part that is missing
        late = events(server.http.get(f"/v1/videos/{job['id']}/frames", params={"start": 7}).text)
        assert [kind for kind, _ in late] == ["frame", "frame", "end"] and late[0][1] == seen[7]


def test_an_image_is_the_first_frame(server: Running, pipe, tmp_path):
    image = pixels(1, seed=5)[0]
    answer = server.upload(picture(image))
    job = server.wait(answer.json()["id"])
    assert job["status"] == "completed" and job["input_reference"] == "image"
    frames = decoded(server.http.get(f"/v1/videos/{job['id']}/content").content)
    expected = pipe("a red circle", num_frames=9, seed=1, image=image).frames
    without = pipe("a red circle", num_frames=9, seed=1).frames
    assert off(frames, expected, tmp_path) < 1.5 < 3 < off(frames, without, tmp_path)


def test_a_video_goes_on(server: Running, pipe, tmp_path):
    content = film(tmp_path, frames=24, size=32)
    job = server.wait(server.upload(content, num_frames="13").json()["id"])
    assert job["status"] == "completed" and job["input_reference"] == "video"
    frames = decoded(server.http.get(f"/v1/videos/{job['id']}/content").content)
    expected = pipe("a red circle", num_frames=13, seed=1, video=tmp_path / "film.mp4").frames
    assert off(frames, expected, tmp_path) < 1.5


def test_listing(pipe):
    with running(pipe) as server:
        ids = [server.make(seed=seed)["id"] for seed in range(5)]
        newest = server.http.get("/v1/videos", params={"limit": 2}).json()
        assert [job["id"] for job in newest["data"]] == [ids[4], ids[3]] and newest["has_more"]
        assert (newest["first_id"], newest["last_id"]) == (ids[4], ids[3])
        rest = server.http.get("/v1/videos", params={"after": ids[3]}).json()
        assert [job["id"] for job in rest["data"]] == ids[2::-1] and not rest["has_more"]
        oldest = server.http.get("/v1/videos", params={"order": "asc", "limit": 1}).json()
        assert [job["id"] for job in oldest["data"]] == ids[:1]
        assert server.http.get("/v1/videos", params={"after": "video_nix"}).status_code == 404


def test_queue_positions_cancelling_and_deleting(pipe):
    paced = Paced(pipe)
    with running(paced, max_queue=3) as server:
        started = server.make()
        server.wait(started["id"], "in_progress")
        waiting = [server.make(), server.make(), server.make()]
        assert [job["queue_position"] for job in waiting] == [0, 1, 2]
        full = server.http.post("/v1/videos", json={"prompt": "one too many"})
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full" and full.json()["error"]["type"] == "rate_limit_error"
        assert server.metric("videoar_queue_length") == 3

        # a queued one never runs
        gone = server.http.delete(f"/v1/videos/{waiting[0]['id']}").json()
        assert gone == {"id": waiting[0]["id"], "object": "video.deleted", "deleted": True}
        assert server.http.get(f"/v1/videos/{waiting[0]['id']}").status_code == 404
        assert server.job(waiting[1]["id"])["queue_position"] == 0

        # a running one stops between frames, and who watches it is told
        heard: list[str] = []
        url = f"/v1/videos/{started['id']}/frames"
        watcher = threading.Thread(target=lambda: heard.append(server.http.get(url).text))
        watcher.start()
        paced.allow(1)
        server.wait_for(lambda: paced.asked == 2)  # it stands before its second chunk
        assert server.http.get(f"/v1/videos/{started['id']}/content").json()["error"]["code"] == "not_ready"
        assert server.http.delete(f"/v1/videos/{started['id']}").status_code == 200
        paced.allow(1)
        watcher.join(10)
        assert events(heard[0])[-1][0] == "end" and events(heard[0])[-1][1]["status"] == "cancelled"
        server.wait(waiting[1]["id"], "in_progress")
        assert paced.chunks == 2  # of three
        paced.allow()
        assert [server.wait(job["id"])["status"] for job in waiting[1:]] == ["completed"] * 2
        assert server.metric('videoar_jobs_total{status="cancelled"}') == 1
        assert len(list(server.service.folder.iterdir())) == 2  # the cancelled ones' files are gone

        # a finished one's files go
        done = waiting[1]["id"]
        assert server.http.delete(f"/v1/videos/{done}").status_code == 200
        assert server.http.get(f"/v1/videos/{done}/content").status_code == 404
        assert server.http.delete(f"/v1/videos/{done}").status_code == 404
        assert len(list(server.service.folder.iterdir())) == 1


def test_only_the_newest_are_kept(pipe):
    with running(pipe, keep_videos=2) as server:
        ids = [server.wait(server.make(seed=seed)["id"])["id"] for seed in range(4)]
        assert [server.http.get(f"/v1/videos/{name}").status_code for name in ids] == [404, 404, 200, 200]
        assert len(list(server.service.folder.iterdir())) == 2
    with running(pipe, keep_bytes=1) as server:
        ids = [server.wait(server.make(seed=seed)["id"])["id"] for seed in range(3)]
        assert [server.http.get(f"/v1/videos/{name}/content").status_code for name in ids] == [404, 404, 200]


def test_what_an_end_changes_is_changed_before_it_shows(tmp_path):
    """Who sees a job's end finds the counters and the folders as they are to be."""
    store, seen = JobStore(tmp_path, max_queue=1, keep_videos=1, keep_bytes=10**9), []

    def taken() -> Job:
        with store.place() as folder:
            store.add(Job(folder, Wanted("a", 1, (16, 16), 0, 1.0, 1.0)))
        job = store.take()
        assert job is not None and job.folder.exists()
        return job

    first = taken()
    store.finish(first, COMPLETED, 1.0)
    second = taken()
    store.finish(
        second, COMPLETED, 1.0, count=lambda status: seen.append((status, second.status, first.folder.exists()))
    )
    assert seen == [(COMPLETED, RUNNING, False)] and second.status == COMPLETED


def test_a_request_is_counted_before_its_answer_is_sent(tmp_path):
    metrics, counted = Metrics(JobStore(tmp_path, 1, 1, 1)), []
    guard = Guard(PlainTextResponse("hello"), metrics, max_bytes=1, max_plain_bytes=1, seconds=1)

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        counted.append(b'videoar_requests_total{method="GET",path="other",status="200"} 1.0' in metrics.text())

    asyncio.run(guard({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send))
    assert counted == [True, True]


class Failing:
    """A real pipeline that fails at chosen seeds."""

    def __init__(self, pipe):
        self._pipe = pipe

    def __getattr__(self, name: str):
        return getattr(self._pipe, name)

    def stream(self, **options):
        problem = {
            1: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            2: MemoryError(),
            3: RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
            4: ZeroDivisionError("secret of the server"),
            5: UserError("the frames do not fit: ask for other ones."),
        }.get(options["seed"])
        first, *rest = self._pipe.stream(**options)
        yield first
        if problem:
            raise problem
        yield from rest


def test_what_fails_in_a_job_is_that_jobs(pipe):
    with running(Failing(pipe)) as server:
        jobs = [server.make(seed=seed)["id"] for seed in range(7)]
        ended = [server.wait(name) for name in jobs]
        assert [job["status"] for job in ended] == ["completed", *["failed"] * 5, "completed"]
        codes = [job["error"]["code"] for job in ended[1:6]]
        assert codes == ["out_of_memory"] * 3 + ["server_error", "invalid_request"]
        assert ended[5]["error"]["message"] == "the frames do not fit: ask for other ones."
        assert "shorter or a smaller" in ended[1]["error"]["message"] and "secret" not in str(ended)
        content = server.http.get(f"/v1/videos/{jobs[1]}/content")
        assert content.status_code == 409 and content.json()["error"]["code"] == "job_failed"
        last = events(server.http.get(f"/v1/videos/{jobs[4]}/frames").text)
        assert [kind for kind, _ in last] == ["frame", "end"] and last[1][1]["status"] == "failed"
        assert server.metric('videoar_jobs_total{status="failed"}') == 5
        assert server.metric('videoar_jobs_total{status="completed"}') == 2
        assert server.metric("videoar_job_seconds_count") == 2
        assert server.http.get("/health").json()["status"] == "ok"
        assert not list(server.service.folder.glob("*/*.raw"))


def test_health_models_and_metrics(pipe):
    with running(pipe) as server:
        assert server.http.get("/health").json() == {"status": "ok", "model": "tiny", "queue_length": 0}
        model = server.http.get("/v1/models").json()["data"][0]
        assert (model["id"], model["size"], model["num_frames"], model["fps"]) == ("tiny", "32x32", 9, 8.0)
        server.wait(server.make()["id"])
        server.http.get("/v1/nothing/at/all")
        assert server.metric('videoar_requests_total{method="POST",path="/v1/videos",status="200"}') == 1
        assert server.metric('videoar_requests_total{method="GET",path="other",status="404"}') == 1
        assert server.metric("videoar_frames_total") == 9
        assert server.metric("videoar_first_frame_seconds_count") == 1
        server.service.store.stop()
        server.service.worker.join(10)
        ending = server.http.get("/health")
        assert ending.status_code == 503 and ending.json()["status"] == "failing"
        assert server.http.post("/v1/videos", json={"prompt": "late"}).status_code == 503


def test_answers_do_not_wait_for_acknowledgements(server: Running):
    """Headers and body are written apart: with Nagle's algorithm the body would come 40 ms later on a connection that is kept."""
    server.http.get("/health").raise_for_status()
    sockets = [connection.transport.get_extra_info("socket") for connection in server.connections]
    assert sockets and all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)


def test_the_api_key(pipe):
    with running(pipe, api_key="sesame-123") as server, httpx.Client(base_url=server.url) as stranger:
        job = server.wait(server.make()["id"])
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame-123"}):
            for path in ("/v1/videos", f"/v1/videos/{job['id']}/content", "/v1/models"):
                answer = stranger.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error" and "sesame" not in answer.text
            assert stranger.post("/v1/videos", json={"prompt": "a"}, headers=headers).status_code == 401
        assert [stranger.get(path).status_code for path in ("/", "/health", "/openapi.json")] == [200] * 3
        assert "sesame" not in stranger.get("/openapi.json").text + stranger.get("/metrics").text


def test_a_class_conditional_model():
    pipe = tiny_pipeline(num_classes=3)
    with running(pipe) as server:
        assert server.wait(server.make(prompt="jump")["id"])["status"] == "completed"
        unknown = server.http.post("/v1/videos", json={"prompt": "fly"})
        assert unknown.status_code == 422 and "take one of run, jump, swim" in unknown.json()["error"]["message"]
    pipe.class_names = None
    with running(pipe) as server:
        assert server.wait(server.make(prompt="2")["id"])["status"] == "completed"
        for prompt in ("3", "jump", "-1", "\u0662", "1" * 50):
            assert server.http.post("/v1/videos", json={"prompt": prompt}).status_code == 422


def test_settings_that_do_not_fit_are_refused():
    for words in (["--max_queue", "0"], ["--max_seconds", "-1"], ["--port", "70000"], ["--host", ""]):
        with pytest.raises(UserError, match=words[0][2:]):
            settings.load(ServeConfig, None, words)


def test_the_schema_is_complete(pipe):
    service = VideoService(pipe, "tiny", ServeConfig())
    try:
        schema = create_app(service).openapi()
    finally:
        service.close()
    assert {f"{method} {path}" for path, methods in schema["paths"].items() for method in methods} == {
        "post /v1/videos", "get /v1/videos", "get /v1/videos/{video_id}", "delete /v1/videos/{video_id}",
        "get /v1/videos/{video_id}/content", "get /v1/videos/{video_id}/frames", "get /v1/models", "get /health",
        "get /metrics",
    }  # fmt: skip
    body = schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"]["additionalProperties"] is False
    assert "input_reference" in body["multipart/form-data"]["schema"]["properties"]
