"""The corpus: what is held out, what is drawn, and that it is written once and whole or not at all."""

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines import moving_shapes as ms
from tokenizer.errors import UserError


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_held_out_combinations_are_balanced_and_never_trained_on():
    assert len(ms.all_combinations()) == 288
    assert len(ms.HELD_OUT) == 24
    for field, each in (("shape", 8), ("colour", 4), ("direction", 3), ("speed", 12)):
        assert set(Counter(getattr(c, field) for c in ms.HELD_OUT).values()) == {each}
    trained = [spec.combination for spec in ms.train_specs(264, 0, 64, 17)]
    assert set(trained) == set(ms.all_combinations()) - ms.HELD_OUT  # each of the others exactly once
    assert [s.combination in ms.HELD_OUT for s in ms.validation_specs(50, 0, 64, 17)] == [True] * 25 + [False] * 25


def test_captions_round_trip_and_foreign_ones_are_refused():
    for combination in ms.all_combinations():
        assert ms.parse_caption(combination.caption) == combination
    assert ms.Combination("circle", "red", "up-left", "slowly").caption == "a red circle moving up-left slowly"
    with pytest.raises(UserError, match="a pink circle"):
        ms.parse_caption("a pink circle moving left slowly")


def test_a_shape_stays_whole_in_every_frame_and_moves_as_told():
    size = 256  # at which a mask's edges, which snap to whole pixels, move its centre by at most a pixel
    for spec in ms.train_specs(60, 3, size, 17):
        clip, mask = ms.render(spec, size)
        assert clip.shape == (17, size, size, 3) and clip.dtype == np.uint8
        edge = np.concatenate([mask[:, [0, -1]].ravel(), mask[:, :, [0, -1]].ravel()])
        assert not edge.any()  # never cut off
        first, last = (np.argwhere(mask[t]).mean(0) for t in (0, -1))
        vx, vy = ms.velocity(spec.combination.direction, spec.combination.speed, size)
        np.testing.assert_allclose(last - first, [16 * vy, 16 * vx], atol=1)


def test_coverage_has_the_area_of_the_shape():
    for shape, area in (("circle", np.pi * 144), ("square", 4 * 144), ("triangle", 2 * 144)):
        assert ms.coverage(shape, 12.0, 31.7, 32.2, 64, 64).sum() == pytest.approx(area, rel=0.03)


def test_too_long_a_clip_is_refused():
    with pytest.raises(UserError, match="at most 21 frames"):
        ms.train_specs(300, 0, 64, 65)
    assert len(ms.train_specs(300, 0, 64, 21)) == 300


def test_the_corpus_is_real_video_written_once(tmp_path):
    out = tmp_path / "corpus"
    receipt = ms.write_corpus(out, clips=6, seed=1, validation=4)
    assert receipt["prompts"] == 24
    train = rows(out / "train.csv")
    assert len(train) == 6 and len(rows(out / "validation.csv")) == 4 and len(rows(out / "prompts.csv")) == 24
    assert {row["caption"] for row in rows(out / "prompts.csv")} == {c.caption for c in ms.HELD_OUT}
    assert [row["held_out"] for row in rows(out / "validation.csv")] == ["1", "1", "0", "0"]
    with av.open(str(out / train[0]["path"])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    drawn, _ = ms.render(ms.train_specs(6, 1, 64, 17)[0])
    assert decoded.shape == drawn.shape
    assert -10 * np.log10(np.mean((decoded / 255.0 - drawn / 255.0) ** 2)) > 28  # dB; chroma is stored at half size

    before = (out / train[0]["path"]).stat().st_mtime_ns
    assert ms.write_corpus(out, clips=6, seed=1, validation=4) == receipt
    assert (out / train[0]["path"]).stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other arguments \(seed\)"):
        ms.write_corpus(out, clips=6, seed=2, validation=4)


def test_a_killed_or_foreign_folder_is_not_taken_for_whole(tmp_path, monkeypatch):
    out = tmp_path / "corpus"

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ms, "write_video", die)
        with pytest.raises(KeyboardInterrupt):
            ms.write_corpus(out, clips=2, seed=0, validation=2)
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left
    out.mkdir()
    (out / "train.csv").write_text("path,caption\n")  # no receipt: not ours, not whole
    with pytest.raises(UserError, match="was not written by this command"):
        ms.write_corpus(out, clips=2, seed=0, validation=2)


def test_what_a_kill_left_behind_is_cleaned_up(tmp_path):
    out = tmp_path / "corpus"
    script = f"""
import os, pathlib
from data_pipelines import moving_shapes as ms
ms.write_video = lambda *_, **__: os.kill(os.getpid(), 9)
ms.write_corpus(pathlib.Path({str(out)!r}), clips=2, seed=0, validation=2)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    assert killed.returncode == -9 and len(list(tmp_path.glob("corpus.tmp.*"))) == 1 and not out.exists()
    ms.write_corpus(out, clips=2, seed=0, validation=2)
    assert list(tmp_path.iterdir()) == [out]
