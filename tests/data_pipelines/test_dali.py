"""NVIDIA DALI against FFmpeg: the same frames, nearly the same pixels. Its CPU operators run everywhere, its GPU ones are marked."""

import functools
import logging

import numpy as np
import pytest
import torch

from data_pipelines.clips import ClipDataset
from data_pipelines.dali_decoder import DALIDecoder
from data_pipelines.decode import DecodeError, PyAVDecoder, choose_decoder
from data_pipelines.probe import probe
from data_pipelines.sampling import sample_times
from data_pipelines.shards import write_shards
from data_pipelines.tokenizer_clips import training_clips
from tests.data_pipelines.media import cut, indices, write_audio, write_video
from tokenizer.errors import UserError
from tokenizer.train_config import BatchSpec, Phase, TokenizerTrainConfig

PIXELS = 3.0
"""Mean difference of pixels, of 255: two codecs' rounding, colour matrices and scaling kernels."""
CASES = [("v.webm", "libvpx-vp9", "cpu"), ("v.avi", "mjpeg", "cpu")]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CASES += [
    pytest.param("v.mp4", codec, "cuda", marks=GPU) for codec in ("libx264", "libx265", "libvpx-vp9")
]  # fmt: skip
case = functools.partial(pytest.mark.parametrize, "name, codec, device")(CASES)


