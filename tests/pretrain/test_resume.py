"""Ten steps equal five steps, a stop, and five more: in loss and gradient norm, to the last bit."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.checkpoint import load_model
from parallel import checkpoint
from pretrain.config import PretrainConfig
from pretrain.export import export
from pretrain.model_card import Sampling
from pretrain.start import Position
from pretrain.train import main_entry
from pretrain.trainer import Trainer
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny import metrics, stage, write_run
from tokenizer import settings

TENSOR_2 = ["--parallel.tensor_parallel_size", "2"]
EXACT = ("stage", "step", "global_step", "loss", "bit_accuracy", "grad_norm", "lr")


def _exact(out: Path) -> list[tuple]:
    return [tuple(line[name] for name in EXACT) for line in metrics(out)]


def _stages(folder: Path) -> list[dict]:
    return [stage(folder / "codes", 6), stage(folder / "codes", 4, name="two", lr=0.001)]


def test_kill_and_sigterm_change_nothing(tmp_path: Path) -> None:
    """Tensor parallel 2; a kill -9 between checkpoints, then SIGTERM to one process, over two stages."""
    write_run(tmp_path)  # tokenizer and codes
    whole = write_run(tmp_path, out=str(tmp_path / "whole"), stages=_stages(tmp_path), checkpoint_every=100)
    assert run_ranks(whole, 2, TENSOR_2) == [0, 0]
    expected = _exact(tmp_path / "whole")
    assert [line[:3] for line in expected] == [("one", s, s) for s in range(1, 7)] + [
        ("two", s, 6 + s) for s in range(1, 5)
    ]

    out = tmp_path / "cut"
    cut = write_run(
        tmp_path, out=str(out), stages=_stages(tmp_path), checkpoint_every=3, keep=1, save_in_background=False
    )
    codes = run_ranks(cut, 2, TENSOR_2, {4: (1, signal.SIGKILL)})
    assert codes[1] == -signal.SIGKILL
    assert len(metrics(out)) == 4
    # the next line is what a kill in the middle of a write leaves
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "one", "st')
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None and newest.name == "step-3"

    assert run_ranks(cut, 2, TENSOR_2, {7: (0, signal.SIGTERM)}) == [0, 0]  # the step under way is finished and saved
    newest = checkpoint.latest(out / "checkpoints")
    assert newest is not None and newest.name == "step-8" and len(metrics(out)) == 8

    assert run_ranks(cut, 2, TENSOR_2) == [0, 0]
    assert _exact(out) == expected
    assert [folder.name for folder in (out / "checkpoints").iterdir()] == ["step-10"]

    # nothing is left to do
    assert run_ranks(cut, 2, TENSOR_2) == [0, 0]
    assert _exact(out) == expected


def test_another_layout_goes_on_and_is_exported_alike(tmp_path: Path) -> None:
    """Two data-parallel processes take over from one, and an interleaved pipeline of two from them."""
    network = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "max_text_length": 3}
    write_run(tmp_path)
    options = dict(stages=[stage(tmp_path / "codes", 9)], network=network, checkpoint_every=3, keep=9)
    whole = write_run(tmp_path, **options)
    assert run_ranks(whole, 1, []) == [0]
    out = tmp_path / "cut"
    cut = write_run(tmp_path, out=str(out), **options)
    assert run_ranks(cut, 1, [], {2: (0, signal.SIGTERM)}) == [0]
    assert run_ranks(cut, 2, [], {5: (1, signal.SIGTERM)}) == [0, 0]
    virtual = ["--parallel.pipeline_parallel_size", "2", "--parallel.virtual_pipeline_size", "2"]
    assert run_ranks(cut, 2, virtual) == [0, 0]
    for one, other in zip(metrics(tmp_path / "run"), metrics(out), strict=True):
        for name in ("loss", "grad_norm", "bit_accuracy"):
            assert abs(one[name] - other[name]) < 2e-5, (one["step"], name)
    models = {}
    for run, step in itertools.product(
        ("run", "cut"), (3, 6, 9)
    ):  # cut: one process, sharded optimizer, virtual stages
        target = tmp_path / f"{run}-{step}"
        export(tmp_path / run / "checkpoints" / f"step-{step}", target, verify=True, sampling=Sampling("no"))
        models[run, step] = load_model(target).state_dict()
    for step in (3, 6, 9):
        for name, value in models["run", step].items():
            torch.testing.assert_close(models["cut", step][name], value, atol=2e-5, rtol=1e-3, msg=f"{step}: {name}")
    moved = (models["run", 9]["head.weight"] - models["run", 3]["head.weight"]).abs().max()
    assert moved > 1e-3  # far more than the tolerance


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_is_written_while_the_training_goes_on_or_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    file = write_run(tmp_path, stages=[stage(tmp_path / "codes", 2)], checkpoint_every=1)
    under_way, original = [], Trainer._save

    def watched(trainer: Trainer, position: Position, *args: Any, **names: Any) -> None:
        original(trainer, position, *args, **names)
        under_way.append(not (tmp_path / "run" / "checkpoints" / f"step-{position.global_step}").exists())

    monkeypatch.setattr(Trainer, "_save", watched)
    main_entry(settings.load(PretrainConfig, file, ["--save_in_background", str(background).lower()]))
    assert under_way == [background, False]  # the last one is waited for
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
