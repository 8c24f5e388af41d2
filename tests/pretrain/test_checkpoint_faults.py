"""A damaged checkpoint, a full disk, and signals: the run lives on, from what is sound."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from parallel import checkpoint, integrity
from parallel.checkpoint import MARKER
from parallel.integrity import damage
from parallel.saving import SaveError
from pretrain.config import PretrainConfig
from pretrain.events import read_events
from pretrain.export import export
from pretrain.start import Position
from pretrain.train import main_entry
from pretrain.trainer import Trainer
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny import metrics, stage, write_run
from tokenizer import settings
from tokenizer.errors import Fault, UserError


def _run(file: Path, *words: str) -> bool:
    return main_entry(settings.load(PretrainConfig, file, list(words)))


def _exact(out: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(out)]


def _happened(out: Path, event: str) -> list[dict[str, Any]]:
    return [entry for entry in read_events(out) if entry["event"] == event]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_put_aside_by_all_and_the_one_before_is_taken(tmp_path: Path) -> None:
    """Two tensor-parallel processes, each of which looks at other files; a flipped bit, and in the checkpoint before a shorter file."""
    words = ["--parallel.tensor_parallel_size", "2"]
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 6)], checkpoint_every=2, keep=5)
    assert run_ranks(file, 2, words) == [0, 0]
    out, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    expected = _exact(out)
    files = sorted((folder / "step-6").glob("*.distcp"))
    assert len(files) == 2
    _flip(files[1])
    shorter = sorted((folder / "step-4").glob("*.distcp"))[0]
    size = shorter.stat().st_size
    os.truncate(shorter, size - 1)
    assert run_ranks(file, 2, words) == [0, 0]
    assert _exact(out) == expected
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "corrupt-step-4", "corrupt-step-6", "step-2", "step-4", "step-6",
    ]  # fmt: skip
    told = [(event["folder"], event["reason"]) for event in _happened(out, "damaged_checkpoint")]
    assert told == [
        ("corrupt-step-6", f"{files[1].name} has another checksum than was written"),
        ("corrupt-step-4", f"{shorter.name} has {size - 1} bytes instead of {size}"),
    ]
    assert _happened(out, "start")[-1]["global_step"] == 2


def test_a_checkpoint_that_cannot_be_read_now_is_not_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 1)])
    _run(file)
    original, failures = integrity.sum_of, [2]

    def failing(path: Path) -> integrity.FileSum:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(integrity, "sum_of", failing)
    monkeypatch.setattr(integrity, "PAUSES", (0.0, 0.0))
    folder = tmp_path / "run" / "checkpoints"
    assert damage(folder / "step-1") is None and failures[0] < 0  # the third try
    failures[0] = 10
    with pytest.raises(Fault, match=r"step-1 can't be read on .*Input/output error.*look at that machine"):
        _run(file)
    assert [entry.name for entry in folder.iterdir()] == ["step-1"]


def test_every_file_of_a_checkpoint_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "PAUSES", (0.0,))
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 1)])
    _run(file)
    whole = tmp_path / "run" / "checkpoints" / "step-1"
    names = sorted(entry.name for entry in whole.iterdir() if entry.name != MARKER)
    assert sorted(json.loads((whole / MARKER).read_text())["files"]) == names and len(names) == 4
    assert damage(whole) is None
    for name in names:
        copy = tmp_path / f"of {name}"
        shutil.copytree(whole, copy)
        _flip(copy / name)
        assert damage(copy) == f"{name} has another checksum than was written"
        # of two ranks exactly one looks at it
        assert [damage(copy, rank, 2) is None for rank in (0, 1)].count(False) == 1
        (copy / name).unlink()
        assert damage(copy) == f"{name} is missing"
    (copy / MARKER).write_text('{"step": 1')
    assert "JSONDecodeError" in (damage(copy) or "")
    (copy / MARKER).write_text('{"step": 1}')  # of a version without checksums
    assert damage(copy) is None
    # there is no other one: nothing is renamed, and nobody begins anew unasked
    _flip(whole / names[-1])
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged .the newest, step-1: .*another checksum"):
        _run(file)
    with pytest.raises(UserError, match=r"step-1 is damaged .*another checksum.*: export another one"):
        export(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert checkpoint.latest(whole.parent) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # an error may still hold a file of it


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_costs_a_checkpoint_and_no_more(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, background: bool
) -> None:
    """The disk is full when step 2 is saved, to the last byte, and has space again at step 3."""
    write_run(tmp_path)
    file = write_run(
        tmp_path,
        out=str(small_disk / "run"),
        stages=[stage(tmp_path / "codes", 4)],
        checkpoint_every=1,
        save_in_background=background,
        watch={"tensorboard": True},
    )
    filler, original, folder = small_disk / "filler", Trainer._save, small_disk / "run" / "checkpoints"

    def save(trainer: Trainer, position: Position, *args: Any, **names: Any) -> None:
        if position.step == 2:
            trainer.saver.wait()
            _fill(filler)
        if position.step == 3:
            trainer._finish_save()
            # nothing of the failed one is left, and what was there is whole
            assert [entry.name for entry in folder.iterdir()] == ["step-1"] and damage(folder / "step-1") is None
            filler.unlink()
        original(trainer, position, *args, **names)

    monkeypatch.setattr(Trainer, "_save", save)
    assert _run(file)
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-3", "step-4"]
    assert [line["step"] for line in metrics(small_disk / "run")] == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert (
        "WARNING: WITHOUT A CHECKPOINT" in said
        and "step-2 could not be written" in said
        and "0.0 MB free there" in said
    )
    monkeypatch.undo()
    assert damage(folder / "step-4") is None and _run(file)


def test_a_run_that_starts_on_a_full_disk_says_so(tmp_path: Path, small_disk: Path) -> None:
    write_run(tmp_path)
    file = write_run(tmp_path, out=str(small_disk / "run"), stages=[stage(tmp_path / "codes", 1)])
    _fill(small_disk / "filler")
    with pytest.raises(UserError, match="No space left on device.*make room"):
        _run(file)
    (small_disk / "filler").unlink()
    assert _run(file)


def test_the_last_save_is_tried_again_as_set(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    file = write_run(tmp_path, out=str(small_disk / "run"), stages=[stage(tmp_path / "codes", 1)])
    pauses: list[float] = []
    filler, original = small_disk / "filler", Trainer._save

    def save(trainer: Trainer, *args: Any, **names: Any) -> None:
        _fill(filler)
        original(trainer, *args, **names)

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            filler.unlink()

    monkeypatch.setattr(Trainer, "_save", save)
    monkeypatch.setattr("pretrain.trainer.time.sleep", pause)
    words = ["--resilience.save_pause", "0.25", "--resilience.save_tries"]
    with pytest.raises(SaveError, match="could not be written .*; 0.0 MB free there"):
        _run(file, *words, "2")
    assert pauses == [0.25] and checkpoint.latest(small_disk / "run" / "checkpoints") is None
    filler.unlink()
    assert _run(file, *words, "4")  # the third pause makes space
    assert pauses == [0.25] * 3
    # a job that ends with an earlier stage has a last save, too
    stages = [stage(tmp_path / "codes", 1, name=name) for name in ("one", "two")]
    file = write_run(tmp_path, out=str(small_disk / "staged"), stages=stages)
    with pytest.raises(SaveError, match="could not be written"):
        _run(file, *words, "2", "--last_stage", "one")
    filler.unlink()
    assert checkpoint.latest(small_disk / "run" / "checkpoints") is not None


def _fill(filler: Path) -> None:
    """Takes all the space there is."""
    with filler.open("wb", buffering=0) as out:
        try:
            while True:
                out.write(b"x" * 4096)
        except OSError:
            pass


@pytest.mark.parametrize(
    ("number", "first"),
    [
        (signal.SIGUSR1, "all at once"),
        (signal.SIGTERM, "all at once"),
        (signal.SIGINT, "all at once"),
        (signal.SIGTERM, "readers first"),
    ],
)
def test_a_signal_to_all_processes_of_a_run_saves_and_stops(tmp_path: Path, number: signal.Signals, first: str) -> None:
    """Schedulers signal whole jobs, in any order: also the processes that read data or carry logs, which die of it."""
    stages, logs = [stage(tmp_path / "codes", 400)], {"mode": "offline"}  # with a process of its own
    file = write_run(tmp_path, stages=stages, checkpoint_every=1000, data_workers=1, wandb=logs)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = ["-m", "videoar", "pretrain", "--config", str(file)]
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    if first == "readers first":
        readers = psutil.Process(process.pid).children(recursive=True)
        for reader in readers:
            reader.send_signal(number)
        psutil.wait_procs(readers, timeout=0)
        time.sleep(0.2)
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 3 and "stopped by a signal and saved" in said, said
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == f"step-{len(metrics(tmp_path / 'run'))}"
    assert read_events(tmp_path / "run")[-1]["event"] == "stopped"
