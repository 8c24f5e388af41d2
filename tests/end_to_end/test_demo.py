"""The whole path in small: every step of the demo with real parts, killed in the middle and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "videoar", "demo", "--config", "pretrain/configs/demo/short.yaml"]
STEPS = ["corpus", "shards", "tokenizer", "encode", "pretrain", "export", "generate", "evaluate", "report"]


def entries(out: Path) -> dict:
    file = out / "steps.json"
    return json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.timeout(900)
def test_the_demo_survives_a_kill_and_ends_with_a_report(tmp_path):
    out = tmp_path / "demo"
    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(
            [*COMMAND, "--out", str(out)], cwd=HOUSE, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 500
        checkpoints = out / "pretrain" / "checkpoints"
        while not list(checkpoints.glob("step-*")):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.2)
        groups = {first.pid} | {os.getpgid(p) for p in _descendants(first.pid)}
        for group in groups:
            os.killpg(group, signal.SIGKILL)
        first.wait()
    before = entries(out)
    assert list(before) == STEPS[:5] and not before["pretrain"]["done"]

    second = subprocess.run([*COMMAND, "--out", str(out)], cwd=HOUSE, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, (second.stdout + second.stderr)[-3000:]
    after = entries(out)
    assert list(after) == STEPS and all(entry["done"] for entry in after.values())
    for name in STEPS[:4]:
        assert after[name] == before[name] and f"{name}: done already" in second.stdout
    assert after["pretrain"]["attempts"] == 2 and after["pretrain"]["seconds"] > before["pretrain"]["seconds"]

    metrics = json.loads((out / "metrics.json").read_text())
    assert 5 < metrics["tokenizer"]["psnr"] < 40 and 0 < metrics["tokenizer"]["psnr_foreground"] < 40
    for kind in ("ruler", "reconstructed", "generated"):
        assert all(0 <= metrics["shapes"][kind][name] <= 1 for name in ("colour", "shape", "direction"))
    assert metrics["shapes"]["ruler"]["colour"] == 1.0
    assert metrics["shapes"]["generated"]["clips"] == 24
    assert set(metrics["steps"]) >= set(STEPS[:-1]) and all(step["peak_gb"] > 0 for step in metrics["steps"].values())
    total = sum(step["seconds"] for step in metrics["steps"].values()) / 60
    assert metrics["total_minutes"] == pytest.approx(total, abs=0.02)

    lines = [json.loads(line) for line in (out / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages == ["I", "II", "III"]
    page = (out / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") >= 8
    assert (out / "model" / "model.safetensors").exists() and (out / "model" / "tokenizer" / "config.json").exists()
    assert (out / "samples" / "image_to_video.mp4").exists() and (out / "samples" / "continuation.mp4").exists()

    third = subprocess.run([*COMMAND, "--out", str(out)], cwd=HOUSE, capture_output=True, text=True, timeout=60)
    assert third.returncode == 0 and third.stdout.count("done already") == len(STEPS)
    other = subprocess.run(
        [*COMMAND, "--out", str(out), "--samples", "2"], cwd=HOUSE, capture_output=True, text=True, timeout=60
    )
    assert other.returncode == 2 and "other settings (step generate)" in other.stderr


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
