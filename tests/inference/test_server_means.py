"""A full disk and too little memory: an error that says so, and the server lives on."""

from __future__ import annotations

import pytest

from tests.inference.serving_tools import Paced, fill, running, small_disk
from tests.inference.test_pipeline import tiny_pipeline
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
