"""The recipes load, and say what the paper says."""

from pathlib import Path

import pytest

from tokenizer import UserError, settings
from tokenizer.train_config import TokenizerTrainConfig

RECIPES = Path(__file__).resolve().parents[2] / "tokenizer" / "configs"


@pytest.mark.parametrize("name", sorted(file.name for file in RECIPES.glob("*.yaml")))
def test_every_recipe_loads(name):
    assert settings.load(TokenizerTrainConfig, RECIPES / name).resolved(1000).steps > 0


def test_the_papers_ucf101_recipe():
    recipe = settings.load(TokenizerTrainConfig, RECIPES / "ucf101.yaml")
    clips = 13320 - 267  # UCF-101's videos without 2% held out
    assert recipe.resolved(clips).steps == -(-2000 * clips // 128)
    assert (recipe.largest.num_frames, recipe.largest.size, recipe.phases[0].batches[0].batch_size) == (17, 128, 128)
    sizes = recipe.tokenizer.autoencoder
    assert (sizes.dim, sizes.base_width, sizes.multipliers, sizes.blocks, sizes.patch) == (
        48,
        128,
        (1, 2, 4, 4, 4),
        2,
        1,
    )
    assert recipe.start_from and recipe.loss.gan and recipe.loss.perceptual and recipe.loss.lecam


@pytest.mark.parametrize(
    "words, message",
    [
        (["--grad_clip", "0"], "grad_clip is 0"),
        (["--lr", "-1"], "lr is -1"),
        (["--betas", "[0.9, 1.0]"], "betas are"),
        (["--ema_decay", "1.0"], "ema_decay is 1"),
        (["--loss.gan", "1", "--discriminator.levels", "6"], "needs frames of 192 pixels, a batch has 128"),
        (["--loss.lecam_decay", "2"], "lecam_decay is 2"),
        (["--tokenizer.autoencoder.base_width", "24"], "a level of width 48"),
        (["--tokenizer.autoencoder.base_width", "0"], "a level of width 0"),
    ],
)
def test_settings_that_cannot_be(words, message):
    with pytest.raises(UserError, match=message):
        settings.load(TokenizerTrainConfig, None, words)
