"""Prompts to files: one file, or a folder that is made once."""

import csv

import av
import pytest
import torch

from inference.generate import generate_file, generate_folder, read_prompts
from tests.inference.test_pipeline import tiny_pipeline
from tokenizer import UserError


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_one_file(pipe, tmp_path):
    out = generate_file(pipe, "a red circle", tmp_path / "new" / "clip.mp4", frames=5, seed=0)
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_a_folder_of_prompts_is_made_once_and_knows_its_model(pipe, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    out = tmp_path / "videos"
    assert read_prompts(prompts) == ["a red circle", "a blue square"]
    generate_folder(pipe, prompts, out, frames=5, samples=2, seed=7, batch_size=3)
    with open(out / "prompts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["caption"] for row in rows] == ["a red circle"] * 2 + ["a blue square"] * 2
    assert [row["seed"] for row in rows] == ["7", "8", "9", "10"]
    assert all((out / row["path"]).stat().st_size for row in rows)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    generate_folder(pipe, prompts, out, frames=5, samples=2, seed=7, batch_size=3)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    with pytest.raises(UserError, match=r"other arguments \(seed\)"):
        generate_folder(pipe, prompts, out, frames=5, samples=2, seed=8, batch_size=3)
    other = tiny_pipeline()
    with torch.no_grad():
        other.model.head.weight[0, 0] += 1  # one weight of another training
    with pytest.raises(UserError, match=r"other arguments \(model\)"):
        generate_folder(other, prompts, out, frames=5, samples=2, seed=7, batch_size=3)
    assert list(tmp_path.glob("*.tmp.*")) == []
