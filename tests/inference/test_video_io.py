"""Reading conditions and writing clips."""

from __future__ import annotations

import wave

import numpy as np
import pytest
from PIL import Image

from inference.video_io import read_image, read_video
from tokenizer import UserError
from tokenizer.video_file import write_video


def grey_steps(num_frames: int, size=(32, 48)) -> np.ndarray:
    """Frame i is grey of value 8 i."""
    return np.stack([np.full((*size, 3), 8 * i, dtype=np.uint8) for i in range(num_frames)])


def values(frames: np.ndarray) -> list[int]:
    """Which frames of `grey_steps` these are."""
    return np.round(frames.mean(axis=(1, 2, 3)) / 8).astype(int).tolist()


def test_videos_are_sampled_by_time(tmp_path):
    file = tmp_path / "steps.mp4"
    write_video(grey_steps(25), file, fps=24)
    assert values(read_video(file, (32, 48), fps=24)) == list(range(25))
    assert values(read_video(file, (32, 48), fps=8)) == list(range(0, 25, 3))
    assert values(read_video(file, (32, 48), fps=8, last=3)) == [18, 21, 24]
    assert values(read_video(file, (32, 48), fps=48))[:6] == [0, 0, 1, 1, 2, 2]
    assert values(read_video(file, (32, 48), fps=10)) == [int(i * 2.4 + 1e-6) for i in range(11)]


def test_frames_are_scaled_to_cover_and_cropped_at_the_centre(tmp_path):
    wide = np.zeros((32, 128, 3), dtype=np.uint8)
    wide[:, 32:96] = 255  # the middle half
    assert read_image(wide, (32, 64)).min() == 255
    assert read_image(wide, (16, 64))[0].shape == (16, 64, 3)
    half = read_image(wide, (16, 64))[0, 8, :, 0]
    assert (half[:15] == 0).all() and (half[17:47] == 255).all()
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", (32, 64)).shape == (1, 32, 64, 3)
    assert read_image(Image.fromarray(wide).convert("L"), (32, 64)).min() == 255
    clip = np.stack([wide] * 3)
    assert read_video(clip, (32, 64), fps=8).shape == (3, 32, 64, 3)
    assert read_video(clip, (32, 64), fps=8, last=2).shape == (2, 32, 64, 3)


def test_damaged_files(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    for name, words in (
        ("text.mp4", "can't be decoded"),
        ("empty.mp4", "can't be decoded"),
        ("sound.wav", "no video stream"),
    ):
        with pytest.raises(UserError, match=words):
            read_video(tmp_path / name, (32, 32), 8)
    with pytest.raises(UserError, match="neither an image nor a video"):
        read_image(tmp_path / "text.mp4", (32, 32))
    with pytest.raises(UserError, match="uint8"):
        read_video(np.zeros((3, 32, 32, 3)), (32, 32), 8)


def test_nothing_half_written(tmp_path):
    with pytest.raises(UserError, match="use .mp4, .gif, .png"):
        write_video(grey_steps(2), tmp_path / "clip.avi")
    with pytest.raises(UserError, match="sides are even"):
        write_video(grey_steps(2, (31, 32)), tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", [32, 64])
def test_the_same_frames_give_the_same_file(tmp_path, side):
    """Whatever lies in the memory around them."""
    noise = np.random.default_rng(0)
    frames = noise.integers(20, 40, (17, side, side, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[8:20, 4 + number % 8 : 14 + number % 8] = 200
    written = set()
    for length in range(1, 3000, 75):
        around = [np.full(length + step, length % 251, dtype=np.uint8) for step in range(300)]
        write_video(frames, tmp_path / "clip.mp4")
        written.add((tmp_path / "clip.mp4").read_bytes())
        del around
    assert len(written) == 1
