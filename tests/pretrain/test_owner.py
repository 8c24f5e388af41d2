"""Nobody can train in a folder in which somebody trains; whoever died there is no hindrance."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain import owner as module
from pretrain.owner import owner
from tests.pretrain.tiny import metrics, stage, write_run


def _beat(out: Path, **changes: object) -> None:
    (out / "heartbeats").mkdir(parents=True, exist_ok=True)
    beat = {"rank": 0, "host": "elsewhere", "pid": 1, "time": time.time(), "every": 0.1, "job": "7"} | changes
    (out / "heartbeats" / "rank-0.json").write_text(json.dumps(beat))


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 5000)], checkpoint_every=5)
    command = [
        sys.executable,
        "-m",
        "videoar",
        "pretrain",
        "--config",
        str(file),
        "--resilience.heartbeat_every",
        "0.2",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while not list((tmp_path / "run" / "checkpoints").glob("step-*/complete.json")):
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        said = f"run is being trained in by process {first.pid} on {platform.node()}: end that run first"
        assert second.returncode == 2 and said in second.stderr
        before = len(metrics(tmp_path / "run"))
        while len(metrics(tmp_path / "run")) < before + 3:  # the first one is not disturbed
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert owner(tmp_path / "run") is None


def test_a_heartbeat_from_elsewhere_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLACK", 1.0)
    assert owner(tmp_path) is None
    _beat(tmp_path)
    assert owner(tmp_path) is None  # it has stopped
    going_on = threading.Event()

    def go_on() -> None:
        while not going_on.wait(0.1):
            _beat(tmp_path)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        assert owner(tmp_path) == "process 1 on elsewhere, job 7"
    finally:
        going_on.set()
        thread.join()
    # what a scheduler starts again has ended before, and so has what has said its last word: nobody waits
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("waited"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert owner(tmp_path) is None
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    (tmp_path / "events.jsonl").write_text(json.dumps({"time": time.time(), "event": "stopped", "global_step": 1}))
    assert owner(tmp_path) is None
