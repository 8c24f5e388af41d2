"""What a run tells of itself: numbers that add up, a best checkpoint that stays, samples beside the training, and each setting's effect."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inference.checkpoint import load_model
from parallel import checkpoint
from pretrain.config import PretrainConfig
from pretrain.events import read_events
from pretrain.export import export
from pretrain.model_card import Sampling
from pretrain.train import main_entry
from pretrain.trainer import Trainer
from pretrain.watching import sampler as sampler_module
from pretrain.watching.best import Best, best_checkpoint, read_best
from pretrain.watching.config import SamplesConfig, WatchConfig
from pretrain.watching.ledger import Ledger, process_age, run_began
from pretrain.watching.meter import StepMeter
from pretrain.watching.sampler import Sampler
from pretrain.watching.samples import make_samples, read_config
from pretrain.watching.tensorboard import choose_tensorboard
from tests.evaluation.test_fvd import Detector, script
from tests.pretrain.tiny import metrics, stage, write_codes, write_run, write_tokenizer
from tokenizer import settings
from tokenizer.errors import UserError

SPEED = {"time", "seconds", "data_wait", "tokens_per_second", "mfu", "memory_gb", "productive_seconds", "goodput"}


def _load(file: Path, *words: str) -> PretrainConfig:
    return settings.load(PretrainConfig, file, list(words))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, validated and saved every second one; the first checkpoint is made the best one."""
    folder = tmp_path_factory.mktemp("watched")
    fingerprint = write_tokenizer(folder / "tokenizer")
    write_codes(folder / "codes", fingerprint, frames=4, clips=12)
    file = write_run(
        folder,
        network={"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_text_length": 8},
        stages=[stage(folder / "codes", 6, validation=str(folder / "codes"))],
        validate_every=2,
        checkpoint_every=2,
        keep=1,
        watch={"peak_flops": 1e9, "best_is": "highest", "tensorboard": True},
    )
    main_entry(_load(file))
    return folder


def test_the_lines_tell_of_speed_and_add_up(watched: Path) -> None:
    out = watched / "run"
    lines = [line for line in metrics(out) if "loss" in line]
    assert all(
        SPEED | {"loss/scale_1", "loss/frame_0", "bit_accuracy/frame_0", "lr", "grad_norm"} <= line.keys()
        for line in lines
    )
    assert sum(line["seconds"] for line in lines) == pytest.approx(lines[-1]["productive_seconds"], abs=0.01)
    facts = json.loads((out / "run.json").read_text())
    assert (facts["peak_flops"], facts["peak_source"], facts["devices"]) == (1e9, "configured", 1)
    for line in lines:
        # the file's times are rounded to milliseconds, of which a first step takes few
        assert line["goodput"] * (line["time"] - facts["began"]) == pytest.approx(line["productive_seconds"], abs=0.002)
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"])
        assert 0 <= line["data_wait"] < line["seconds"] and line["memory_gb"] > 0.1
    # MFU: the FLOPs follow from it, and are at most those of whole texts and no hidden frame; images' are fewer
    flops = [line["mfu"] * line["seconds"] * 1e9 for line in lines]
    assert 0 < min(flops) < max(flops)
    [one] = facts["stages"]
    assert one["steps"] == 6 and 0.5 * one["flops_per_step"] < sum(flops) / 6 < 1.5 * one["flops_per_step"]


def test_the_last_event_accounts_for_every_second(watched: Path) -> None:
    events = read_events(watched / "run")
    assert [event["event"] for event in events] == ["start", "saved", "saved", "saved", "finished"]
    start, end = events[0], events[-1]
    began = run_began(events)
    assert began == pytest.approx(start["time"] - start["starting_seconds"])
    assert sum(end["seconds"].values()) == pytest.approx(end["time"] - began, abs=0.05)
    assert {"starting", "steps", "validation", "saving"} <= end["seconds"].keys()


def test_the_best_checkpoint_stays_and_is_exported(watched: Path, tmp_path: Path) -> None:
    out = watched / "run"
    assert [folder.name for folder in checkpoint.complete(out / "checkpoints")] == ["step-2", "step-6"]
    best = read_best(out)
    values = {line["global_step"]: line["validation/loss"] for line in metrics(out) if "validation/loss" in line}
    assert best is not None and best["value"] == values[2] == max(values.values()) and best["stage"] == "one"
    export(out / "best", tmp_path / "best", verify=False, sampling=Sampling("no"))
    export(out / "checkpoints" / "step-2", tmp_path / "second", verify=False, sampling=Sampling("no"))
    export(out, tmp_path / "newest", verify=False, sampling=Sampling("no"))
    states = [load_model(tmp_path / name).state_dict() for name in ("best", "second", "newest")]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert any(not torch.equal(states[0][name], value) for name, value in states[2].items())
    with pytest.raises(UserError, match="has no best checkpoint"):
        export(tmp_path / "best" / "best", tmp_path / "other")


