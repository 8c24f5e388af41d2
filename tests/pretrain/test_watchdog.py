"""A run that hangs says where each process is and ends; heartbeats tell others how each one does."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import time
from pathlib import Path

import pytest

from pretrain.config import PretrainConfig
from pretrain.events import read_events
from pretrain.train import main_entry
from pretrain.watchdog import HUNG
from tests.pretrain.ranks import CONTEXT
from tests.pretrain.tiny import FT_LAUNCHER, finish, launch, metrics, stage, write_run
from tokenizer import settings
from tokenizer.errors import UserError


def test_every_process_of_a_hanging_run_shows_its_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 8)], data_timeout=5, checkpoint_every=2)
    monkeypatch.setenv("VIDEOAR_FAULT", "hang@4:rank1")
    words = [
        "--parallel.tensor_parallel_size",
        "2",
        "--resilience.hang_timeout",
        "10",
        "--resilience.heartbeat_every",
        "0.5",
    ]
    process = launch(tmp_path, file, 2, *words)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0 and re.search(rf"exitcode *: {HUNG}\b", output), output[-3000:]
    for rank in (0, 1):
        assert re.search(rf"HANG: process {rank} of 2 .* 3 steps finished", output), output[-3000:]
    # where each one is: the one that hangs, and the one that waits for it
    stacks = [(tmp_path / "run" / "heartbeats" / f"stacks-{rank}.txt").read_text() for rank in (0, 1)]
    assert " in strike\n" in stacks[1] and " in forward_backward\n" in stacks[0] and " in strike\n" not in stacks[0]
    for text in stacks:
        assert " in _watch\n" in text and all(line in output for line in text.splitlines() if " in strike" in line)
    beats = [json.loads((tmp_path / "run" / "heartbeats" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [beat["doing"] for beat in beats] == ["computing", "beginning a step"]
    assert all(beat["global_step"] == 3 and beat["since"] > 5 for beat in beats)
    (event,) = (event for event in read_events(tmp_path / "run") if event["event"] == "hang")
    assert event["global_step"] == 3 and event["seconds"] >= 10


def test_nvidias_rank_monitor_ends_a_run_that_hangs_and_starts_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_run(
        tmp_path, stages=[stage(tmp_path / "codes", 6)], data_timeout=5, checkpoint_every=2, save_in_background=False
    )
    monkeypatch.setenv("VIDEOAR_FAULT", "hang@4:rank1")
    words = ["--resilience.hang_timeout", "10", "--resilience.heartbeat_every", "0.5"]
    output = finish(launch(tmp_path, file, 2, *words, launcher=FT_LAUNCHER))
    assert output.count("hang detection: NVIDIA rank monitor: installed") == 2
    assert (
        "Did not get subsequent heartbeat. Waited 50.00 seconds" in output
    )  # its words; time for the stacks, which are ours
    assert " in strike\n" in output and " in forward_backward\n" in output
    events = [(event["event"], event["global_step"]) for event in read_events(tmp_path / "run")]
    assert ("hang", 3) in events and events[-1] == ("finished", 6)
    assert [step for event, step in events if event == "start"] == [0, 2]
    assert [line["global_step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def _hang_twice(folder: str) -> None:
    """With a monitor that lets it live: it goes on after its first hang."""
    os.dup2(os.open(f"{folder}/log", os.O_CREAT | os.O_WRONLY), 2)
    from parallel.setup import ParallelConfig, initialize
    from pretrain import watchdog
    from pretrain.resilience import ResilienceConfig

    class Monitor:
        def send_heartbeat(self) -> None:
            pass

        def shutdown_workload_monitoring(self) -> None:
            pass

    watchdog.GRACE = 0.2
    watch = watchdog.Watchdog(
        ResilienceConfig(hang_timeout=1.0), Path(folder), initialize(ParallelConfig(), 0), Monitor()
    )
    for number in (1, 2):
        watch.beat(f"work {number}", number)
        time.sleep(2.5)
    watch.close()


def test_a_run_that_goes_on_after_an_alarm_is_watched_as_before(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=_hang_twice, args=(str(tmp_path),))
    process.start()
    process.join(90)
    log = (tmp_path / "log").read_text()
    assert (
        process.exitcode == 0 and log.count("HANG: ") == 2 and "work 1, 1 steps" in log and "work 2, 2 steps" in log
    ), log


def _hold(folder: str) -> None:
    """Hangs in C without giving up the interpreter's lock; the log is a file."""
    os.dup2(os.open(f"{folder}/log", os.O_CREAT | os.O_WRONLY), 2)
    from parallel.setup import ParallelConfig, initialize
    from pretrain import watchdog
    from pretrain.resilience import ResilienceConfig

    watchdog.GRACE = 0.5
    info = initialize(ParallelConfig(), 0)
    with watchdog.watch(ResilienceConfig(hang_timeout=1.0), Path(folder), info):
        ctypes.PyDLL(None).sleep(60)


def test_a_hang_that_stops_all_of_python_ends_too(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=_hold, args=(str(tmp_path),))
    process.start()
    process.join(60)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 1 and "Timeout" in log and " in _hold\n" in log, log


def test_heartbeats_come_as_set_and_hang_detection_may_be_off(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 3)])
    words = ["--resilience.hang_timeout", "0", "--resilience.heartbeat_every", "0.01"]
    main_entry(settings.load(PretrainConfig, file, words))
    beat = json.loads((tmp_path / "run" / "heartbeats" / "rank-0.json").read_text())
    assert beat["rank"] == 0 and 0 <= beat["global_step"] <= 3
    assert "hang detection: own: this process was not started by ft_launcher" in capsys.readouterr().err
    with pytest.raises(UserError, match="hang_monitor is nvidia, but this process was not started by ft_launcher"):
        main_entry(settings.load(PretrainConfig, file, [*words, "--resilience.hang_monitor", "nvidia"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="hang_monitor is nvidia, but nvidia_resiliency_ext is not installed"):
        main_entry(settings.load(PretrainConfig, file, [*words, "--resilience.hang_monitor", "nvidia"]))
    main_entry(settings.load(PretrainConfig, file, [*words, "--resilience.hang_monitor", "own"]))
    assert "hang detection: own: resilience.hang_monitor says so" in capsys.readouterr().err
