"""The ruler of the shapes benchmark, proved on real clips decoded from their mp4, sharp and blurred."""

import csv

import av
import numpy as np
import pytest
from scipy import ndimage

from data_pipelines import moving_shapes as ms
from evaluation.shapes import ATTRIBUTES, LEAST_CHROMA, Reading, measure, moving_foreground, score
from evaluation.wilson import wilson_interval

CLIPS = 96


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Decoded validation clips, their captions and the masks that they were drawn with."""
    out = tmp_path_factory.mktemp("corpus") / "shapes"
    ms.write_corpus(out, clips=1, seed=5, validation=CLIPS)
    clips, captions = [], []
    with open(out / "validation.csv", newline="") as file:
        for row in csv.DictReader(file):
            with av.open(str(out / row["path"])) as container:
                clips.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
            captions.append(row["caption"])
    masks = [ms.render(spec)[1] for spec in ms.validation_specs(CLIPS, 5, 64, 17)]
    return clips, captions, masks


def test_the_ruler_reads_real_clips(held_out):
    result = score(*held_out[:2])
    assert result["clips"] == CLIPS
    for name in ATTRIBUTES:
        assert result[name] >= 0.98, (name, result)
    assert result["interval"]["shape"] == list(wilson_interval(round(result["shape"] * CLIPS), CLIPS))


@pytest.mark.parametrize("blur, noise, least", [(1.5, 8, 0.98), (2.5, 15, 0.95)])
def test_the_ruler_reads_blurred_and_noisy_clips(held_out, blur, noise, least):
    clips, captions, _ = held_out
    generator = np.random.default_rng(0)
    soft = [
        np.clip(
            ndimage.gaussian_filter(c.astype(float), (0, blur, blur, 0)) + generator.normal(0, noise, c.shape), 0, 255
        )
        for c in clips
    ]
    result = score([c.astype(np.uint8) for c in soft], captions)
    assert min(result[name] for name in ATTRIBUTES) >= least, result


def test_the_foreground_is_the_drawn_shape(held_out):
    clips, _, masks = held_out
    overlap = [(f & m).sum() / (f | m).sum() for f, m in ((moving_foreground(c), m) for c, m in zip(clips, masks))]
    assert np.mean(overlap) > 0.9 and np.min(overlap) > 0.8  # the video's chroma has half the resolution
    drawn, mask = ms.render(ms.validation_specs(1, 5, 64, 17)[0])
    exact = moving_foreground(drawn)
    assert (exact & mask).sum() / (exact | mask).sum() > 0.98


def test_wrong_captions_score_as_wrong(held_out):
    clips, _, _ = held_out
    red = [c for c, s in zip(clips, ms.validation_specs(CLIPS, 5, 64, 17)) if s.combination.colour == "red"]
    result = score(red, ["a blue circle moving left slowly"] * len(red))
    assert result["colour"] == 0 and 0 < result["shape"] < 1 and result["all"] == 0


def test_nothing_is_read_where_nothing_is():
    background = ms._background(np.random.default_rng(0), 64)
    assert (background.max(-1) - background.min(-1)).max() < LEAST_CHROMA
    still = np.repeat(background[None], 17, 0).astype(np.uint8)
    assert measure(still) == Reading()
    assert not moving_foreground(still).any()
    still[:, 20:44, 20:44] = (222, 36, 36)  # a square that does not move
    assert measure(still) == Reading("red", "square", None, None)
    one_frame = measure(still[:1])
    assert (one_frame.colour, one_frame.shape, one_frame.direction) == ("red", "square", None)


def test_a_speck_far_from_the_shape_does_not_move_it():
    spec = ms.make_spec(ms.Combination("triangle", "cyan", "up", "quickly"), (9,), 64, 17)
    clip, _ = ms.render(spec)
    clip[:, 60:64, 0:4] = (36, 204, 214)
    assert measure(clip) == Reading("cyan", "triangle", "up", "quickly")


def test_wilson_interval_against_known_values():
    # Newcombe (1998), table I, and the closed form at the ends.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(128, 128) == pytest.approx((0.9709, 1.0), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