def scene(frames: int, height: int, width: int) -> np.ndarray:
    """A coloured field that drifts, each frame with a grey square of its own in the middle."""
    y, x = np.mgrid[:height, :width]
    images = []
    for number in range(frames):
        waves = [
            128 + 90 * np.sin(2 * np.pi * (x * a + y * b) / width + number / 5) for a, b in ((1, 0), (0, 1), (1, 1))
        ]
        image = np.stack(waves, -1)
        image[height // 3 : -height // 3, width // 3 : -width // 3] = 20 + 6 * number
        images.append(image.astype(np.uint8))
    return np.stack(images)


@case
def test_frames_are_those_of_ffmpeg_and_pixels_nearly(tmp_path, name, codec, device):
    video = write_video(tmp_path / name, images=scene(30, 144, 192), codec=codec, gop=12).read_bytes()
    times, draw = probe(video).timestamps, np.random.default_rng(0)
    for fps, height, width in ((None, 144, 192), (4, 64, 64), (2, 96, 160), (None, 192, 256)):
        wanted = sample_times(times, fps, 5, "random", draw)
        ours, theirs = (
            decoder.decode(video, wanted, height, width).astype(float)
            for decoder in (DALIDecoder(device), PyAVDecoder())
        )
        assert ours.shape == theirs.shape == (5, height, width, 3)
        middle = (slice(None), slice(height // 2 - 4, height // 2 + 4), slice(width // 2 - 4, width // 2 + 4))
        assert np.abs(ours[middle].mean((1, 2, 3)) - theirs[middle].mean((1, 2, 3))).max() < 3  # frames differ by 6
        assert np.abs(ours - theirs).mean() < PIXELS


@case
def test_times_choose_frames_by_the_one_rule(tmp_path, name, codec, device):
    video = write_video(tmp_path / name, frames=24, fps=8, size=(64, 160), codec=codec).read_bytes()
    start = probe(video).timestamps[0]
    clip = DALIDecoder(device).decode(video, start + np.array([0.0, 0.1249, 0.2, 0.2, 1.06, 23 / 8]), 48, 64)
    assert indices(clip) == [0, 1, 1, 1, 8, 23]
    if name.endswith("avi"):
        return  # has one rate
    times = [0.0, 0.1, 0.15, 0.4, 0.41, 1.0, 1.5, 1.52, 2.0, 3.0]
    video = write_video(tmp_path / f"vfr{name}", frames=10, size=(64, 160), times=times, codec=codec).read_bytes()
    start = probe(video).timestamps[0]
    assert indices(DALIDecoder(device).decode(video, start + np.arange(7) / 2, 48, 64)) == [0, 4, 5, 6, 8, 8, 9]


@case
def test_what_it_cannot_decode_is_an_error_and_the_next_file_is_not_touched_by_it(tmp_path, name, codec, device):
    decoder = DALIDecoder(device)
    good = write_video(tmp_path / name, frames=10, size=(64, 160), codec=codec)
    video, times = good.read_bytes(), probe(good).timestamps
    expected = decoder.decode(video, times, 64, 160)
    with pytest.raises(DecodeError, match="ends at"):
        decoder.decode(video, times[-1:] + 1, 64, 160)
    for bad in (b"", b"noise" * 500, write_audio(tmp_path / "a.m4a").read_bytes(), cut(good, 0.4).read_bytes()):
        with pytest.raises(DecodeError):
            decoder.decode(bad, times, 64, 160)
        np.testing.assert_array_equal(decoder.decode(video, times, 64, 160), expected)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_are_turned_upright(tmp_path, rotation):
    video = write_video(tmp_path / "r.mp4", images=scene(6, 96, 144), codec="libvpx-vp9", rotation=rotation)
    info = probe(video)
    arguments = (video.read_bytes(), info.timestamps, 80, 64)
    ours = DALIDecoder("cpu").decode(*arguments, rotation=info.rotation)
    assert info.rotation == rotation % 360
    assert np.abs(ours.astype(float) - PyAVDecoder().decode(*arguments)).mean() < PIXELS


def test_the_chooser_says_what_it_chose_and_why(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "data_pipelines.decode")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(choose_decoder("auto"), PyAVDecoder) and "there is no GPU" in caplog.text
    assert isinstance(choose_decoder("pyav"), PyAVDecoder) and "as asked" in caplog.text
    forced = choose_decoder("dali")
    assert isinstance(forced, DALIDecoder) and forced.fallback is None and forced.device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = choose_decoder("auto")
    assert isinstance(chosen, DALIDecoder) and isinstance(chosen.fallback, PyAVDecoder) and chosen.device == "cuda"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(choose_decoder("auto"), PyAVDecoder) and "DALI is not installed" in caplog.text
    with pytest.raises(UserError, match="needs NVIDIA DALI"):
        choose_decoder("dali")


def test_forced_by_configuration_and_other_codecs_go_to_ffmpeg_or_are_replaced(tmp_path):
    for number, (name, codec) in enumerate((("a.webm", "libvpx-vp9"), ("b.mp4", "libx264"), ("c.webm", "libvpx-vp9"))):
        write_video(tmp_path / "videos" / name, images=scene(20, 64, 96)[number:], codec=codec)
    write_shards(tmp_path / "videos", tmp_path / "shards")
    forced = ClipDataset(tmp_path / "shards", 17, 32, start="centre", decoder="dali")
    assert [(item["source"], item["replaced"]) for item in forced] == [("a.webm", 0), ("c.webm", 1), ("c.webm", 0)]
    plain = ClipDataset(tmp_path / "shards", 17, 32, start="centre", decoder="pyav")
    differences = [(one["video"].float() - other["video"].float()).abs().mean() for one, other in zip(forced, plain)]
    assert 0 < float(differences[0]) < PIXELS and [item["replaced"] for item in plain] == [0, 0, 0]
    forced.decoder = DALIDecoder("cpu", PyAVDecoder())
    assert [item["replaced"] for item in forced] == [0, 0, 0]
    assert torch.equal(forced[1]["video"], plain[1]["video"])  # the H.264 one

    batches = {}
    for decoder in ("pyav", "dali"):
        config = TokenizerTrainConfig(phases=(Phase((BatchSpec(5, 32, 2),), 1),), decoder=decoder)
        clips, _ = training_clips(config, tmp_path / "shards", None, workers=1)
        batches[decoder] = clips(0, BatchSpec(5, 32, 2))
    assert not torch.equal(batches["pyav"], batches["dali"])
