"""From raw shards and a recipe to a trained and validated tokenizer, by the command."""

import json

import pytest

import videoar
from data_pipelines.moving_shapes import write_corpus
from data_pipelines.shards import write_shards
from data_pipelines.tokenizer_clips import training_clips
from tokenizer import UserError, VideoTokenizer
from tokenizer.train_config import BatchSpec, Phase, TokenizerTrainConfig

RECIPE = """
tokenizer: {autoencoder: {dim: 8, base_width: 8, multipliers: [1, 1, 1], blocks: 1, patch: 4}, num_scales: 2}
phases: [{epochs: 2, batches: [{num_frames: 5, size: 32, batch_size: 4}]}]
validation_share: 0.2
validate_every: 2
log_every: 1
wandb: {mode: offline}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_corpus(folder / "corpus", clips=10, seed=0, validation=4)
    for split in ("train", "validation"):
        write_shards(folder / "corpus" / f"{split}.csv", folder / split)
    return folder


def test_the_command_trains_for_epochs_and_validates_on_a_share(shards, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [
        "tokenizer",
        "train",
        "--config",
        tmp_path / "recipe.yaml",
        "--shards",
        shards / "train",
        "--out",
        tmp_path / "out",
    ]
    assert videoar.main([str(word) for word in words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]  # 8 clips, twice, in batches of 4
    assert [line["step"] for line in lines if "validation/psnr" in line] == [2, 4]
    assert (tmp_path / "out" / "validation" / "step_0000004.png").stat().st_size
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert VideoTokenizer.from_pretrained(tmp_path / "out").quantizer.dim == 8


def test_validation_clips_are_others_than_the_training_ones(shards):
    phases = (Phase((BatchSpec(5, 32, 2),), 1),)
    config = TokenizerTrainConfig(phases=phases, validation_share=0.3, validate_every=1)
    clips, validation = training_clips(config, shards / "train", None, workers=1)
    assert validation is not None
    assert len(clips) == 7 and sum(len(batch) for batch in validation()) == 3
    clips, validation = training_clips(config, shards / "train", shards / "validation", workers=1)
    assert validation is not None
    assert len(clips) == 10 and sum(len(batch) for batch in validation()) == 4
    with pytest.raises(UserError, match="no clips for it: name shards with --validation"):
        training_clips(TokenizerTrainConfig(phases=phases, validate_every=1), shards / "train", None, workers=1)
    with pytest.raises(UserError, match="validate_every is 0"):
        training_clips(TokenizerTrainConfig(phases=phases, validation_share=0.3), shards / "train", None, workers=1)
