"""Originals beside their reconstructions: the two halves, the table, the shape of each clip, and what is skipped."""

import csv

import numpy as np
import pytest

import videoar
from data_pipelines import moving_shapes as ms
from data_pipelines.decode import choose_decoder
from data_pipelines.probe import VideoInfo, probe
from evaluation.fidelity import ssim
from evaluation.media import read_video
from evaluation.reconstruct import MOST_FRAMES, own_shape, reconstruct
from tests.evaluation.tiny import DIM, through, write_tokenizer
from tokenizer import UserError, VideoTokenizer
from tokenizer.video_file import write_video


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tiny")


def shape_clip(size, frames, caption="a red circle moving right slowly"):
    spec = ms.make_spec(ms.parse_caption(caption), (4,), size, frames)
    return ms.render(spec, size, frames)[0]


def rows(out):
    with open(out / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def side_by_side(tokenizer, tmp_path_factory):
    """A folder with a square video, a wide one whose sides fit nothing, and a broken one."""
    base = tmp_path_factory.mktemp("side")
    (base / "videos/more").mkdir(parents=True)
    write_video(shape_clip(64, 11), base / "videos/square.mp4", fps=8, crf=0)
    write_video(shape_clip(96, 6)[:, 20:62], base / "videos/more/wide (1).mp4", fps=25, crf=0)
    (base / "videos/more/broken.mp4").write_bytes(b"no video")
    text = reconstruct(tokenizer, base / "videos", base / "out")
    return base, text


def luma(frames):
    """4:2:0 video keeps brightness pixel by pixel, colour only coarsely."""
    return np.asarray(frames, dtype=float) @ (0.299, 0.587, 0.114)


def test_the_halves_are_the_original_and_the_reconstruction(tokenizer, side_by_side):
    base, _ = side_by_side
    network = VideoTokenizer.from_pretrained(tokenizer)
    for name, video, rate, (frames, height, width) in (
        ("00001_square.mp4", "square.mp4", 8, (9, 64, 64)),  # the middle 9 of 11 frames
        ("00000_wide_1_.mp4", "more/wide (1).mp4", 25, (5, 48, 96)),  # the first 5 of 6, 42 rows enlarged to 48
    ):
        pair, fps = read_video(base / "out" / name)
        assert pair.shape == (frames, height, 2 * width + 4, 3) and fps == pytest.approx(rate)
        file = base / "videos" / video
        times = probe(file).timestamps[1:10] if frames == 9 else probe(file).timestamps[:5]
        original = choose_decoder().decode(file.read_bytes(), times, height, width)
        left, right = luma(pair[:, :, :width]), luma(pair[:, :, width + 4 :])
        assert np.abs(left - luma(original)).mean() < 2
        assert np.abs(right - luma(through(network, original))).mean() < 2
        assert np.abs(left - right).mean() > 10  # an untrained tokenizer brings nothing back


def test_the_table_says_what_is_in_the_files(tokenizer, side_by_side):
    base, text = side_by_side
    wide, square, broken = rows(base / "out")
    assert (square["name"], square["file"]) == ("square.mp4", "00001_square.mp4")
    assert (wide["name"], wide["file"]) == ("more/wide (1).mp4", "00000_wide_1_.mp4")
    assert [wide[key] for key in ("frames", "height", "width")] == ["5", "48", "96"]
    original = read_video(base / "videos/square.mp4")[0][1:10]
    other = through(VideoTokenizer.from_pretrained(tokenizer), original).numpy()
    psnr = 10 * np.log10(255**2 / np.square(original - other).mean())
    assert float(square["psnr"]) == pytest.approx(psnr, abs=1e-6)
    assert float(square["ssim"]) == pytest.approx(ssim(original, other.astype(np.uint8)), abs=1e-6)
    bits = 3 * (1 + 16) * DIM  # 3 latent frames of the grids 1x1 and 4x4
    assert int(square["code_bytes"]) == bits / 8
    assert float(square["bits_per_pixel"]) == pytest.approx(bits / (9 * 64 * 64))
    size = (base / "videos/square.mp4").stat().st_size
    assert float(square["source_bits_per_pixel"]) == pytest.approx(8 * size / (11 * 64 * 64))
    assert broken["name"] == "more/broken.mp4" and broken["skipped"].startswith("corrupt") and not broken["psnr"]
    assert (base / "out/table.md").read_text() == text
    assert f"{psnr:.2f}" in text and "48x96" in text and "more/broken.mp4: corrupt" in text and "mean of 2" in text


def test_one_file_is_enough_and_finished_work_is_not_done_again(tokenizer, tmp_path, capsys):
    write_video(shape_clip(32, 9), tmp_path / "one.mp4")
    words = ["tokenizer", "reconstruct", "--tokenizer", tokenizer, "--videos", tmp_path / "one.mp4", "--out", tmp_path / "out"]  # fmt: skip
    assert videoar.main([*map(str, words), "--size", "48", "--frames", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out/table.md").read_text() and "48x48" in printed
    assert read_video(tmp_path / "out/00000_one.mp4")[0].shape == (5, 48, 100, 3)
    before = (tmp_path / "out/00000_one.mp4").stat().st_mtime_ns
    assert reconstruct(tokenizer, tmp_path / "one.mp4", tmp_path / "out", 48, 5) == printed
    assert (tmp_path / "out/00000_one.mp4").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other arguments \(size\)"):
        reconstruct(tokenizer, tmp_path / "one.mp4", tmp_path / "out", 32, 5)


@pytest.mark.parametrize(
    "height, width, frames, shape",
    [
        (64, 64, 17, (64, 64, 17)),
        (240, 320, 20, (240, 320, 17)),
        (7, 24, 3, (16, 32, 1)),  # never below 16; halves go up
        (23, 41, 4, (16, 48, 1)),
        (360, 640, 300, (368, 640, MOST_FRAMES)),
        (1080, 1920, 300, (1088, 1920, 5)),  # 65 frames of 384x672 have as many pixels as 8 of these
    ],
)
def test_a_video_keeps_its_shape_as_far_as_the_tokenizer_takes_it(height, width, frames, shape):
    info = VideoInfo(np.arange(frames) / 8, width, height, 8.0, frames / 8, "h264", 0)
    mine = own_shape(info)
    assert (mine.height, mine.width, mine.frames) == shape
    forced = own_shape(info, 128, 33)
    assert (forced.height, forced.width, forced.frames) == (128, 128, 33)


def test_a_table_s_bad_rows_are_listed_and_nothing_left_is_an_error(tokenizer, tmp_path):
    write_video(shape_clip(32, 9), tmp_path / "good.mp4")
    write_video(shape_clip(32, 5), tmp_path / "short.mp4")
    (tmp_path / "empty.mp4").touch()
    table = tmp_path / "videos.csv"
    table.write_text("path,caption\ngood.mp4,a\nshort.mp4,b\nempty.mp4,c\nnone.mp4,d\n")
    reconstruct(tokenizer, table, tmp_path / "out", num_frames=9)
    assert {row["name"]: row["skipped"].split(" (")[0] for row in rows(tmp_path / "out")} == {
        "good.mp4": "", "short.mp4": "too short", "empty.mp4": "empty file", "none.mp4": "missing file",
    }  # fmt: skip
    table.write_text("path,caption\nempty.mp4,c\n")
    with pytest.raises(UserError, match="empty.mp4: empty file"):
        reconstruct(tokenizer, table, tmp_path / "nothing")
    assert not list(tmp_path.glob("nothing*"))


def test_impossible_requests_are_named(tokenizer, tmp_path):
    write_video(shape_clip(32, 9), tmp_path / "one.mp4")
    for options, sentence in (
        ({"size": 40}, "height 40 is not a multiple of 16"),
        ({"num_frames": 8}, "8 frames are not 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            reconstruct(tokenizer, tmp_path / "one.mp4", tmp_path / "out", **options)
    with pytest.raises(UserError, match="nowhere.mp4 does not exist: give a video or image"):
        reconstruct(tokenizer, tmp_path / "nowhere.mp4", tmp_path / "out")
    with pytest.raises(UserError, match="no tokenizer"):
        reconstruct(tmp_path, tmp_path / "one.mp4", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
