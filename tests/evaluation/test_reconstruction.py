"""Scores of a tokenizer: against naive computations, by size and overall, what is missing, the files, and what is skipped."""

import csv
import json

import lpips
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torch.nn.functional import interpolate
from torchmetrics.functional.image import structural_similarity_index_measure

import videoar
from data_pipelines import moving_shapes as ms
from evaluation.media import read_video
from evaluation.reconstruction import evaluate_reconstruction, summary
from evaluation.reconstruction_figure import draw
from evaluation.round_trip import round_trip
from evaluation.shapes import moving_foreground
from tests.evaluation.tiny import DIM, through, write_tokenizer
from tokenizer import UserError, VideoTokenizer
from tokenizer.perceptual import FILES
from tokenizer.video_file import write_video

CLIPS = 5


class Detector(nn.Module):
    """Three features of a clip, called as I3D is."""

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        flat = x[:, :, 1:] - x[:, :, :-1]
        return torch.stack(
            [10 * x.mean((1, 2, 3, 4)), 10 * x[:, 0].std((1, 2, 3)), 100 * flat.square().mean((1, 2, 3, 4))], 1
        )


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A corpus, a tokenizer that is as good as untrained, a backbone for LPIPS and a detector."""
    base = tmp_path_factory.mktemp("reconstruction")
    ms.write_corpus(base / "corpus", clips=1, seed=3, size=32, frames=13, validation=CLIPS)
    write_tokenizer(base / "tokenizer")
    torch.manual_seed(3)
    torch.save(torchvision.models.alexnet().state_dict(), base / FILES["alex"])
    torch.jit.script(Detector()).save(str(base / "i3d.pt"))
    return base


@pytest.fixture(autouse=True)
def no_weights_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def validation(ground):
    with open(ground / "corpus/validation.csv", newline="") as file:
        return [read_video(ground / "corpus" / row["path"])[0] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def measured(ground, tmp_path_factory):
    """All measures of the corpus at its own size."""
    out = tmp_path_factory.mktemp("measured") / "out"
    result = evaluate_reconstruction(
        ground / "tokenizer", ground / "corpus/validation.csv", out, ["32x32x13"],
        lpips_weights=ground / FILES["alex"], i3d=ground / "i3d.pt", batch_size=2,
    )  # fmt: skip
    return out, result


def test_psnr_equals_a_naive_computation(ground, measured):
    out, result = measured
    tokenizer = VideoTokenizer.from_pretrained(ground / "tokenizer")
    psnr, foreground, squares, pixels = [], [], 0.0, 0
    for clip in validation(ground):
        error = (clip.astype(float) - through(tokenizer, clip).numpy()) ** 2
        psnr.append(10 * np.log10(255**2 / error.mean()))
        foreground.append(10 * np.log10(255**2 / error[moving_foreground(clip)].mean()))
        squares, pixels = squares + error.sum(), pixels + error.size
    # batches of two may move a value across a rounding edge
    assert result["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert result["psnr_foreground"] == pytest.approx(np.mean(foreground), abs=1e-2)
    assert result["psnr_pooled"] == pytest.approx(10 * np.log10(255**2 * pixels / squares), abs=1e-3)
    assert [item["psnr"] for item in result["each"]] == pytest.approx(psnr, abs=1e-2)
    assert result["clips"] == result["clips_with_foreground"] == CLIPS
    assert json.loads((out / "reconstruction.json").read_text()) == result


def test_ssim_and_lpips_equal_those_of_their_packages(ground, measured):
    _, result = measured
    tokenizer = VideoTokenizer.from_pretrained(ground / "tokenizer")
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = torch.load(ground / FILES["alex"], weights_only=True)
    network.net.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()})
    similarities, distances = [], []
    clips = list(validation(ground))
    # in the same batches: others may move a pixel across a rounding edge
    others = [
        one for start in range(0, len(clips), 2) for one in round_trip(tokenizer, np.stack(clips[start : start + 2]))[1]
    ]
    for clip, other in zip(clips, others, strict=True):
        a, b = (torch.tensor(video).permute(0, 3, 1, 2).float() for video in (clip, other))
        similarities.append(structural_similarity_index_measure(b, a, data_range=255.0).item())
        with torch.no_grad():
            distances.append(network(b / 127.5 - 1, a / 127.5 - 1).mean().item())
    assert [item["ssim"] for item in result["each"]] == pytest.approx(similarities, abs=1e-4)
    assert [item["lpips"] for item in result["each"]] == pytest.approx(distances, rel=5e-3)
    assert result["ssim"] == pytest.approx(np.mean(similarities), abs=1e-4)
    assert result["lpips"] == pytest.approx(np.mean(distances), rel=5e-3) and result["lpips_missing"] is None


def test_rfvd_equals_the_usual_formula(ground, measured):
    _, result = measured
    tokenizer = VideoTokenizer.from_pretrained(ground / "tokenizer")
    real, made = [], []
    for clip in validation(ground):
        for features, video in ((real, torch.tensor(clip)), (made, through(tokenizer, clip))):
            frames = interpolate(video.permute(0, 3, 1, 2).float() / 127.5 - 1, (224, 224), mode="bilinear")
            features.append(Detector()(frames.transpose(0, 1)[None], False, False, True)[0].double().numpy())
    (m, s), (n, t) = ((np.mean(f, 0), np.cov(f, rowvar=False)) for f in (real, made))
    expected = np.square(m - n).sum() + np.trace(s) + np.trace(t) - 2 * np.trace(sqrtm(s @ t)).real
    assert expected > 1
    assert result["rfvd"] == pytest.approx(expected, rel=1e-3)
    assert result["rfvd_clips"] == CLIPS and result["rfvd_missing"] is None


def test_bits_equal_a_direct_count_and_a_constant_channel_is_dead(ground, tmp_path):
    write_tokenizer(tmp_path / "tokenizer", constant_channel=2)
    result = evaluate_reconstruction(
        tmp_path / "tokenizer", ground / "corpus/validation.csv", tmp_path / "out", ["32x32x13"], batch_size=3
    )
    tokenizer = VideoTokenizer.from_pretrained(tmp_path / "tokenizer")
    codes = [tokenizer.encode(torch.tensor(clip).permute(3, 0, 1, 2)[None] / 127.5 - 1) for clip in validation(ground)]
    for scale, tokens in enumerate((CLIPS * 4 * 1, CLIPS * 4 * 4)):  # 4 latent frames of 1x1 and 2x2
        bits = torch.cat([one.bits[scale].flatten(0, -2) for one in codes])
        assert bits.shape == (tokens, DIM) and result["bits"]["tokens"][scale] == tokens
        p = bits.double().mean(0).numpy()
        np.testing.assert_allclose(result["bits"]["share"][scale], p)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = np.nan_to_num(-p * np.log2(p)) + np.nan_to_num(-(1 - p) * np.log2(1 - p))
        np.testing.assert_allclose(result["bits"]["entropy"][scale], entropy, atol=1e-12)
        assert result["bits"]["entropy_mean"][scale] == pytest.approx(entropy.mean())
        assert result["bits"]["dead"][scale] == ((p < 0.01) | (p > 0.99)).sum()
        assert (result["bits"]["share"][scale][2], result["bits"]["entropy"][scale][2]) == (1, 0)
    assert 2 <= result["bits"]["dead_bits"] == sum(result["bits"]["dead"]) < 2 * DIM


def test_sizes_are_measured_apart_and_together(ground, tmp_path, capsys):
    words = [
        "evaluate",
        "reconstruction",
        "--tokenizer",
        ground / "tokenizer",
        "--videos",
        ground / "corpus/validation.csv",
    ]
    words += ["--out", tmp_path / "out", "--variants", "32x32x13,16x48x5,32x48x17", "--i3d", ground / "i3d.pt"]
    assert videoar.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out/reconstruction.json").read_text())
    large, wide, none = (result["buckets"][name] for name in ("32x32x13", "16x48x5", "32x48x17"))
    assert (result["clips"], large["clips"], wide["clips"], none["clips"]) == (2 * CLIPS, CLIPS, CLIPS, 0)
    for key in ("psnr", "ssim"):
        assert result[key] == pytest.approx((large[key] + wide[key]) / 2)
        of_wide = [item[key] for item in result["each"] if item["variant"] == "16x48x5"]
        assert wide[key] == pytest.approx(np.mean(of_wide)) and none[key] is None
        assert large[key] != pytest.approx(wide[key], rel=1e-3)
    assert large["schedule"] == [[1, 1], [2, 2]] and wide["schedule"] == [[1, 1], [1, 3]]
    assert result["bits"]["tokens"] == [CLIPS * (4 + 2), CLIPS * (4 * 4 + 2 * 3)]
    shares = [np.array(bucket["bits"]["share"])[1] * tokens for bucket, tokens in ((large, 16), (wide, 6))]
    np.testing.assert_allclose(result["bits"]["share"][1], sum(shares) / 22)
    # 5 frames are too few for I3D, and no video has 17
    assert large["rfvd"] > 0 and result["rfvd"] == pytest.approx(large["rfvd"]) and result["rfvd_clips"] == CLIPS
    assert wide["rfvd"] is None and "at least 10 frames" in wide["rfvd_missing"] and none["bits"] is None
    assert [item["variant"] for item in result["skipped"]] == ["32x48x17"] * CLIPS
    for name in ("32x32x13", "16x48x5", "32x48x17", "all"):
        assert f"| {name} " in printed
    with open(tmp_path / "out/reconstructed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{i:05d}.mp4" for i in range(2 * CLIPS)]
    for row in rows[::CLIPS]:
        height, width, frames = map(int, row["variant"].split("x"))
        assert read_video(tmp_path / "out" / row["path"])[0].shape == (frames, height, width, 3)


def test_what_is_not_measured_is_said_once(ground, tmp_path, capsys):
    out, table = tmp_path / "out", ground / "corpus/validation.csv"
    result = evaluate_reconstruction(ground / "tokenizer", table, out, ["32x32x13", "16x16x13"])
    said = capsys.readouterr().err
    assert said.count("not measured: LPIPS") == 1 and said.count("not measured: rFVD") == 1
    for values in (result, *result["buckets"].values()):
        assert values["lpips"] is None and f"{FILES['alex']} is not there" in values["lpips_missing"]
        assert values["rfvd"] is None and "--i3d" in values["rfvd_missing"]
    assert {item["lpips"] for item in result["each"]} == {None}
    assert summary(result).count("Not measured") == 2
    # weights that come later make another result
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    (tmp_path / "torch/hub/checkpoints" / FILES["alex"]).symlink_to(ground / FILES["alex"])
    with pytest.raises(UserError, match=r"other arguments \(lpips\)"):
        evaluate_reconstruction(ground / "tokenizer", table, out, ["32x32x13", "16x16x13"])
    assert evaluate_reconstruction(ground / "tokenizer", table, tmp_path / "new", ["32x32x13"])["lpips"] > 0


def test_the_files_are_the_clips(ground, measured):
    out, result = measured
    with open(out / "reconstructed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == CLIPS
    for row in rows:
        ms.parse_caption(row["caption"])
        original, fps = read_video(out / row["original"])
        other, other_fps = read_video(out / row["path"])
        assert original.shape == other.shape == (13, 32, 32, 3)
        assert fps == other_fps == pytest.approx(8)
    before = (out / "00000.mp4").stat().st_mtime_ns
    options = {"lpips_weights": ground / FILES["alex"], "i3d": ground / "i3d.pt", "batch_size": 2}
    table = ground / "corpus/validation.csv"
    assert evaluate_reconstruction(ground / "tokenizer", table, out, ["32x32x13"], **options) == result
    assert (out / "00000.mp4").stat().st_mtime_ns == before  # finished work is not done again
    with pytest.raises(UserError, match="other arguments"):
        evaluate_reconstruction(ground / "tokenizer", table, out, ["16x16x13"], **options)


def test_the_figure_shows_the_numbers(measured):
    out, result = measured
    assert min(Image.open(out / "reconstruction.png").size) > 600
    above, below = draw(result).subfigs
    for axes, key in zip(above.axes, ("psnr", "ssim")):
        line = axes.lines[0]
        assert line.get_xdata()[0] == pytest.approx(result[key])
        bars = [patch.get_height() for patch in axes.patches if hasattr(patch, "get_height")]
        assert sum(bars) == CLIPS
    cells = below.axes[0].collections[0].get_array()
    np.testing.assert_allclose(cells.reshape(2, DIM), result["bits"]["entropy"])
    assert [label.get_text() for label in below.axes[0].get_yticklabels()] == ["scale 0 (1x1)", "scale 1 (2x2)"]


def test_bad_videos_are_skipped_and_listed(ground, tmp_path):
    good = ground / "corpus/videos/validation/00000.mp4"
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_video(np.zeros((5, 32, 32, 3), np.uint8), tmp_path / "short.mp4")
    table = tmp_path / "videos.csv"
    table.write_text(f"path,caption\nempty.mp4,x\n{good},someone walks\nshort.mp4,x\nnone.mp4,x\n")
    result = evaluate_reconstruction(ground / "tokenizer", table, tmp_path / "out", ["32x32x13"], i3d=ground / "i3d.pt")
    assert result["clips"] == 1 and result["psnr_foreground"] is None  # the caption is none of the moving shapes
    assert result["rfvd"] is None and "at least 2 clips" in result["rfvd_missing"]
    assert {item["source"]: item["reason"].split(" (")[0] for item in result["skipped"]} == {
        "empty.mp4": "empty file",
        "short.mp4": "too short",
        "none.mp4": "missing file",
    }
    table.write_text("path,caption\nempty.mp4,x\n")
    with pytest.raises(UserError, match="empty file"):
        evaluate_reconstruction(ground / "tokenizer", table, tmp_path / "nothing", ["32x32x13"])
    assert not list(tmp_path.glob("nothing*"))


def test_impossible_requests_are_named(ground, tmp_path, capsys):
    table = ground / "corpus/validation.csv"
    for variants, sentence in (
        (["32x32x10"], "10 frames"),
        (["40x32x13"], "a multiple of 16"),
        (["32x32"], "not HEIGHTxWIDTHxFRAMES"),
        (["32x32x13"] * 2, "repeat themselves"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate_reconstruction(ground / "tokenizer", table, tmp_path / "out", variants)
    with pytest.raises(UserError, match="no tokenizer"):
        evaluate_reconstruction(tmp_path, table, tmp_path / "out", ["32x32x13"])
    for option, sentence in (
        ({"lpips_weights": "none.pth"}, "none.pth is not there"),
        ({"i3d": "none.pt"}, "none.pt does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate_reconstruction(ground / "tokenizer", table, tmp_path / "out", ["32x32x13"], **option)
    words = ["evaluate", "reconstruction", "--tokenizer", "x", "--videos", "y", "--out", str(tmp_path / "out")]
    assert videoar.main([*words, "--variants", "32x32x13", "--size", "32"]) == 2
    assert "give either it or --size" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
