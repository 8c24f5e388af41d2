"""kill -9 at random moments, then the same command again: as `benchmarks/chaos.py`, two runs of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos_encode import EncodeScene
from benchmarks.chaos_scene import Scene
from benchmarks.chaos_train import TrainScene

SEED = 0


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> EncodeScene:
    scene = EncodeScene(tmp_path_factory.mktemp("chaos"), clips=14, workers=1, preloaded=True)
    scene.undisturbed()
    return scene


def check(scene: Scene, number: int, starts: int) -> None:
    outcome = scene.disturbed(number, SEED, most_kills=1, agents=False)
    assert outcome.equal, (outcome.kills, outcome.problems)
    assert len(outcome.kills) == 1 and outcome.starts >= starts
    assert not outcome.left and not outcome.shared_memory


@pytest.mark.parametrize(("number", "starts"), [(0, 1), (1, 2)], ids=["actor", "driver"])
def test_encoding_ends_with_the_bytes_of_an_undisturbed_run(encoding: EncodeScene, number: int, starts: int) -> None:
    check(encoding, number, starts)


def test_training_sees_the_clips_and_losses_of_an_undisturbed_run(encoding: EncodeScene, tmp_path: Path) -> None:
    scene = TrainScene(tmp_path, encoding.codes, encoding.tokenizer, (14, 6), preloaded=True)
    scene.undisturbed()
    for number in range(2):
        check(scene, number, starts=2)
