"""`videoar serve` as a process of its own: from an exported model to Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import videoar
from tests.inference.test_pipeline import tiny_pipeline

ROOT = Path(videoar.__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "shapes-tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@contextmanager
def started(model: Path, temporary: Path, *words: str, **variables: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address."""
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "videoar", "serve", "--model", str(model), "--port", "0", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=temporary
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"videoar serve: shapes-tiny at (http://\S+)/\n", line)
        assert match, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
        yield process, match.group(1)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.parametrize(
    "number, words", [(signal.SIGINT, []), (signal.SIGTERM, ["--weights", "fast", "--dtype", "bfloat16"])]
)
def test_it_ends_cleanly_in_the_middle_of_a_job(model, tmp_path, number, words):
    """With a job at work, others in the queue, and somebody who watches; the key of the environment is asked for and never shown."""
    with (
        started(model, tmp_path, "--max-seconds", "600", "--max_queue=3", *words, VIDEOAR_API_KEY="sesame-123") as (
            process,
            url,
        ),
        httpx.Client(headers={"Authorization": "Bearer sesame-123"}, timeout=30) as http,
    ):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert http.get(f"{url}/v1/models").json()["data"][0]["id"] == "shapes-tiny"
        long = {"prompt": "a red circle", "num_frames": 4001, "seed": 1}
        job, *_ = [http.post(f"{url}/v1/videos", json=long).raise_for_status().json() for _ in range(3)]
        with http.stream("GET", f"{url}/v1/videos/{job['id']}/frames") as stream:
            pieces = stream.iter_text()
            text = ""
            while "event: frame" not in text:
                text += next(pieces)
            folders = list(tmp_path.glob("videoar-serve-*"))
            assert len(folders) == 1 and len(list(folders[0].iterdir())) == 3
            process.send_signal(number)
            end = json.loads("".join(pieces).rsplit("event: end\ndata: ", 1)[1])  # it is told, not cut off
        assert end["status"] in ("in_progress", "cancelled") and end["frames_done"] < 4001  # nobody waits for the rest
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out, errors) == (0, "videoar serve: ended\n", "")
        assert list(tmp_path.glob("videoar-serve-*")) == []


def refusal(capsys, *words: str) -> str:
    assert videoar.main(["serve", *words]) == 2
    return capsys.readouterr().err


def test_what_can_not_be_served(model, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "choose another --host or --port" in refusal(capsys, "--model", str(model), "--port", port)
    assert "config.json" in refusal(capsys, "--model", str(tmp_path), "--port", "0")
    assert "'max_queue'" in refusal(capsys, "--model", str(model), "--max-queu", "3")
    assert "choose another --host" in refusal(capsys, "--model", str(model), "--host", "host.invalid", "--port", "0")
    monkeypatch.setenv("MY_KEY", " ")
    words = ("--model", str(model), "--port", "0", "--api_key_variable", "MY_KEY")
    assert "MY_KEY holds no usable key" in refusal(capsys, *words)


def test_inference_imports_without_the_servers_packages(model, tmp_path):
    code = (
        "import sys\n"
        "for name in ('fastapi', 'uvicorn', 'starlette', 'python_multipart', 'prometheus_client'): sys.modules[name] = None\n"
        "import inference, inference.pipeline, inference.serving, inference.serving.server, videoar\n"
        f"sys.exit(videoar.main(['serve', '--model', {str(model)!r}, '--port', '0']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "install fastapi, uvicorn, python-multipart and prometheus-client" in done.stderr
