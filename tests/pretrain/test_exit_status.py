"""What a scheduler is told: a fault that another start may survive is tried again, a mistake in the settings is not."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from parallel.launch import FAILED, USER_ERROR, exit_status
from tests.data_pipelines.s3_server import ENVIRONMENT, free_port
from tests.pretrain.tiny import stage, write_run
from videoar import main


def test_a_reader_that_is_killed_is_tried_again_and_a_mistake_is_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = stage(tmp_path / "codes", 100_000)
    file = write_run(tmp_path, stages=[many], data_workers=1, checkpoint_every=100_000)

    def kill() -> None:
        deadline = time.monotonic() + 100
        while not (readers := multiprocessing.active_children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for reader in readers:
            reader.kill()  # as for lack of memory

    killer = threading.Thread(target=kill)
    killer.start()
    killed = main(["pretrain", "--config", str(file)])
    killer.join()
    assert "codes ahead has died" in _last(capfd)
    assert exit_status([killed, -15], asked=False) == FAILED

    for name, value in (ENVIRONMENT | {"S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}).items():
        monkeypatch.setenv(name, value)
    source = {"dir": "s3://bucket/codes", "cache": str(tmp_path / "cache")}
    far = write_run(tmp_path, out=str(tmp_path / "far"), stages=[many | {"codes": [source]}], data_timeout=1)
    silent = main(["pretrain", "--config", str(far)])
    assert "could not be fetched within 1 s" in _last(capfd)
    assert exit_status([silent, -15], asked=False) == FAILED

    mistaken = main(["pretrain", "--config", str(file), "--tokenizer", str(tmp_path / "nowhere")])
    assert "holds no tokenizer" in _last(capfd)
    assert exit_status([mistaken, -15], asked=False) == USER_ERROR


def _last(capfd: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command ended with."""
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("videoar pretrain: ")
    return line
