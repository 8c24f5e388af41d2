"""A stage as a run of its own: `last_stage`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import PretrainConfig
from pretrain.train import main_entry
from tests.pretrain.tiny import metrics, stage, write_run
from tokenizer import settings
from tokenizer.errors import UserError


def numbers(out: Path) -> list[tuple]:
    return [(line["stage"], line["step"], line["loss"], line["grad_norm"]) for line in metrics(out)]


def test_stages_one_by_one_are_those_of_one_run(tmp_path: Path) -> None:
    stages = [stage(tmp_path / "codes", 2), stage(tmp_path / "codes", 2, name="two", lr=0.001)]
    file = write_run(tmp_path, stages=stages)
    words = ["--out", str(tmp_path / "parts")]
    assert main_entry(settings.load(PretrainConfig, file))
    assert main_entry(settings.load(PretrainConfig, file, [*words, "--last_stage", "one"]))  # done, not stopped
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "run")[:2]
    assert main_entry(settings.load(PretrainConfig, file, [*words, "--last_stage", "one"]))  # nothing is left to do
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "run")[:2]
    assert main_entry(settings.load(PretrainConfig, file, [*words, "--last_stage", "two"]))
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "run")
    with pytest.raises(UserError, match="last_stage is 'three': choose one of the stages, one, two, or null"):
        settings.load(PretrainConfig, file, ["--last_stage", "three"])
