"""Reconstructions: PSNR against closed forms and a naive computation, the files, and what is skipped."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from data_pipelines import moving_shapes as ms
from evaluation.media import read_video
from evaluation.reconstruction import LARGEST_PSNR, SquaredError, psnr_summary, reconstruct, squared_error
from evaluation.shapes import moving_foreground
from tokenizer import UserError, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.tokenizer import TokenizerConfig
from tokenizer.video_file import write_video


def test_psnr_of_a_constant_error():
    original = np.full((5, 16, 16, 3), 100, dtype=np.uint8)
    for error in (1, 10, 100):
        for sign in (1, -1):
            other = (original.astype(int) + sign * error).astype(np.uint8)
            assert squared_error(original, other).psnr == pytest.approx(20 * math.log10(255 / error), abs=1e-9)
    assert squared_error(original, original).psnr == LARGEST_PSNR


def test_the_mask_picks_the_pixels():
    original = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    other = original.copy()
    mask = np.zeros((2, 8, 8), dtype=bool)
    mask[1, 2:4, 2:4] = True
    other[mask] = 51
    assert squared_error(original, other, mask).psnr == pytest.approx(20 * math.log10(5))
    assert squared_error(original, other).psnr == pytest.approx(20 * math.log10(5) + 10 * math.log10(128 / 4))
    assert math.isnan(squared_error(original, other, np.zeros_like(mask)).psnr)


def test_mean_of_clips_and_pooled_differ_as_defined():
    # 1 of 10 pixels wrong by 255: 10 dB; all wrong by 25.5: 20 dB, three times as many pixels
    errors = [SquaredError(255.0**2, 10), SquaredError(25.5**2 * 30, 30), SquaredError(0.0, 0)]
    mean, pooled = psnr_summary(errors)
    assert mean == pytest.approx(15)
    assert pooled == pytest.approx(-10 * math.log10((0.1 * 10 + 0.01 * 30) / 40))
    assert psnr_summary([SquaredError()]) == (None, None)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A corpus, and a tokenizer that is as good as untrained."""
    base = tmp_path_factory.mktemp("reconstruction")
    ms.write_corpus(base / "corpus", clips=1, seed=3, size=32, frames=9, validation=5)
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 2, 2), blocks=1, patch=4)
    VideoTokenizer(TokenizerConfig(autoencoder, num_scales=2)).save_pretrained(base / "tokenizer")
    return base


def test_values_equal_a_naive_computation(ground, tmp_path):
    result = reconstruct(ground / "tokenizer", ground / "corpus/validation.csv", tmp_path / "out", 32, 9, batch_size=2)
    tokenizer = VideoTokenizer.from_pretrained(ground / "tokenizer")
    psnr, foreground, squares, pixels = [], [], 0.0, 0
    with open(ground / "corpus/validation.csv", newline="") as file:
        paths = [ground / "corpus" / row["path"] for row in csv.DictReader(file)]
    for path in paths:
        clip = read_video(path)[0]
        video = torch.tensor(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1
        other = np.rint((tokenizer.decode(tokenizer.encode(video))[0].permute(1, 2, 3, 0).numpy() + 1) * 127.5)
        error = (clip.astype(float) - other) ** 2
        psnr.append(10 * np.log10(255**2 / error.mean()))
        foreground.append(10 * np.log10(255**2 / error[moving_foreground(clip)].mean()))
        squares, pixels = squares + error.sum(), pixels + error.size
    # batches of two may move a value across a rounding edge
    assert result["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert result["psnr_foreground"] == pytest.approx(np.mean(foreground), abs=1e-2)
    assert result["psnr_pooled"] == pytest.approx(10 * np.log10(255**2 * pixels / squares), abs=1e-3)
    assert [item["psnr"] for item in result["each"]] == pytest.approx(psnr, abs=1e-2)
    assert result["clips"] == result["clips_with_foreground"] == 5
    assert json.loads((tmp_path / "out/reconstruction.json").read_text()) == result


def test_the_files_are_the_clips(ground, tmp_path):
    out = tmp_path / "out"
    reconstruct(ground / "tokenizer", ground / "corpus/validation.csv", out, 32, 9)
    with open(out / "reconstructed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        ms.parse_caption(row["caption"])
        original, fps = read_video(out / row["original"])
        other, other_fps = read_video(out / row["path"])
        assert original.shape == other.shape == (9, 32, 32, 3)
        assert fps == other_fps == pytest.approx(8)
    before = (out / "00000.mp4").stat().st_mtime_ns
    reconstruct(ground / "tokenizer", ground / "corpus/validation.csv", out, 32, 9)
    assert (out / "00000.mp4").stat().st_mtime_ns == before  # finished work is not done again
    with pytest.raises(UserError, match="other arguments"):
        reconstruct(ground / "tokenizer", ground / "corpus/validation.csv", out, 16, 9)


def test_bad_videos_are_skipped_and_listed(ground, tmp_path):
    good = ground / "corpus/videos/validation/00000.mp4"
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_video(np.zeros((5, 32, 32, 3), np.uint8), tmp_path / "short.mp4")
    table = tmp_path / "videos.csv"
    table.write_text(f"path,caption\nempty.mp4,x\n{good},someone walks\nshort.mp4,x\nnone.mp4,x\n")
    result = reconstruct(ground / "tokenizer", table, tmp_path / "out", 32, 9)
    assert result["clips"] == 1 and result["psnr_foreground"] is None  # the caption is none of the moving shapes
    assert {item["source"]: item["reason"].split(" (")[0] for item in result["skipped"]} == {
        "empty.mp4": "empty file",
        "short.mp4": "too short",
        "none.mp4": "missing file",
    }
    table.write_text("path,caption\nempty.mp4,x\n")
    with pytest.raises(UserError, match="empty file"):
        reconstruct(ground / "tokenizer", table, tmp_path / "nothing", 32, 9)
    assert not list(tmp_path.glob("nothing*"))


def test_impossible_requests_are_named(ground, tmp_path):
    table = ground / "corpus/validation.csv"
    with pytest.raises(UserError, match="10 frames"):
        reconstruct(ground / "tokenizer", table, tmp_path / "out", 32, 10)
    with pytest.raises(UserError, match="a multiple of 16"):
        reconstruct(ground / "tokenizer", table, tmp_path / "out", 40, 9)
    with pytest.raises(UserError, match="no tokenizer"):
        reconstruct(tmp_path, table, tmp_path / "out", 32, 9)