def test_steps_that_were_lost_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kills of `benchmarks/chaos_train.py` are judged by the same sum."""
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 8)], checkpoint_every=4, save_in_background=False)
    step = Trainer._step

    def ends(self, stage, batch, index, global_step):
        if global_step == 6:
            raise ConnectionError("the machine is gone")
        return step(self, stage, batch, index, global_step)

    monkeypatch.setattr(Trainer, "_step", ends)
    with pytest.raises(ConnectionError):
        main_entry(_load(file))
    before = metrics(tmp_path / "run")[-1]["productive_seconds"]
    monkeypatch.setattr(Trainer, "_step", step)
    main_entry(_load(file))
    lines = metrics(tmp_path / "run")
    assert [line["global_step"] for line in lines] == list(range(1, 9))
    total = lines[-1]["productive_seconds"]
    assert total == pytest.approx(sum(line["seconds"] for line in lines), abs=0.01)
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events] == ["start", "saved", "start", "saved", "finished"]
    assert lines[3]["productive_seconds"] < before  # as of the checkpoint, without the two steps after it
    assert lines[-1]["time"] - run_began(events) > total  # while all that was lost is in the wall time


def test_a_ledger_adds_up_to_the_age_of_its_process() -> None:
    ledger = Ledger()
    time.sleep(0.05)
    assert ledger.spend("starting") >= 0.05
    time.sleep(0.02)
    done = ledger.spend("steps")
    ledger.leave_out(done)
    assert ledger.seconds["left_out"] == done and ledger.seconds["steps"] == 0
    again, age = Ledger(), process_age()  # a second run of a process begins when it is asked for
    assert again.spend("starting") < 1 < age
    assert run_began([]) is None
    assert (
        run_began([{"event": "start", "time": 9.0, "starting_seconds": 2.0}, {"event": "start", "time": 50.0}]) == 7.0
    )


def test_a_line_is_of_the_steps_since_the_one_before() -> None:
    meter = StepMeter(peak=1000.0, began=time.time() - 100)
    meter.add(seconds=1.0, waited=0.25, tokens=30, flops=300.0)
    meter.add(seconds=3.0, waited=0.75, tokens=50, flops=500.0)
    values = meter.values(productive_seconds=50.0)
    assert (values["seconds"], values["data_wait"], values["tokens_per_second"], values["mfu"]) == (2.0, 0.5, 20.0, 0.2)
    assert values["goodput"] == pytest.approx(0.5, abs=0.01)
    meter.add(seconds=1.0, waited=0.0, tokens=7, flops=1.0)
    assert meter.values(51.0)["tokens_per_second"] == 7.0


def test_best_is_by_metric_and_direction_and_of_the_newest_stage(tmp_path: Path) -> None:
    folders = {step: tmp_path / "checkpoints" / f"step-{step}" for step in range(1, 7)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    best = Best(tmp_path, WatchConfig(), ["I", "II"])

    def consider(step: int, stage: str, value: float, by: Best = best) -> bool:
        return by.consider(folders[step], {"validation/loss": value, "stage": stage, "global_step": step})

    assert consider(1, "I", 0.5) and not consider(2, "I", 0.6) and not consider(3, "I", float("nan"))
    assert consider(3, "I", 0.4) and best.folder() == folders[3]
    assert consider(4, "II", 0.9) and not consider(5, "I", 0.1)  # other clips, other numbers
    assert consider(5, "II", 0.95, Best(tmp_path, WatchConfig(best_is="highest"), ["I", "II"]))
    folders[5].rmdir()
    assert best_checkpoint(tmp_path) is None and consider(6, "II", 2.0)  # a damaged one was put aside
    assert not best.consider(folders[6], {"validation/bit_accuracy": 1.0, "stage": "II", "global_step": 6})
    other = Best(tmp_path, WatchConfig(best_metric="validation/bit_accuracy"), ["I", "II"])
    assert other.consider(folders[6], {"validation/bit_accuracy": 0.1, "stage": "II", "global_step": 6})
    assert Best(tmp_path, WatchConfig(best_metric=None), ["I", "II"]).folder() is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--watch.best_metric", "loss"], "watch.best_metric is 'loss'"),
        (["--watch.peak_flops", "-1"], "watch.peak_flops is -1"),
        (["--samples.count", "0"], "samples.count is 0"),
        (["--samples.i3d", "x"], "go together"),
        (["--samples.minutes", "0"], "samples.minutes is 0"),
    ],
)
def test_settings_that_make_no_sense(watched: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        _load(watched / "run.yaml", *words)


def test_a_missing_file_of_the_samples_is_told_at_the_start(watched: Path, tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "new"), "--samples.every", "1", "--samples.prompts", "nowhere.txt"]
    with pytest.raises(UserError, match="samples.prompts: nowhere.txt does not exist"):
        main_entry(_load(watched / "run.yaml", *words))
    assert not (tmp_path / "new").exists()


def test_tensorboard_is_left_out_or_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_tensorboard(False, tmp_path, 0) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package tensorboard is not installed"):
        choose_tensorboard(True, tmp_path, 0)


def test_tensorboard_holds_the_numbers_of_the_lines(watched: Path) -> None:
    events = EventAccumulator(str(watched / "run" / "tensorboard")).Reload()
    for name in ("loss", "grad_norm", "validation/loss", "bit_accuracy/frame_0"):
        lines = [(line["global_step"], line[name]) for line in metrics(watched / "run") if name in line]
        assert [event.step for event in events.Scalars(name)] == [step for step, _ in lines]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([value for _, value in lines])


def test_tensorboard_holds_each_number_once_after_a_rewind(tmp_path: Path) -> None:
    board = choose_tensorboard(True, tmp_path, 0)
    assert board is not None
    for step in (1, 2, 3):
        board.write({"loss": float(step), "stage": "one", "global_step": step}, step)
    board.rewind(1)
    board.write({"loss": 20.0}, 2)
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


# -- samples


def _clips(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "clips").glob("*.mp4"))]


def _set(watched: Path, name: str, *words: str) -> Path:
    """The samples of the newest checkpoint, moved out of the way of the next ones."""
    made = make_samples(watched / "run", None, ["--count", "2", "--per_prompt", "1", *words])
    moved = watched / f"set {name}"
    made.rename(moved)
    return moved


def test_samples_are_what_the_settings_say(watched: Path) -> None:
    made = make_samples(watched / "run", "step-2", ["--count", "2"])
    assert made == watched / "run" / "samples" / "step-2"
    assert {file.name for file in made.iterdir()} == {"clips", "contact.mp4", "contact.webp", "samples.json"}
    result = json.loads((made / "samples.json").read_text())
    assert (result["global_step"], result["step"], result["stage"]) == (2, 2, "one")
    assert result["prompts"] == ["clip 0", "clip 1"] and result["scores"] == {} and len(_clips(made)) == 4
    mark = (made / "samples.json").stat().st_mtime_ns
    assert make_samples(watched / "run", "best") == made and (made / "samples.json").stat().st_mtime_ns == mark

    base = _set(watched, "base")
    assert _clips(_set(watched, "again")) == _clips(base)
    one = _set(watched, "one at a time", "--batch_size", "1")
    assert json.loads((one / "clips" / "receipt.json").read_text())["arguments"]["batch_size"] == 1
    file = watched / "prompts.txt"
    file.write_text("first\nsecond\nthird\n")
    other = _set(watched, "prompts", "--prompts", str(file), "--count", "3")
    assert json.loads((other / "samples.json").read_text())["prompts"] == ["first", "second", "third"]
    for name, value in (("guidance", "7.5"), ("temperature", "0.1"), ("seed", "5")):
        assert _clips(_set(watched, name, f"--{name}", value)) != _clips(base), name
    with pytest.raises(UserError, match="no complete checkpoint|does not exist"):
        make_samples(watched / "run", "step-77")
    with pytest.raises(UserError, match="is no pretraining run"):
        make_samples(watched / "codes")
    if not torch.cuda.is_available():
        with pytest.raises((UserError, RuntimeError, AssertionError)):
            _set(watched, "cuda", "--device", "cuda")


def test_samples_are_scored(watched: Path) -> None:
    i3d = script(Detector(), watched / "i3d.pt")
    file = watched / "shapes.txt"
    file.write_text("a red circle moving left slowly\na blue square moving up quickly\n")
    words = [
        "--prompts",
        str(file),
        "--shapes",
        "true",
        "--fvd_real",
        str(watched / "set real" / "clips"),
        "--i3d",
        str(i3d),
    ]
    _set(watched, "real")
    result = json.loads((_set(watched, "scored", *words) / "samples.json").read_text())
    assert result["problems"] == [] and result["scores"]["fvd"] > 0
    assert {"shapes_colour", "shapes_shape", "shapes_direction", "shapes_speed", "shapes_all"} < result["scores"].keys()
    # a caption of another corpus has no shapes: the set stays, and says so
    result = json.loads((_set(watched, "unscored", "--shapes", "true") / "samples.json").read_text())
    assert result["scores"] == {} and len(result["problems"]) == 1


def test_a_training_has_its_samples_made_beside_it(watched: Path) -> None:
    """The only test with a real process beside a real training: its checkpoint is kept, its scores choose the best one."""
    out = watched / "sampled"
    words = [
        "--out",
        str(out),
        "--samples.every",
        "4",
        "--samples.count",
        "1",
        "--samples.per_prompt",
        "1",
        "--samples.low_priority",
        "false",
    ]
    main_entry(_load(watched / "run.yaml", *words, "--watch.best_metric", "samples/seconds"))
    [line] = [line for line in metrics(out) if "samples/seconds" in line]
    assert (
        line["global_step"] == 4 and line["stage"] == "one" and (out / "samples" / "step-4" / "contact.webp").exists()
    )
    assert [folder.name for folder in checkpoint.complete(out / "checkpoints")] == ["step-4", "step-6"]
    best = read_best(out)
    assert best is not None and (best["metric"], best["global_step"]) == ("samples/seconds", 4)
    # the same numbers as without
    for one, other in zip(
        metrics(watched / "run"), (line for line in metrics(out) if "samples/seconds" not in line), strict=True
    ):
        assert {name: one[name] for name in one.keys() - SPEED} == {name: other[name] for name in other.keys() - SPEED}


def test_a_sampler_runs_alone_in_its_time_and_its_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"  # in the interpreter's place: notes its environment, then does what the file says
    script.write_text(
        f'#!/bin/sh\nenv > {tmp_path}/environment\nnice > {tmp_path}/nice\necho "a reason" >&2\nsh {tmp_path}/act\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sampler_module.sys, "executable", str(script))
    for name in ("RANK", "TORCHELASTIC_RUN_ID", "VIDEOAR_FAULT"):
        monkeypatch.setenv(name, "1")
    (tmp_path / "act").write_text("exec sleep 100")
    config = SamplesConfig(every=10, threads=3, minutes=0.01)
    sampler = Sampler(tmp_path, config, parameters=1000)
    assert [sampler.due(step) for step in (0, 9, 10, 15)] == [False, False, True, True]
    assert sampler.start(tmp_path / "step-10", 10) is None and sampler.checkpoint == tmp_path / "step-10"
    assert "still being made" in (sampler.start(tmp_path / "step-20", 20) or "")
    assert not sampler.due(15) and sampler.due(20)
    while not (tmp_path / "nice").exists():
        time.sleep(0.01)
    left = (
        tmp_path / "samples" / f"step-10.tmp.{sampler_module.socket.gethostname()}.{sampler._running.process.pid}.abc"
    )
    left.mkdir()
    while (ended := sampler.ended()) is None:
        time.sleep(0.05)
    assert ended == (10, "given up after 0.01 minutes") and sampler.checkpoint is None and not left.exists()
    names = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert names["OMP_NUM_THREADS"] == "3" and names["CUDA_VISIBLE_DEVICES"] == "" and names[sampler_module.LOW] == "1"
    assert not {"RANK", "TORCHELASTIC_RUN_ID", "VIDEOAR_FAULT"} & names.keys()

    (tmp_path / "act").write_text("exit 2")
    sampler = Sampler(tmp_path, SamplesConfig(every=10, device="cuda", low_priority=False), parameters=1000)
    sampler.start(tmp_path / "step-20", 20)
    while (ended := sampler.ended()) is None:
        time.sleep(0.01)
    assert ended == (20, "a reason")
    names = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert names.get("CUDA_VISIBLE_DEVICES") != "" and sampler_module.LOW not in names
    assert "GB of memory are free" in (
        Sampler(tmp_path, config, parameters=10**15).start(tmp_path / "step-30", 30) or ""
    )
    assert read_config  # the settings of `videoar samples` are those of the run
    assert sys.executable
