"""`videoar status` at every moment of a run's life, and its page; the folders are written as a run writes them."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import videoar
from evaluation.run_page import write_page
from evaluation.run_status import duration, run_status, status_text
from tokenizer.errors import UserError
from tokenizer.video_file import write_video

NOW = 1_800_000_000.0
COSTS = [{"name": "I", "steps": 100, "tokens_per_step": 10.0, "flops_per_step": 1e9},
         {"name": "II", "steps": 50, "tokens_per_step": 40.0, "flops_per_step": 4e9}]  # fmt: skip


def _line(step: int, stage: str = "I", offset: int = 0, **more: Any) -> dict[str, Any]:
    """As after 2 s a step, the last one 10 s ago."""
    return {
        "stage": stage, "step": step, "global_step": offset + step, "loss": 0.7 - 0.001 * step, "bit_accuracy": 0.5 + 0.001 * step,
        "bit_accuracy/scale_0": 0.6, "loss/scale_0": 0.6, "bit_accuracy/frame_0": 0.6, "loss/frame_0": 0.6, "lr": 1e-3,
        "grad_norm": 0.5, "time": NOW - 10 - 2.0 * (60 - step), "seconds": 1.5, "data_wait": 0.1, "tokens_per_second": 1234.5,
        "mfu": 0.41, "memory_gb": 1.25, "productive_seconds": 1.5 * step, "goodput": 0.75,
    } | more  # fmt: skip


def _append(out: Path, name: str, *lines: dict[str, Any]) -> None:
    with (out / name).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _beat(out: Path, rank: int = 0, **changes: Any) -> None:
    beat = {
        "rank": rank,
        "time": NOW - 5,
        "doing": "computing",
        "since": 1.5,
        "global_step": 60,
        "host": "elsewhere",
        "pid": 1,
    }
    (out / "heartbeats").mkdir(exist_ok=True)
    (out / "heartbeats" / f"rank-{rank}.json").write_text(json.dumps(beat | changes))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """At step 60 of the first of two stages, on another machine."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"began": NOW - 200, "devices": 1, "peak_flops": 1e12, "stages": COSTS}))
    _append(
        out,
        "events.jsonl",
        {"time": NOW - 190, "event": "start", "global_step": 0, "starting_seconds": 10.0, "world_size": 1},
    )
    _append(out, "metrics.jsonl", *(_line(step) for step in range(1, 61)))
    _append(
        out,
        "metrics.jsonl",
        {"stage": "I", "step": 60, "global_step": 60, "validation/loss": 0.66, "validation/bit_accuracy": 0.55},
    )
    for step in (40, 60):
        (out / "checkpoints" / f"step-{step}").mkdir(parents=True)
    marker = out / "checkpoints" / "step-40" / "complete.json"  # the other one is still being written
    marker.write_text("{}")
    os.utime(marker, (NOW - 50, NOW - 50))
    best = {
        "metric": "validation/loss",
        "value": 0.67,
        "global_step": 40,
        "stage": "I",
        "checkpoint": "checkpoints/step-40",
    }
    (out / "best.json").write_text(json.dumps(best))
    _beat(out)
    return out


def test_a_run_that_goes_on(run: Path) -> None:
    status = run_status(run, NOW)
    assert status["state"] == "running" and "computing on elsewhere, last sign of life 5 s ago" in status["says"]
    assert status["stage"] == {"name": "I", "number": 1, "of": 2, "step": 60, "steps": 100}
    assert (status["global_step"], status["total_steps"]) == (60, 150)
    assert status["share_done"] == pytest.approx(60 / 300)  # the second stage's steps cost four times as much
    assert status["time_left"]["stages"] == [
        {"name": "I", "seconds": 80.0},
        {"name": "II", "seconds": 400.0},
    ]  # 2 s a step by the clock
    assert status["checkpoint"] == {"name": "step-40", "global_step": 40, "age": 50.0}
    assert status["trend"] == {"before": pytest.approx(0.7 - 0.0305), "now": pytest.approx(0.7 - 0.0505), "steps": 39}
    assert status["last"]["age"] == 10.0 and status["validation"]["loss"] == 0.66
    text = status_text(status)
    for words in (
        "step 60 of 100; 20.0% of the whole run",
        "falling: 0.6695 -> 0.6495",
        "1,234 tokens/s, MFU 41.0%",
        "goodput     75.0%",
        "about 8 min (I 80 s, II 7 min)",
        "step-40, 50 s old",
        "step-40: validation/loss 0.6700, stage I",
        "step 0: start",
    ):
        assert words in text, words
    assert json.loads(json.dumps(status)) == status


def test_a_line_that_is_being_written_is_left_out(run: Path) -> None:
    before = run_status(run, NOW)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'{"stage": "I", "step": 61, "lo\xc3')
    assert run_status(run, NOW) == before
    (run / "heartbeats" / "rank-0.json").write_text('{"time": 17')
    assert run_status(run, NOW)["state"] == "running"  # the last line is a sign of life, too


