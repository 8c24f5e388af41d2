"""The recipes load, and say what the paper says."""

from pathlib import Path

import pytest

from tokenizer import settings
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
