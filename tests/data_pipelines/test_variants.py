"""Shapes of clips: the rule, and codes of clips of many shapes in one folder."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.clips import read_clip
from data_pipelines.code_stream import CodeStream, Source
from data_pipelines.codes import CodeDataset, CodeFolder
from data_pipelines.decode import choose_decoder
from data_pipelines.encode import EncodeConfig, make_job
from data_pipelines.encode_worker import ShardEncoder, Task
from data_pipelines.random_access import ShardFolder
from data_pipelines.sampling import ClipTooShort
from data_pipelines.shard_part import ShardsConfig
from data_pipelines.shards import write_shards
from data_pipelines.variants import LARGEST_RATIO, Variant, nearest_size, sizes
from tests.data_pipelines.encode_here import encode_here
from tests.data_pipelines.media import write_video
from tests.data_pipelines.test_encode import content, make_tokenizer
from tokenizer import UserError, VideoTokenizer
from tokenizer.clip_shape import ClipShape
from tokenizer.pixels import from_pixels


def test_names_of_variants():
    assert Variant.parse("64x96x17") == Variant((64, 96), (17,))
    assert Variant.parse("256x17+33+65") == Variant(256, (17, 33, 65))
    assert Variant.parse("512x1") == Variant(512, (1,))
    for text, message in (
        ("64", "neither HEIGHTxWIDTHxFRAMES nor SIDExFRAMES"),
        ("64x64x17x1", "neither"),
        ("256x", "neither"),
        ("256x17+", "neither"),
        ("250x17", "height 250 is not a multiple of 16"),
        ("64x64x17+20", "20 frames are not 1"),
        ("256x33+17", "ascending"),
        ("256x17+17", "ascending"),
    ):
        with pytest.raises(UserError, match=message):
            Variant.parse(text)


@pytest.mark.parametrize("side", [128, 256, 512])
def test_buckets_hold_about_as_many_pixels_at_every_ratio(side):
    buckets = sizes(side)
    assert (side, side) in buckets and all((width, height) in buckets for height, width in buckets)
    for height, width in buckets:
        assert height % 16 == width % 16 == 0 and max(height / width, width / height) <= LARGEST_RATIO
        # at most a column of tokens less than the budget
        assert side**2 - 16 * min(height, width) < height * width <= side**2
    # the worst that a clip between the extremes loses is half of the widest gap between two buckets
    ratios = np.array(sorted(width / height for height, width in buckets))
    gap = np.diff(np.log(ratios)).max()
    for ratio in np.geomspace(ratios[0], ratios[-1], 50):
        height, width = nearest_size(1000, round(1000 * ratio), side)
        assert abs(math.log(width / height / ratio)) <= gap / 2 + 1e-3


def test_the_paper_s_size_and_common_ones():
    assert nearest_size(720, 1280, 512) == (384, 672) and nearest_size(1280, 720, 512) == (672, 384)
    assert nearest_size(240, 320, 128) == (112, 144) and nearest_size(2000, 2000, 256) == (256, 256)
    assert nearest_size(100, 5000, 256) == (160, 400)  # cropped


def test_each_clip_takes_the_longest_length_that_it_has():
    variant = Variant.parse("128x1+17+33")
    for frames, fps, expected in (
        (80, 8, 17),
        (80, 12, 33),
        (60, 8, 17),
        (60, None, 33),
        (33, None, 33),
        (32, None, 17),
        (5, 8, 1),
    ):
        record = {"timestamps": np.arange(frames) / 24, "height": 240, "width": 320}
        assert variant.shape(record, fps) == ClipShape(112, 144, expected)
    with pytest.raises(ClipTooShort, match="5 frames are too few for 17"):
        Variant.parse("128x17+33").shape({"timestamps": np.arange(5) / 24, "height": 240, "width": 320}, None)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> EncodeConfig:
    """Images and videos of three ratios and three lengths, one of them too short, in three raw shards."""
    base = tmp_path_factory.mktemp("mixed")
    draw = np.random.default_rng(0)
    for number, (frames, height, width) in enumerate(
        (
            (9, 48, 64),
            (1, 64, 48),
            (5, 64, 64),
            (12, 64, 48),
            (9, 48, 64),
            (5, 48, 64),
            (9, 64, 48),
            (5, 64, 64),
            (3, 48, 64),
        )
    ):
        images = draw.integers(0, 255, (frames, height, width, 3)).astype(np.uint8)
        write_video(base / "videos" / f"{number}.mp4", images=images)
    write_shards(base / "videos", base / "raw", ShardsConfig(min_frames=1, part_files=3, workers=1))
    make_tokenizer(base / "tokenizer", 0)
    return EncodeConfig(
        str(base / "raw"), str(base / "tokenizer"), str(base / "codes"), "64x5+9", latents=True, batch_size=2
    )


def test_codes_of_many_shapes_in_one_folder(mixed):
    (summary,) = encode_here(mixed)
    assert (summary.rows_in, summary.rows_out, summary.dead) == (9, 7, 2)
    folder = CodeFolder(f"{mixed.out}/64x5+9")
    shapes = [(bucket.height, bucket.width, bucket.clip_frames, bucket.rows) for bucket in folder.manifest.buckets]
    assert shapes == [(48, 80, 5, 1), (48, 80, 9, 2), (64, 64, 5, 2), (80, 48, 9, 2)]
    raw, tokenizer = ShardFolder(mixed.shards), VideoTokenizer.from_pretrained(mixed.tokenizer)
    by_source = {raw[row]["source"]: raw[row] for row in range(9)}
    for number, bucket in enumerate(folder.manifest.buckets):
        dataset = CodeDataset(folder, bucket=number)
        for row in range(len(dataset)):
            item = dataset[row]
            frames = read_clip(
                by_source[item["source"]], choose_decoder("pyav"), bucket.clip_frames, bucket.height, bucket.width
            )
            latent = tokenizer.encode_latent(from_pixels(frames)[None]).detach().movedim(1, 2)[0]  # [T, d, H, W]
            torch.testing.assert_close(item["latent"], latent, atol=2e-3, rtol=2e-3)
    sources = [
        Source(folder.path, bucket.num_frames, 1.0, bucket=number)
        for number, bucket in enumerate(folder.manifest.buckets)
    ]
    stream = CodeStream(sources, 2)
    assert {(batch.tokens.shape[1], batch.schedule.grid) for batch in (next(stream) for _ in range(4))} == {
        (2, (3, 5)), (3, (3, 5)), (2, (4, 4)), (3, (5, 3)),
    }  # fmt: skip
    first = content(Path(folder.path))
    assert encode_here(mixed)[0].already_done and content(Path(folder.path)) == first


def test_the_decoder_is_part_of_the_job(mixed):
    jobs = [
        make_job(
            EncodeConfig(mixed.shards, mixed.tokenizer, mixed.out, "64x5", device=device, decoder=decoder), "f", "64x5"
        )  # type: ignore
        for device, decoder in (("cpu", "auto"), ("cpu", "dali"), ("cuda", "auto"), ("cuda", "pyav"))
    ]
    assert [job.decoder for job in jobs] == ["pyav", "dali", "auto", "pyav"]
    worker = ShardEncoder(mixed.shards, mixed.tokenizer, "cpu", threads=1)
    # H.264 is nothing for DALI without a GPU
    receipt = worker.encode(Task(make_job(EncodeConfig(mixed.shards, mixed.tokenizer, mixed.out, "64x5", decoder="dali"),
                                          worker.tokenizer.fingerprint, "64x5"), f"{mixed.out}/dali", 0, "try"))  # fmt: skip
    assert receipt["rows_out"] == 0 and "DALI decodes vp9, mjpeg on a CPU, not h264" in receipt["dead"][0]["reason"]