def test_alive_or_not(run: Path) -> None:
    assert run_status(run, NOW + 100)["state"] == "running"
    silent = run_status(run, NOW + 1000)
    assert silent["state"] == "silent" and "no sign of life for 17 min, computing on elsewhere" in silent["says"]
    _beat(run, rank=1, time=NOW - 150)
    assert "process 1 on elsewhere gave no sign of life for 2 min" in run_status(run, NOW)["says"]
    _beat(run, rank=1, since=500.0, doing="saving")
    assert (
        run_status(run, NOW)["state"] == "stuck"
        and "process 1 on elsewhere has been saving for 8 min" in run_status(run, NOW)["says"]
    )
    _beat(run, rank=1)
    _beat(run, host=platform.node(), pid=os.getpid())
    assert run_status(run, NOW)["state"] == "running"
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    _beat(run, host=platform.node(), pid=int(gone.stdout))
    dead = run_status(run, NOW)
    assert dead["state"] == "dead" and "is gone" in dead["says"]
    _append(run, "events.jsonl", {"time": NOW + 20, "event": "start", "global_step": 40, "starting_seconds": 5.0})
    assert run_status(run, NOW + 30)["state"] == "running"  # the dead one's beat is of an earlier life
    for event, state in (("stopped", "stopped"), ("failed", "failed"), ("finished", "finished")):
        _append(run, "events.jsonl", {"time": NOW + 40, "event": event, "global_step": 60})
        status = run_status(run, NOW + 100)
        assert status["state"] == state and "60 s ago" in status["says"]
        assert (status["time_left"] is None) == (event == "finished")


def test_the_second_stage_and_a_run_before_its_first_line(run: Path) -> None:
    _append(run, "metrics.jsonl", _line(10, "II", 100), _line(20, "II", 100, time=NOW + 20))
    status = run_status(run, NOW + 30)
    assert status["stage"]["number"] == 2 and status["share_done"] == pytest.approx((100 + 80) / 300)
    assert [part["name"] for part in status["time_left"]["stages"]] == ["II"]
    (run / "metrics.jsonl").unlink()
    status = run_status(run, NOW)
    assert status["last"] is None and status["stage"]["step"] == 0 and status["share_done"] == 0.0
    assert "stage       I (1 of 2), step 0 of 100" in status_text(status)


def test_a_run_of_before_events_and_heartbeats(run: Path) -> None:
    for name in ("events.jsonl", "heartbeats/rank-0.json", "run.json"):
        (run / name).unlink()
    (run / "heartbeats").rmdir()
    with pytest.raises(UserError, match="is no pretraining run"):
        run_status(run, NOW)
    (run / "config.yaml").write_text("out: x\n")
    status = run_status(run, NOW)
    assert status["time_left"] is None and status["share_done"] is None and "step 60" in status_text(status)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert videoar.main(["status", str(run)]) == 0 and "stage       I (1 of 2)" in capsys.readouterr().out
    assert videoar.main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["global_step"] == 60
    (tmp_path / "other").mkdir()
    for path, hint in ((tmp_path / "other", "name the folder `out`"), (tmp_path, f"name {run}")):
        assert videoar.main(["status", str(path)]) == 2
        error = capsys.readouterr().err.strip()
        assert f"{path} is no pretraining run: {hint}" in error and "\n" not in error


def test_the_page_holds_all_by_itself(run: Path) -> None:
    _append(
        run, "events.jsonl", {"time": NOW, "event": "bad_step", "global_step": 30, "reason": "a <loss> that is nan"}
    )
    for step in (20, 40):
        folder = run / "samples" / f"step-{step}"
        clip = np.random.default_rng(step).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
        write_video(clip, folder / "clips" / "00000.mp4")
        write_video(clip, folder / "contact.mp4")
        (folder / "clips" / "prompts.csv").write_text("path,caption\n00000.mp4,a <red> circle\n")
        result = {"global_step": step, "stage": "I", "scores": {"shapes_all": 0.25}}
        (folder / "samples.json").write_text(json.dumps(result))
        _append(
            run,
            "metrics.jsonl",
            {"stage": "I", "step": step, "global_step": step, "samples/shapes_all": 0.25, "samples/seconds": 3.0},
        )
    page = write_page(run, run / "page.html").read_text()
    titles = re.findall(r'aria-label="([^"]*)"', page)
    for name in (
        "loss a bit, nats, by step",
        "bits predicted right by scale, % and step",
        "loss a bit by latent frame and step",
        "learning rate, by step",
        "gradient norm, by step",
        "tokens a second, by step",
        "samples/shapes_all, by step",
        "a &lt;red&gt; circle",
    ):
        assert name in titles, (name, titles)
    assert any(title.startswith("goodput") for title in titles) and page.count("<video") == 2
    assert page.count("#dc2626") >= 10  # the bad step is marked in the curves
    assert "a &lt;loss&gt; that is nan" in page and "Time left" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page) and "http://www.w3.org" not in re.sub(
        r"<svg[^>]*>", "", page
    )


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 99, 100, 3600, 7500, 200000)] == [
        "0 s",
        "99 s",
        "2 min",
        "1 h 00 min",
        "2 h 05 min",
        "2 d 7 h",
    ]
