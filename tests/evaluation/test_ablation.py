"""The statistics of an ablation's table against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.ablation import TableRow, build, markdown, read_run
from evaluation.statistics import paired, spread
from tokenizer.errors import UserError

STEPS = ("pretrain", "evaluate")


def _run(folder: Path, loss: float | None, right: float = 0.5) -> Path:
    """A run's files as the commands write them; one without a loss is not finished."""
    (folder / "pretrain").mkdir(parents=True)
    (folder / "scores").mkdir()
    done = loss is not None
    step = {"seconds": 30.0, "peak_gb": 1.5, "done": True}
    (folder / "steps.json").write_text(json.dumps({"pretrain": step, "evaluate": step | {"done": done}}))
    lines = [
        {"global_step": 4, "validation/loss": 9.0, "validation/bit_accuracy": 0.1},
        {"global_step": 8, "validation/loss": loss, "validation/bit_accuracy": 0.75, "validation/bit_accuracy/frame_0": 0.7},
        {"global_step": 8, "loss": 1.0},
    ]  # fmt: skip
    (folder / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {name: right for name in ("colour", "shape", "direction", "speed", "all")} | {"clips": 4}
    (folder / "scores" / "shapes-0-9.json").write_text(json.dumps(scores))
    return folder


def _table(folder: Path) -> list[TableRow]:
    losses = {"a": {0: 0.5, 1: 0.6, 2: 0.7}, "b": {0: 0.4, 1: 0.5, 2: 0.63}, "c": {0: 0.4, 1: None}}
    rows = []
    for name, runs in losses.items():
        folders = {seed: _run(folder / name / str(seed), loss, 0.25 * seed) for seed, loss in runs.items()}
        paper, against = ("FVD 96.04", ()) if name == "a" else (None, ("a",))
        folders[2] = folders.get(2, folder / name / "2")
        rows.append(TableRow(name, name.upper(), (), paper, against, folders, STEPS))
    return rows  # fmt: skip


def test_mean_deviation_and_interval_by_hand() -> None:
    found = spread([1.0, 2.0, 6.0])
    # mean 3, sd sqrt((4 + 1 + 9) / 2) = sqrt 7, half-width 4.3027 sqrt(7 / 3) = 6.5724
    assert found is not None and found.interval is not None
    assert (found.mean, found.n) == (3.0, 3) and found.sd == pytest.approx(7**0.5)
    assert found.interval == pytest.approx((-3.5724, 9.5724), abs=1e-4)
    one = spread([2.0])
    assert one is not None and (one.sd, one.interval, one.n) == (None, None, 1) and spread([]) is None


def test_differences_are_paired_by_seed() -> None:
    # 10 - 1 and 5 - 4: seed 3 has no partner
    found = paired({1: 10.0, 2: 5.0, 3: 100.0}, {2: 4.0, 1: 1.0, 7: 0.0})
    # mean 5, sd sqrt 32, half-width 12.7062 * sqrt(32 / 2) = 50.825
    assert found is not None and found.interval == pytest.approx((5 - 50.825, 5 + 50.825), abs=1e-3)
    assert (found.mean, found.n) == (5.0, 2) and paired({1: 1.0}, {2: 1.0}) is None


def test_the_table(tmp_path: Path) -> None:
    result = build(_table(tmp_path), {"windows": ["0:9"]})
    a, b, c = result["rows"]
    assert a["summary"]["validation/loss"]["mean"] == pytest.approx(0.6)
    assert a["summary"]["validation/loss"]["sd"] == pytest.approx(0.1)
    # -0.1, -0.1, -0.07: mean -0.09, sd sqrt(0.0006 / 2) = 0.01732, half-width 4.3027 * 0.01 = 0.043
    difference = b["differences"]["a"]["validation/loss"]
    assert difference["mean"] == pytest.approx(-0.09) and difference["interval"] == pytest.approx(
        [-0.1330, -0.0470], abs=1e-4
    )
    assert list(c["runs"]) == ["0"] and c["summary"]["validation/loss"] == {
        "mean": 0.4,
        "sd": None,
        "interval": None,
        "n": 1,
    }
    assert result["missing"] == ["c, seed 1", "c, seed 2"]
    text = markdown(result)
    assert "7 of 9 runs are finished" in text and "Missing: c, seed 1; c, seed 2." in text
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in reversed(text.splitlines())
        if "|" in line
    }
    assert cells["A"] == ["FVD 96.04", "3", "0.6000 ± 0.1000", "75.00 ± 0.00", "25.0 ± 25.0"]
    assert cells["C"][:3] == ["-", "1", "0.4000"]
    assert cells["B - (A)"] == ["**-0.0900** [-0.1330, -0.0470]", "+0.00 [+0.00, +0.00]", "+0.0 [+0.0, +0.0]"]
    assert "4 generated videos a run" in text and "8 steps a run" in text and "7 minutes for all finished runs" in text


def test_rows_without_a_finished_run_are_called_missing(tmp_path: Path) -> None:
    rows = [
        TableRow("a", "A", (), None, (), {0: _run(tmp_path / "a", 0.5)}, STEPS),
        TableRow("b", "B", (), None, ("a",), {0: tmp_path / "b"}, STEPS),
    ]
    text = markdown(build(rows, {"windows": ["0:9"]}))
    line = next(line for line in text.splitlines() if line.startswith("| B   "))
    assert line.count("missing") == 3 and text.count("missing") >= 6


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    folder = _run(tmp_path / "a", 0.5)
    (folder / "pretrain" / "metrics.jsonl").write_text('{"global_step": 8, "loss": 1.0}\n')
    with pytest.raises(UserError, match="holds no validation"):
        read_run(folder, STEPS)
