"""What a file holds, and the reason why it is refused, on real files good and bad."""

import av
import numpy as np
import pytest

from data_pipelines.probe import Rejected, probe
from tests.data_pipelines.media import cut, write_audio, write_video


def test_a_good_file(tmp_path):
    info = probe(write_video(tmp_path / "a.mp4", frames=21, fps=8))
    assert (info.frames, info.width, info.height, info.codec, info.rotation) == (21, 64, 48, "h264", 0)
    assert info.fps == pytest.approx(8) and info.duration == pytest.approx(21 / 8)
    np.testing.assert_allclose(info.timestamps, np.arange(21) / 8, atol=1e-6)


@pytest.mark.parametrize(
    "name, codec", [("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.mp4", "libx265")]
)
def test_other_containers_and_codecs(tmp_path, name, codec):
    images = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3)).astype(np.uint8)
    info = probe(write_video(tmp_path / name, codec=codec, images=images))
    assert info.frames == 20 and info.fps == pytest.approx(8, rel=1e-3)
    assert np.diff(info.timestamps) == pytest.approx(1 / 8, abs=2e-3)


def test_variable_frame_rate_keeps_every_timestamp(tmp_path):
    times = [0.0, 0.1, 0.15, 0.4, 0.41, 1.0, 1.5, 1.52, 2.0, 3.0]
    info = probe(write_video(tmp_path / "v.mp4", frames=10, times=times))
    np.testing.assert_allclose(info.timestamps - info.timestamps[0], times, atol=1.1e-3)


@pytest.mark.parametrize("rotation, upright", [(90, (48, 64)), (-90, (48, 64)), (180, (64, 48))])
def test_rotation_swaps_the_sides(tmp_path, rotation, upright):
    info = probe(write_video(tmp_path / "r.mp4", size=(48, 64), rotation=rotation))
    assert info.rotation == rotation % 360
    assert (info.width, info.height) == upright


def test_reasons(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3)).astype(np.uint8)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video at all" * 50)
    write_audio(tmp_path / "sound.mp4")
    write_video(tmp_path / "short.mp4", frames=16)
    cut(write_video(tmp_path / "no_index.mp4", images=noise), 0.6)
    cut(write_video(tmp_path / "cut.mp4", images=noise, faststart=True), 0.6)
    cut(write_video(tmp_path / "end_cut.mp4", images=noise, faststart=True), 0.995)
    cut(write_video(tmp_path / "cut.mkv", images=noise), 0.6)
    cut(write_video(tmp_path / "cut.avi", images=noise, codec="mpeg4"), 0.6)
    expected = {
        "gone.mp4": r"^missing file$",
        "empty.mp4": r"^empty file$",
        "text.mp4": r"^corrupt \(",
        "sound.mp4": r"^no video stream$",
        "short.mp4": r"^too short \(16 frames, 17 wanted\)$",
        "no_index.mp4": r"^corrupt \(",
        "cut.mp4": r"^(corrupt|truncated) \(",
        "end_cut.mp4": r"^(corrupt|truncated) \(",
        "cut.mkv": r"^(corrupt|truncated) \(",
        "cut.avi": r"^(corrupt|truncated) \(",
    }
    for name, reason in expected.items():
        with pytest.raises(Rejected, match=reason):
            probe(tmp_path / name, min_frames=17)
    assert probe(tmp_path / "short.mp4", min_frames=16).frames == 16


def test_a_file_cut_between_frames_decodes_without_an_error_and_is_still_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3)).astype(np.uint8)
    path = write_video(tmp_path / "clean_cut.mkv", images=noise, gop=1)
    with av.open(str(path)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: starts[12]])
    with pytest.raises(Rejected, match=r"^truncated \(1\.50 s of 3\.00 s\)"):
        probe(path)


def test_bit_rot_inside_a_file_is_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3)).astype(np.uint8)
    path = write_video(tmp_path / "rot.mp4", images=noise)
    good = path.read_bytes()
    found = 0
    for trial in range(10):
        content = bytearray(good)
        places = np.random.default_rng(trial).integers(good.index(b"mdat") + 2000, len(good) - 3000, 200)
        for place in places:
            content[place] ^= 0xFF
        try:
            probe(bytes(content))
        except Rejected as reason:
            found += str(reason).startswith(("corrupt", "truncated"))
    assert found == 10
