"""A run that starts from an exported model's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inference.checkpoint import load_model
from pretrain.config import PretrainConfig
from pretrain.export import export
from pretrain.train import main_entry
from tests.pretrain.tiny import metrics, stage, write_run
from tokenizer import settings
from tokenizer.errors import UserError


def _load(file: Path, *overrides: str) -> PretrainConfig:
    return settings.load(PretrainConfig, file, list(overrides))


def test_a_run_starts_from_an_exported_model(tmp_path: Path) -> None:
    first = write_run(tmp_path, stages=[stage(tmp_path / "codes", 4)])
    main_entry(_load(first))
    export(tmp_path / "run", tmp_path / "model")
    exported = load_model(tmp_path / "model").state_dict()

    second = write_run(tmp_path, out=str(tmp_path / "warm"), stages=[stage(tmp_path / "codes", 2, lr=0.0)])
    warm = ["--from-export", str(tmp_path / "model")]  # as it is typed
    main_entry(_load(second, *warm))
    export(tmp_path / "warm", tmp_path / "same")
    same = load_model(tmp_path / "same").state_dict()  # a learning rate of 0 leaves the weights alone
    assert exported.keys() == same.keys() and all(torch.equal(exported[name], same[name]) for name in same)
    assert metrics(tmp_path / "warm")[0]["loss"] < metrics(tmp_path / "run")[0]["loss"]

    # a run that has begun goes on from its own checkpoint, whatever became of the model
    (tmp_path / "model" / "config.json").unlink()
    main_entry(_load(second, *warm))
    assert [line["step"] for line in metrics(tmp_path / "warm")] == [1, 2]


def test_a_run_refuses_an_exported_model_that_does_not_fit(tmp_path: Path) -> None:
    main_entry(_load(write_run(tmp_path, stages=[stage(tmp_path / "codes", 1)])))
    export(tmp_path / "run", tmp_path / "model")
    other = write_run(tmp_path, out=str(tmp_path / "other"), from_export=str(tmp_path / "model"))
    with pytest.raises(UserError, match="from_export: .*model has num_layers 2, this run has 4: start from a model"):
        main_entry(_load(other, "--network.num_layers", "4"))
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(content | {"tokenizer_fingerprint": "another"}))
    with pytest.raises(UserError, match="model has tokenizer another, this run has "):
        main_entry(_load(other))
    with pytest.raises(UserError, match="codes holds no config.json"):
        main_entry(_load(other, "--from_export", str(tmp_path / "codes")))
    assert not (tmp_path / "other").exists()
