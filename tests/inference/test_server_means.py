"""A full disk and too little memory: an error that says so, and the server lives on."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from inference.decoder import CachedDecoder
from inference.serving import memory, uploads
from inference.serving.jobs import Wanted
from tests.inference.serving_tools import Paced, fill, film, picture, running, small_disk
from tests.inference.test_pipeline import pixels, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_a_full_disk_costs_a_job_and_no_more(pipe, tmp_path, monkeypatch):
    """All pixels of a job once lay in a file that was mapped before it had its space: the first page that found none ended the process."""
    paced = Paced(pipe)
    with small_disk(tmp_path, "2m", monkeypatch) as disk, running(paced) as server:
        # the disk fills in the middle of a job
        job = server.make(num_frames=13)
        paced.allow(1)
        server.wait_for(lambda: server.job(job["id"])["frames_done"] == 1)
        filler = fill(disk)
        paced.allow()
        failed = server.wait(job["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "disk_full")
        assert "the server's disk is full" in failed["error"]["message"]
        filler.unlink()
        assert server.wait(server.make()["id"])["status"] == "completed"
        # 13 frames of 256x256 are 2.4 MB: nothing is computed in vain
        chunks = paced.chunks
        failed = server.wait(server.make(num_frames=13, size="256x256")["id"])
        assert (failed["error"]["code"], failed["frames_done"], paced.chunks) == ("disk_full", 0, chunks)
        assert server.wait(server.make()["id"])["status"] == "completed"
        assert server.http.get("/health").json()["status"] == "ok"


def test_a_full_disk_is_named_as_the_cause(pipe, tmp_path, monkeypatch, caplog):
    """It was told as a video that somebody had deleted, and as an upload that was damaged; the log said nothing."""
    with small_disk(tmp_path, "2m", monkeypatch) as disk, running(pipe) as server:
        done = server.wait(server.make()["id"])
        content = f"/v1/videos/{done['id']}/content"
        image, video = picture(pixels(1, size=(64, 64))[0]), film(tmp_path, frames=20)
        asked = {
            "variant": lambda: server.http.get(content, params={"variant": "gif"}),
            "image": lambda: server.upload(image),
            "video": lambda: server.upload(video),
            "a page too little": lambda: server.upload(image, size="64x64"),
            "text": lambda: server.http.post("/v1/videos", json={"prompt": "a"}),
        }
        filler = fill(disk)
        for name in ("variant", "image", "video", "a page too little"):
            if name == "a page too little":  # its first bytes find room
                os.truncate(filler, filler.stat().st_size - 4096)
            caplog.clear()
            answer = asked[name]()
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full"), name
            assert (
                answer.json()["error"]["type"] == "server_error" and "disk is full" in answer.json()["error"]["message"]
            )
            logged = [
                record
                for record in caplog.records
                if record.name == "videoar.serve" and record.levelno == logging.ERROR
            ]
            assert len(logged) == 1 and logged[0].exc_info, name
        assert server.http.get(content).status_code == 200
        filler.unlink()
        for name, ask in asked.items():
            assert ask().status_code == 200, name
        assert not server.service.store._reserved


def test_too_little_memory_for_an_upload_is_not_its_fault(pipe, monkeypatch, tmp_path, caplog):
    def failing(*_):
        raise MemoryError

    with running(pipe) as server:
        with monkeypatch.context() as patch:
            patch.setattr(uploads, "read_image", failing)
            answer = server.upload(picture(pixels(1)[0]))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
            patch.setattr(
                uploads, "available", lambda: 2 * 2 * 3 * 5 * 32 * 32 - 1
            )  # two files at once, of 5 frames twice
            answer = server.upload(film(tmp_path, frames=20))
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
            assert "too little memory" in caplog.text and int(answer.headers["retry-after"]) >= 1
            patch.setattr(uploads, "available", lambda: 2 * 2 * 3 * 5 * 32 * 32)
            assert server.upload(film(tmp_path, frames=20)).status_code == 200
        assert server.wait(server.upload(picture(pixels(1)[0])).json()["id"])["status"] == "completed"


def test_a_video_that_no_memory_holds_is_refused(tmp_path):
    """A real one: its keys and values would take 17 TB. Smaller ones are promised by the system, which then ends the process."""
    frames = 8 * 10**6 + 1
    with running(tiny_pipeline(num_frames=1 + frames // 4), max_seconds=2e6) as server:
        body = {"prompt": "a", "num_frames": frames, "size": "1024x1024"}
        answer = server.http.post("/v1/videos", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "too_much_memory"), answer.text
        assert "GB of memory, of which the server has" in answer.json()["error"]["message"]
        image = {"input_reference": picture(pixels(1)[0])}
        answer = server.http.post("/v1/videos", data={key: str(value) for key, value in body.items()}, files=image)
        assert answer.json()["error"]["code"] == "too_much_memory"
        assert server.wait(server.make()["id"])["status"] == "completed"


def test_a_job_waits_for_no_memory_that_others_have(pipe, monkeypatch):
    """What fits into the server but not beside what else runs there now is that job's error."""
    paced = Paced(pipe)
    with running(paced) as server:
        server.make()
        large = server.make(size="128x128")
        with monkeypatch.context() as patch:
            patch.setattr(memory, "available", lambda device=None: 1_000_000)
            paced.allow()
            failed = server.wait(large["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "out_of_memory")
        assert "ask for a smaller or a shorter one" in failed["error"]["message"]
        assert server.wait(server.make(size="128x128")["id"])["status"] == "completed"


@pytest.mark.parametrize("changes", [{}, {"window": 1}, {"num_frames": 2}, {"num_classes": 3}, {"context_block": True}])
@pytest.mark.parametrize("branches", [1, 2])
def test_the_caches_bytes_are_known_before_it_is_made(changes, branches):
    pipe = tiny_pipeline(**changes)
    config = pipe.config
    layout = config.layout(3, pipe.tokenizer.schedule_for(64, 48))
    text = (
        torch.zeros(branches, config.text_length, config.text_dim)
        if not config.num_classes
        else torch.zeros(branches).long()
    )
    cache = CachedDecoder(pipe.model, layout, text, torch.full((branches,), config.text_length)).cache
    assert memory.cache_bytes(config, layout, branches, 4) == cache.keys.nbytes + cache.values.nbytes


def test_what_a_video_takes_grows_with_what_is_asked(pipe):
    def takes(num_frames=9, size=(64, 64), guidance=2.0, given=0) -> int:
        return memory.needed(pipe, Wanted("a", num_frames, size, 0, guidance, 1.0), given)

    decoding = memory._decoder_numbers(pipe.tokenizer.config, (64, 64))
    assert 4 * 64 * 64 * 3 * 4 < 4 * decoding < takes()  # more than four frames of pixels
    assert takes() > takes(guidance=1.0) and takes() > takes(num_frames=5)
    assert 3.5 < takes(size=(256, 256)) / takes(size=(128, 128)) < 4.5
    assert takes(num_frames=17) == takes(num_frames=401)  # beyond the trained length the window is full
    assert takes(num_frames=401) < takes(num_frames=401, given=101) < takes(num_frames=401, given=201)


def test_a_containers_limit_counts(tmp_path):
    group = tmp_path / "group"
    group.mkdir()
    name = next(
        (line[3:].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")),
        "",
    )
    folder = group / name
    folder.mkdir(parents=True, exist_ok=True)
    assert memory._left_in_group(group) == float("inf")
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("700\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    assert memory._left_in_group(group) == 500
    (group / "memory.max").write_text("max\n")
    assert memory._left_in_group(group) == float("inf")


def test_a_prompt_that_the_model_would_cut_is_refused(pipe, recwarn):
    """As the command line does. It was cut, and its text was kept for ever by Python's register of warnings."""
    with running(pipe) as server:
        for prompt, tokens in (("word " * 300, 300), ("1 2 3 4 5 6 7 8 9", 9)):
            answer = server.http.post("/v1/videos", json={"prompt": prompt})
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "prompt_too_long")
            assert (
                f"the prompt has {tokens} text tokens, and this model takes 1 to 8" in answer.json()["error"]["message"]
            )
        assert server.wait(server.make(prompt="1 2 3 4 5 6 7 8")["id"])["status"] == "completed"
        assert server.http.get("/v1/models").json()["data"][0]["limits"]["max_prompt_tokens"] == 8
    assert not [warning for warning in recwarn if "cut to" in str(warning.message)]


class Broken:
    """A real pipeline that makes nothing while it is broken, as with a GPU that is lost."""

    def __init__(self, pipe):
        self._pipe, self.broken = pipe, True

    def __getattr__(self, name: str):
        return getattr(self._pipe, name)

    def stream(self, **options):
        if self.broken:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return self._pipe.stream(**options)


def test_health_fails_when_every_job_fails(pipe):
    broken = Broken(pipe)
    with running(broken) as server:
        for expected in (200, 200, 503, 503):
            assert server.wait(server.make()["id"])["error"]["code"] == "server_error"
            assert server.http.get("/health").status_code == expected
        assert server.http.get("/health").json()["status"] == "failing"
        broken.broken = False
        server.wait(server.make()["id"])
        assert server.http.get("/health").json()["status"] == "ok"


def test_all_files_count_as_kept(pipe):
    """Those of jobs that wait or run, and the kinds that are made later; given frames go with the end of their job."""
    paced = Paced(pipe)
    with running(paced) as server:

        def there() -> list[bool]:
            return [server.http.get(f"/v1/videos/{name}").status_code == 200 for name in ids]

        store = server.service.store
        paced.allow(4 * 3)
        ids = [server.wait(server.make()["id"])["id"] for _ in range(4)]
        size = store.get(ids[0]).bytes
        assert [store.get(name).bytes for name in ids] == [size] * 4
        # the oldest goes for the pixels of the one that runs, and the next one for what an upload brings
        store.keep_bytes = 4 * size + 9 * 32 * 32 * 3 - 1
        server.wait(server.make()["id"], "in_progress")
        waiting = server.make()["id"]
        assert there() == [False, True, True, True]
        store.keep_bytes = 3 * size + 9 * 32 * 32 * 3
        uploaded = server.upload(picture(pixels(1)[0])).json()["id"]
        assert there() == [False, False, True, True]
        store.keep_bytes = 10**9
        paced.allow()
        assert server.wait(uploaded)["status"] == server.wait(waiting)["status"] == "completed"
        assert not (store.get(uploaded).folder / "given.npy").exists()
        # another kind of file makes the oldest go, but never the one that it is made of, nor the newest
        assert there() == [False, False, True, True]
        store.keep_bytes = sum(job.bytes for job in store.listed())
        assert server.http.get(f"/v1/videos/{ids[2]}/content", params={"variant": "png"}).status_code == 200
        assert there() == [False, False, True, False]
        assert store.get(ids[2]).bytes > size
        assert {folder.name for folder in server.service.folder.iterdir()} == {
            job.folder.name for job in store.listed()
        }
