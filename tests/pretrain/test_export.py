"""What an export stores, in how many files, the card beside it, and what it replaces. (Layouts: test_resume.py, test_stages.py.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import videoar
from inference import VideoARPipeline
from inference.checkpoint import StoredWeights, load_model
from parallel import checkpoint as checkpoints
from pretrain.config import PretrainConfig
from pretrain.export import export
from pretrain.model_card import Sampling, write_card
from pretrain.train import main_entry
from tests.pretrain.tiny import stage, write_run
from tokenizer import UserError, settings

NO_SAMPLE = Sampling("no")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of one process, with validation."""
    base = tmp_path_factory.mktemp("export")
    write_run(base)
    stages = [
        stage(base / "codes", 2, name="first", lr=0.001),
        stage(base / "codes", 3, name="second", validation=str(base / "codes"), p_mask=0.25),
    ]
    file = write_run(base, stages=stages, validate_every=3, network=network())
    main_entry(settings.load(PretrainConfig, file, []))
    export(base / "run", base / "model", sampling=NO_SAMPLE)
    return base


def network() -> dict:
    return {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "max_text_length": 3}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(StoredWeights(folder))


def test_bfloat16_in_several_files_through_the_command(run, tmp_path, capsys):
    out = tmp_path / "half"
    words = ["export", "--checkpoint", run / "run", "--out", out, "--verify", "--dtype", "bfloat16"]
    assert videoar.main([str(word) for word in (*words, "--max-shard-size", "20kb", "--sample-prompt", "clip 3")]) == 0
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3 and not (out / "model.safetensors").exists()
    whole = weights(run / "model")
    for name, value in weights(out).items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, whole[name].bfloat16()), name
    assert load_model(out).head.weight.dtype == torch.bfloat16  # kept
    assert load_model(out, dtype=torch.float32).head.weight.dtype == torch.float32  # asked otherwise
    frames = VideoARPipeline.from_pretrained(out)("clip 3", num_frames=5).frames
    assert frames.shape == (5, 32, 32, 3)
    # a run goes on from such an export, too
    file = write_run(run, out=str(tmp_path / "warm"), stages=[stage(run / "codes", 1)], network=network())
    main_entry(settings.load(PretrainConfig, file, ["--from_export", str(out)]))
    assert checkpoints.latest(tmp_path / "warm" / "checkpoints") is not None


def test_the_card_says_what_was_done(run, tmp_path):
    export(run / "run", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    common = checkpoints.load_common(run / "run" / "checkpoints" / "step-5")
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = next(line["validation/loss"] for line in reversed(lines) if "validation/loss" in line)
    for words in (
        "| layers x width, heads | 4 x 32, 2 |",
        f"`{common['export']['tokenizer_fingerprint']}`",
        "| clips | 9 frames of 32x32 at 8 frames a second |",
        "| stored as | float32 |",
        "| 24 | 9x32x32 | all | 0.75 |",
        "| 24 | 9x32x32 | 1 | 0.25 |",
        "5 steps, seed 0",
        "| first | 2 | 0.001 | 4 | 0.3 |",
        "| second | 3 | 0.003 | 4 | 0.25 |",
        f"| loss | {loss:.4g} |",
        "Stage second, step 5",
        'VideoARPipeline.from_pretrained("THIS_FOLDER")',
        "`clip 0`, seed 0, guidance `t2v`",
        "states the licence here",
    ):
        assert words in card, words
    assert str(run) not in card  # no paths of this machine
    picture = Image.open(tmp_path / "model" / "sample.gif")
    assert picture.size == (32, 32)
    export(run / "run", tmp_path / "again")  # the seed is fixed
    assert (tmp_path / "again" / "sample.gif").read_bytes() == (tmp_path / "model" / "sample.gif").read_bytes()
    early = run / "run" / "checkpoints" / "step-2"
    export(early, tmp_path / "early", sampling=NO_SAMPLE)
    card = (tmp_path / "early" / "README.md").read_text()
    assert "| second |" not in card and "No validation was recorded" in card and "None was asked for" in card


def test_a_card_names_an_encoder_without_its_folder(run, tmp_path):
    export(run / "run", tmp_path / "model", sampling=NO_SAMPLE)
    folder = run / "run" / "checkpoints" / "step-5"
    common = checkpoints.load_common(folder)
    common["export"]["text_encoder"] = "t5:/home/somebody/flan-t5"
    write_card(tmp_path / "model", common, folder, NO_SAMPLE, torch.device("cpu"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| condition | text encoder `t5:flan-t5` |" in card and "somebody" not in card


def test_a_card_without_the_codes(run, tmp_path):
    (run / "codes").rename(run / "elsewhere")
    try:
        with pytest.raises(UserError, match="no caption is at hand to show: give one with --sample-prompt"):
            export(run / "run", tmp_path / "asked", sampling=Sampling("yes"))
        assert not list(tmp_path.iterdir())
        export(run / "run", tmp_path / "model")
        export(run / "run", tmp_path / "prompted", sampling=Sampling("yes", "a word", seed=3))
    finally:
        (run / "elsewhere").rename(run / "codes")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "None was made: no caption is at hand" in card and card.count("| not at hand at export | ? |") == 4
    assert not (tmp_path / "model" / "sample.gif").exists()
    assert "`a word`, seed 3" in (tmp_path / "prompted" / "README.md").read_text()
    assert (tmp_path / "prompted" / "sample.gif").is_file()


def _files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_model_is_replaced_as_a_whole_and_nothing_else_is(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "model"
    export(run / "run", out, max_shard_size=20_000, sampling=NO_SAMPLE)
    export(run / "run", out, sampling=NO_SAMPLE)
    names = ["README.md", "config.json", "model.safetensors", "tokenizer"]
    assert sorted(path.name for path in out.iterdir()) == names  # no shard is left
    export(run / "run", out, tokenizer=out / "tokenizer", sampling=NO_SAMPLE)  # its own tokenizer survives

    from pretrain import export as module

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_card", full)
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(OSError, match="no space"):
        export(run / "run", out)
    assert (out / "model.safetensors").stat().st_mtime_ns == before and list(tmp_path.iterdir()) == [out]
    (out / "diary.txt").write_text("mine")
    assert videoar.main(["export", "--checkpoint", str(run / "run"), "--out", str(out)]) == 2
    assert "diary.txt, which no export has written" in capsys.readouterr().err
    before = _files(run / "tokenizer")
    assert videoar.main(["export", "--checkpoint", str(run / "run"), "--out", str(run / "tokenizer")]) == 2
    assert "config.json, which no export has written" in capsys.readouterr().err
    assert before and _files(run / "tokenizer") == before
    words = ["export", "--checkpoint", str(run / "run"), "--out", str(tmp_path / "x"), "--max-shard-size", "big"]
    assert videoar.main(words) == 2 and "the size 'big' is none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


def test_a_damaged_write_is_found(run, tmp_path, monkeypatch):
    from pretrain import export as module

    real = module.save_weights

    def one_bit(model, state, *rest):
        name = "head.weight"
        real(model, {**state, name: state[name] + 1e-6}, *rest)

    monkeypatch.setattr(module, "save_weights", one_bit)
    with pytest.raises(UserError, match="'head.weight' was read back changed"):
        export(run / "run", tmp_path / "model")
    assert not list(tmp_path.iterdir())
