"""Frames by their time, upright and in the wanted size."""

import numpy as np
import pytest

from data_pipelines.decode import DecodeError, choose_decoder
from data_pipelines.probe import probe
from tests.data_pipelines.media import cut, indices, write_audio, write_video
from tokenizer.errors import UserError


def test_each_time_gives_the_last_frame_at_or_before_it(tmp_path):
    video = write_video(tmp_path / "a.mp4", frames=24, fps=8).read_bytes()
    decoder = choose_decoder()
    times = np.array([0.0, 0.1249, 0.125, 0.2, 0.2, 1.0, 1.06, 23 / 8])
    clip = decoder.decode(video, times, 48, 64)
    assert clip.shape == (8, 48, 64, 3) and clip.dtype == np.uint8
    assert indices(clip) == [0, 1, 1, 1, 1, 8, 8, 23]  # 0.1249 lies within a container's rounding of frame 1
    assert indices(decoder.decode(video, np.arange(24) / 8, 48, 64)) == list(range(24))


def test_variable_frame_rate_goes_by_timestamps_not_by_numbers(tmp_path):
    times = [0.0, 0.1, 0.15, 0.4, 0.41, 1.0, 1.5, 1.52, 2.0, 3.0]
    video = write_video(tmp_path / "v.mp4", frames=10, times=times).read_bytes()
    start = probe(video).timestamps[0]
    clip = choose_decoder().decode(video, start + np.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]), 48, 64)
    assert indices(clip) == [0, 4, 5, 6, 8, 8, 9]


@pytest.mark.parametrize("name, codec", [("l.mp4", "libx264"), ("l.avi", "mpeg4"), ("l.mkv", "libx264")])
def test_seeking_far_into_a_video_gives_the_same_frames(tmp_path, name, codec):
    video = write_video(tmp_path / name, frames=48, fps=8, codec=codec, gop=10).read_bytes()
    times = probe(video).timestamps
    whole = choose_decoder().decode(video, times, 48, 64)
    for first in (17, 20, 29, 47):
        np.testing.assert_array_equal(choose_decoder().decode(video, times[first:], 48, 64), whole[first:])


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_are_turned_upright(tmp_path, rotation):
    image = np.full((48, 64, 3), 20, np.uint8)
    image[:16, :16] = 230  # a mark in the stored frame's upper left corner
    video = write_video(tmp_path / "r.mp4", images=np.stack([image] * 17), rotation=rotation).read_bytes()
    info = probe(video)
    clip = choose_decoder().decode(video, info.timestamps[:1], info.height, info.width)
    expected = np.rot90(image, rotation // 90)  # the container's angle is counter-clockwise
    assert clip[0].shape == expected.shape
    assert np.abs(clip[0].astype(int) - expected).mean() < 3


def test_scaling_covers_and_crops_without_distortion(tmp_path):
    y, x = np.mgrid[:120, :160]
    disc = ((x - 80) ** 2 + (y - 60) ** 2 < 40**2) * 200 + 20
    image = np.repeat(disc[..., None], 3, -1).astype(np.uint8)
    video = write_video(tmp_path / "d.mp4", images=np.stack([image] * 2)).read_bytes()
    small = choose_decoder().decode(video, [0.0], 64, 64)[0, ..., 0] > 120
    rows, columns = small.any(1).sum(), small.any(0).sum()
    assert rows == columns == pytest.approx(80 * 64 / 120, abs=1)  # still round: the height fits, the sides are cropped
    large = choose_decoder().decode(video, [0.0], 240, 320)
    assert large.shape == (1, 240, 320, 3)


def test_scaling_down_is_antialiased(tmp_path):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    video = write_video(tmp_path / "s.mp4", images=np.stack([stripes] * 2)).read_bytes()
    clip = choose_decoder().decode(video, [0.0], 48, 48).astype(float)
    assert clip.mean() == pytest.approx(127, abs=6) and clip.std() < 30


def test_damaged_files_and_times_past_the_end_are_errors(tmp_path):
    decoder = choose_decoder()
    video = write_video(tmp_path / "a.mp4", frames=8, fps=8).read_bytes()
    with pytest.raises(DecodeError, match="ends at 0.875 s, 1.000 s"):
        decoder.decode(video, [0.5, 1.0], 48, 64)
    with pytest.raises(DecodeError, match="ends at"):
        decoder.decode(video, [5.0], 48, 64)
    with pytest.raises(DecodeError, match="no video stream"):
        decoder.decode(write_audio(tmp_path / "a.m4a").read_bytes(), [0.0], 48, 64)
    with pytest.raises(DecodeError):
        decoder.decode(b"", [0.0], 48, 64)
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3)).astype(np.uint8)
    broken = cut(write_video(tmp_path / "c.mp4", images=noise, faststart=True), 0.5).read_bytes()
    with pytest.raises(DecodeError):
        decoder.decode(broken, np.arange(24) / 8, 48, 64)
    with pytest.raises(UserError, match="no video decoder 'dalli'"):
        choose_decoder("dalli")
