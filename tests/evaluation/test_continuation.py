"""Continuations against what really followed, and scores of a part of the frames."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import videoar
from data_pipelines.moving_shapes import render, validation_specs, write_corpus
from evaluation.continuation import in_place
from evaluation.videos import score_videos
from inference.pipeline import VideoARPipeline
from inference.video_io import read_video
from tests.inference.test_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 9 frames at 32x32, and real clips of 13 at 64x64."""
    folder = tmp_path_factory.mktemp("ground")
    tiny_pipeline(fps=8.0).save_pretrained(folder / "model")
    write_corpus(folder / "corpus", clips=1, seed=0, frames=13, validation=3)
    return folder


def test_a_shape_is_in_place_within_a_sixteenth_of_the_width() -> None:
    clip = render(validation_specs(1, 0, 64, 17)[0])[0]
    assert in_place(clip, clip).all()
    assert in_place(np.roll(clip, 3, axis=2), clip).all()
    assert not in_place(np.roll(clip, -5, axis=2), clip).any()
    lost = clip.copy()
    lost[10:] = 128
    assert in_place(lost, clip).tolist() == [True] * 10 + [False] * 7


def test_the_numbers_are_those_of_the_pipelines_own_continuations(ground: Path) -> None:
    out, table = ground / "scores" / "continuation.json", ground / "corpus" / "validation.csv"
    words = ["--model", ground / "model", "--videos", table, "--out", out, "--clips", 2, "--seed", 5, "--guidance", 2]
    assert videoar.main(["evaluate", "continuation", *map(str, words)]) == 0
    result = json.loads(out.read_text())
    pipe = VideoARPipeline.from_pretrained(ground / "model")
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))[:2]
    squares, right = [], []
    for number, row in enumerate(rows):
        real = read_video(ground / "corpus" / row["path"], (32, 32), 8.0)[:9]
        made = pipe(row["caption"], 9, guidance=2.0, seed=5 + number, video=real[:5], given_frames=5).frames
        squares.append((made[5:].astype(float) - real[5:]) ** 2)
        right.append(in_place(made, real)[5:])
    assert (result["clips"], result["num_frames"], result["given_frames"]) == (2, 9, 5)
    assert result["psnr"] == pytest.approx(-10 * np.log10(np.mean(squares) / 255**2))
    assert result["in_place"] == pytest.approx(np.mean(right))
    assert [frame["latent_frame"] for frame in result["frames"]] == [2]
    assert result["reconstruction_psnr"] != result["psnr"]


@pytest.mark.parametrize(("frames", "given"), [(9, 9), (9, 4), (17, 5)])
def test_lengths_that_do_not_fit_are_refused(
    ground: Path, capsys: pytest.CaptureFixture[str], frames: int, given: int
) -> None:
    words = [
        "--model",
        ground / "model",
        "--videos",
        ground / "corpus" / "validation.csv",
        "--out",
        ground / "none.json",
    ]
    lengths = ["--frames", str(frames), "--given-frames", str(given)]
    assert videoar.main(["evaluate", "continuation", *map(str, words), *lengths]) == 2
    assert ("13 frames" if frames == 17 else "1+4n") in capsys.readouterr().err
    assert not (ground / "none.json").exists()


def test_a_part_of_the_frames_is_scored(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = ground / "corpus" / "validation.csv"
    whole = score_videos(table)
    assert score_videos(table, frames=(0, 13)) == whole and whole["all"] == 1
    single = score_videos(table, frames=(4, 5))
    assert single["colour"] == 1 and single["direction"] == single["speed"] == 0  # one frame shows no motion
    assert videoar.main(["evaluate", "shapes", "--videos", str(table), "--frames", "5:4"]) == 2
    assert "write FIRST:LAST" in capsys.readouterr().err
    assert videoar.main(["evaluate", "shapes", "--videos", str(table), "--frames", "0:33"]) == 2
    assert "has 13 frames, not 33" in capsys.readouterr().err
