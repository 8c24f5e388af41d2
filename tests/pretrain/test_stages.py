"""Three stages under torchrun, export, and what a run refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from inference.checkpoint import load_model
from inference.pipeline import VideoARPipeline
from parallel.setup import ProcessInfo
from pretrain.config import PretrainConfig
from pretrain.export import export
from pretrain.train import check_batches, main_entry
from tests.pretrain.tiny import finish, launch, metrics, stage, write_codes, write_run, write_tokenizer
from tokenizer import settings
from tokenizer.errors import UserError


def _load(file: Path, *overrides: str) -> PretrainConfig:
    return settings.load(PretrainConfig, file, list(overrides))


def test_three_stages_and_export(tmp_path: Path) -> None:
    fingerprint = write_tokenizer(tmp_path / "tokenizer")
    low, high = tmp_path / "codes", tmp_path / "high"
    write_codes(low, fingerprint, side=2, frames=2)
    write_codes(high, fingerprint, side=4, frames=3)
    stages = [
        stage(low, 20, name="I", codes=[{"dir": str(low), "num_frames": 1}, {"dir": str(low)}], validation=str(low)),
        stage(high, 8, name="II", codes=[{"dir": str(high), "num_frames": 1}, {"dir": str(high), "num_frames": 2}]),
        stage(high, 6, name="III", codes=[{"dir": str(high)}], token_weight="scale", validation=str(high)),
    ]
    file = write_run(tmp_path, stages=stages, validate_every=10, wandb={"mode": "offline"}, log_every=2)
    output = finish(launch(tmp_path, file, 2, "--parallel.tensor_parallel_size", "2"))
    assert "pretrain III (3/3): 6/6" in output

    lines = metrics(tmp_path / "run")
    training = [line for line in lines if "loss" in line]
    assert [line["stage"] for line in training] == ["I"] * 10 + ["II"] * 4 + ["III"] * 3
    assert (
        training[-1]["global_step"] == 34 and {"seconds", "tokens_per_second", "lr", "grad_norm"} <= training[-1].keys()
    )
    assert "bit_accuracy/frame_2" in training[-1] and "bit_accuracy/frame_2" not in training[0]
    checks = [(line["stage"], line["step"]) for line in lines if "validation/loss" in line]
    assert checks == [("I", 10), ("I", 20), ("III", 6)]
    # a stage starts from the one before: its first losses are far below those of a fresh network (log 2)
    assert training[0]["loss"] > 0.685 and training[10]["loss"] < 0.675
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))

    model = export(tmp_path / "run", tmp_path / "model", tmp_path / "tokenizer")
    assert (model.schedule.grid, model.num_frames, model.fps) == ((4, 4), 3, 8.0)
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["tokenizer_fingerprint"] == fingerprint and content["text_encoder"] == "bytes"
    clip = VideoARPipeline.from_pretrained(tmp_path / "model")("a word", num_frames=9)
    assert clip.frames.shape == (9, 64, 64, 3)

    # the early checkpoint knows only what it was trained on, and an export can be repeated over an old one
    early = export(tmp_path / "run" / "checkpoints" / "step-28", tmp_path / "model", verify=False)
    assert (early.schedule.grid, early.num_frames) == ((4, 4), 2)
    assert load_model(tmp_path / "model").config == early

    marker = tmp_path / "run" / "checkpoints" / "step-34" / "complete.json"
    marker.unlink()
    with pytest.raises(UserError, match="step-34 is incomplete"):
        export(marker.parent, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="does not exist"):
        export(tmp_path / "nothing", tmp_path / "other")
    (tmp_path / "other_tokenizer").mkdir()
    (tmp_path / "other_tokenizer" / "config.json").write_text('{"fingerprint": "f", "residual_down": "area"}')
    with pytest.raises(UserError, match="is f"):
        export(tmp_path / "run", tmp_path / "other", tmp_path / "other_tokenizer")


def test_each_stage_has_a_window_of_its_own(tmp_path: Path) -> None:
    write_codes(tmp_path / "codes", write_tokenizer(tmp_path / "tokenizer"), frames=4, clips=8)
    runs: dict[str, list[float]] = {}
    for name, windows, network in (("own", (1, None), None), ("one", (None, None), 1), ("all", (None, None), None)):
        stages = [
            stage(tmp_path / "codes", 3, name=part, codes=[{"dir": str(tmp_path / "codes")}], window=window)
            for part, window in zip(("narrow", "wide"), windows)
        ]
        file = write_run(tmp_path, out=str(tmp_path / name), stages=stages)
        override = ["--network.window", "null" if network is None else str(network)]
        for last in ("narrow", "wide"):  # a job for each stage
            main_entry(_load(file, *override, "--last_stage", last))
        runs[name] = [line["loss"] for line in metrics(tmp_path / name)]
        export(tmp_path / name, tmp_path / f"{name}-model")
    # the first stage is that of a run whose network has the window, the second is not
    assert runs["own"][:3] == runs["one"][:3] != runs["all"][:3]
    assert runs["own"][3] != runs["one"][3]
    assert [load_model(tmp_path / f"{name}-model").config.window for name in runs] == [None, 1, None]
    early = export(tmp_path / "own" / "checkpoints" / "step-3", tmp_path / "early")
    assert early.window == 1
    # what a step costs follows
    facts = {name: json.loads((tmp_path / name / "run.json").read_text())["stages"] for name in runs}
    costs = {name: [one["flops_per_step"] for one in facts[name]] for name in runs}
    assert costs["own"] == [costs["one"][0], costs["all"][1]] and costs["one"][0] < costs["all"][0]
    with pytest.raises(UserError, match="stage 'narrow' has a window of 0"):
        _load(write_run(tmp_path, stages=[stage(tmp_path / "codes", 1, name="narrow", window=0)]))


def test_export_keeps_every_weight_and_undoes_a_wrong_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 2)])
    main_entry(_load(file, "--network.condition", "class"))
    export(tmp_path / "run", tmp_path / "model")
    state = load_model(tmp_path / "model").state_dict()
    assert state["embedding.class_embedding"].shape == (5, 32)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["class_names"] == ["a", "b", "c", "d"]

    from pretrain import export as module

    def broken(chunks):
        return {name: value + 0.1 * torch.ones_like(value) for name, value in state.items()}

    monkeypatch.setattr(module, "gather_reference", broken)
    with pytest.raises(UserError, match="logits differ"):
        export(tmp_path / "run", tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "config.json").exists()


def test_running_means_are_validated_and_exported(tmp_path: Path) -> None:
    write_run(tmp_path)
    stages, states, scores = [stage(tmp_path / "codes", 6, validation=str(tmp_path / "codes"))], {}, {}
    for name, decay in (("plain", 0.0), ("mean", 0.5)):
        file = write_run(tmp_path, out=str(tmp_path / name), stages=stages, validate_every=6)
        main_entry(_load(file, "--optimizer.ema_decay", str(decay), "--optimizer.lr", "0.03"))
        export(tmp_path / name, tmp_path / f"{name}-model")
        states[name] = load_model(tmp_path / f"{name}-model").state_dict()
        lines = metrics(tmp_path / name)
        scores[name] = ([line["loss"] for line in lines if "loss" in line], lines[-1]["validation/loss"])
    assert scores["plain"][0] == scores["mean"][0] and scores["plain"][1] != scores["mean"][1]
    assert any(not torch.equal(states["mean"][name], value) for name, value in states["plain"].items())


def test_what_a_run_refuses(tmp_path: Path) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 2)], checkpoint_every=1)
    main_entry(_load(file))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    with pytest.raises(UserError, match="'seed' has changed from 0 to 1"):
        main_entry(_load(file, "--seed", "1"))
    with pytest.raises(UserError, match="num_layers = 2, the settings say 3"):
        main_entry(_load(file, "--network.num_layers", "3"))
    with pytest.raises(UserError, match="went through the stages"):
        main_entry(_load(write_run(tmp_path, stages=[stage(tmp_path / "codes", 2, name="other")])))
    three = ProcessInfo(0, 3, 0, 3, 0, 0, True, torch.device("cpu"))
    with pytest.raises(UserError, match="choose a multiple of 6"):
        check_batches(_load(file), three)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 6)], checkpoint_every=2)
    with pytest.raises(UserError, match="not finite: lower the learning rate"):
        main_entry(_load(file, "--optimizer.lr", "1e18", "--optimizer.warmup_steps", "0"))
