"""The log of a run: resumed it holds each step once, and it outlives a Weights & Biases that does not start."""

import errno
import json
import time

import psutil
import wandb

from tokenizer import wandb_log
from tokenizer.metrics_log import MetricsLog
from tokenizer.wandb_log import WandbConfig


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_checkpoint_are_written_again(tmp_path):
    off = WandbConfig(mode="disabled")
    log = MetricsLog(tmp_path, 0, off, {}, key="step")
    for step in (1, 2, 3):
        log.write({"step": step})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # cut short by a kill
    log = MetricsLog(tmp_path, 2, off, {}, key="step")
    log.write({"step": 3})
    log.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_lost_steps_go_on_a_full_disk_too(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0, WandbConfig(mode="disabled"), {}, key="step")
    for step in (1, 2, 3):
        log.write({"step": step})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tokenizer.metrics_log.write_whole", full)
    log.rewind(1)
    log.write({"step": 2})
    log.close()
    assert steps(tmp_path) == [1, 2]


def test_a_service_that_dies_is_missed_once_and_taken_up_by_the_next_start(tmp_path, capsys):
    online = WandbConfig(mode="offline", project="shapes", name="first try")
    log = MetricsLog(tmp_path, 0, online, {}, key="step")
    assert log.wandb._run.project == "shapes" and log.wandb._run.name == "first try"
    log.write({"step": 1})
    for process in psutil.Process().children(recursive=True):
        if "wandb" in process.name():
            process.kill()
            process.wait()
    for step in range(2, 5):
        log.write({"step": step})
        time.sleep(0.1)
    log.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("WARNING: Weights & Biases has failed") == 1
    log = MetricsLog(tmp_path, 4, online, {}, key="step")
    assert log.wandb._run.id == (tmp_path / "wandb-id.txt").read_text()
    log.close()


def test_a_run_that_another_process_still_holds_is_tried_again_then_left(tmp_path, monkeypatch, capsys):
    tries = []
    real = wandb.init

    def held(**arguments):
        tries.append(arguments["id"])
        if len(tries) < 3:
            raise RuntimeError("run ID is in use")
        return real(**arguments)

    monkeypatch.setattr(wandb_log, "PAUSE", 0.0)
    monkeypatch.setattr(wandb, "init", held)
    log = MetricsLog(tmp_path, 0, WandbConfig(mode="offline"), {}, key="step")
    log.write({"step": 1})
    log.close()
    assert len(tries) == 3 and len(set(tries)) == 1 and list((tmp_path / "wandb").glob("offline-run-*"))

    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("run ID is in use")))
    log = MetricsLog(tmp_path, 1, WandbConfig(mode="offline"), {}, key="step")
    log.write({"step": 2})
    log.close()
    assert steps(tmp_path) == [1, 2]
    assert "does not start (run ID is in use): the run's numbers go to metrics.jsonl only" in capsys.readouterr().err
