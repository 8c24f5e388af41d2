"""Which moments a clip shows, decoded clips, and batches that are a pure function of their step."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from data_pipelines.clips import ClipBatches, ClipDataset, load_clips, split_clips
from data_pipelines.random_access import HASH, ShardFolder
from data_pipelines.sampling import ClipTooShort, sample_times
from data_pipelines.shard_part import COLUMNS, ShardsConfig
from data_pipelines.shards import write_shards
from tests.data_pipelines.media import indices, write_video
from tokenizer.clip_shape import check_clip_shape
from tokenizer.errors import UserError
from tokenizer.train_config import BatchSpec

FRAMES = 29


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Six videos of 29 frames at 8 frames a second, brightest in the last: frame i of each has its own grey."""
    folder = tmp_path_factory.mktemp("clips")
    rows = ["path,caption"]
    for i in range(6):
        write_video(folder / f"{i}.mp4", frames=FRAMES, size=(32, 32), fps=8)
        rows.append(f"{i}.mp4,caption {i}")
    (folder / "train.csv").write_text("\n".join(rows))
    write_shards(folder / "train.csv", folder / "shards", ShardsConfig(shard_size="8kb"))
    return folder / "shards"


@pytest.fixture(scope="module")
def with_a_bad_record(shards, tmp_path_factory) -> Path:
    """The same shards with record 2 replaced by one whose bytes can't be decoded."""
    out = tmp_path_factory.mktemp("bad") / "shards"
    folder = ShardFolder(shards)
    writer = MDSWriter(columns=COLUMNS, out=str(out), hashes=[HASH])
    for i in range(len(folder)):
        record = dict(folder[i])
        if i == 2:
            record["video"] = record["video"][:200]
        writer.write(record)
    writer.finish()
    return out


def test_sample_times_by_hand():
    even = np.arange(21) / 8
    np.testing.assert_allclose(
        sample_times(even, 8, 17), (2 + np.arange(17)) / 8
    )  # 4 frames to spare: 2 on either side
    np.testing.assert_allclose(sample_times(even, None, 17), (2 + np.arange(17)) / 8)
    np.testing.assert_allclose(sample_times(even, 4, 9), (2 + 2 * np.arange(9)) / 8)
    np.testing.assert_allclose(sample_times(even, 8, 21), even)
    np.testing.assert_allclose(sample_times(even, 16, 5), (9 + np.arange(5) / 2) / 8)
    np.testing.assert_allclose(sample_times(even, None, 1), [10 / 8])
    uneven = 5 + np.array([0.0, 0.1, 0.15, 0.4, 0.41, 1.0, 1.5, 1.52, 2.0, 3.0])
    np.testing.assert_allclose(sample_times(uneven, 2, 5), 5 + 0.41 + np.arange(5) / 2)  # starts 0 .. 0.41, 1.0 fit
    with pytest.raises(ClipTooShort, match="21 frames are too few for 25"):
        sample_times(even, None, 25)
    with pytest.raises(ClipTooShort, match="for 17 at 4 frames a second"):
        sample_times(even, 4, 17)


def test_random_starts_cover_all_that_fit_and_nothing_else():
    even = np.arange(21) / 8
    firsts = [sample_times(even, 8, 17, "random", np.random.default_rng(i))[0] for i in range(200)]
    assert sorted(set(np.round(8 * np.array(firsts)).astype(int))) == [0, 1, 2, 3, 4]
    assert sample_times(even, 8, 17, "random", np.random.default_rng(7))[0] == firsts[7]


def test_impossible_shapes_are_refused(shards):
    for bad in (0, 4, 16, 18):
        with pytest.raises(UserError, match="1\\+4n"):
            check_clip_shape(bad, 64, 64)
    with pytest.raises(UserError, match="height 40 is not a multiple of 16"):
        check_clip_shape(17, 40, 64)
    with pytest.raises(UserError, match="a multiple of 16"):
        ClipDataset(shards, 17, 40)
    with pytest.raises(UserError, match="1\\+4n"):
        load_clips(shards, 16, 32)
    with pytest.raises(UserError, match="holds no shards"):
        ClipDataset(shards.parent, 17, 32)


def test_a_whole_split_in_memory(shards):
    clips = load_clips(shards, 17, 32, fps=8)
    assert clips.frames.shape == (6, 17, 32, 32, 3) and clips.frames.dtype == np.uint8 and clips.dropped == []
    assert clips.captions == [f"caption {i}" for i in range(6)] and clips.sources[4] == "4.mp4"
    for clip in clips.frames:
        assert indices(clip) == list(range(6, 23))  # the middle 17 of 29
    assert load_clips(shards, 5, (16, 32), fps=4, limit=2).frames.shape == (2, 5, 16, 32, 3)


def test_the_dataset_is_a_function_of_seed_epoch_and_index(shards):
    dataset = ClipDataset(shards, 17, 32, fps=8, seed=3)
    first = dataset[4]
    assert first["video"].shape == (3, 17, 32, 32) and first["video"].dtype == torch.uint8
    assert (first["caption"], first["source"], first["class_id"], first["replaced"]) == ("caption 4", "4.mp4", -1, 0)
    start = indices(first["video"].permute(1, 2, 3, 0).numpy())
    assert start == list(range(start[0], start[0] + 17))
    assert torch.equal(ClipDataset(shards, 17, 32, fps=8, seed=3)[4]["video"], first["video"])

    def starts(**settings) -> list[int]:
        data = ClipDataset(shards, 17, 32, fps=8, seed=settings["seed"])
        data.set_epoch(settings["epoch"])
        return [indices(data[i]["video"][:, :1].permute(1, 2, 3, 0).numpy())[0] for i in range(6)]

    drawn = [starts(seed=3, epoch=0), starts(seed=3, epoch=1), starts(seed=4, epoch=0)]
    assert drawn[0] == starts(seed=3, epoch=0) and drawn[0] != drawn[1] != drawn[2] and drawn[0] != drawn[2]


def test_a_loader_with_workers_sees_every_clip_once(shards):
    dataset = ClipDataset(shards, 5, 32)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, timeout=60)
    batches = list(loader)
    assert torch.cat([b["sample_index"] for b in batches]).tolist() == list(range(6))
    assert torch.equal(batches[1]["video"][1], dataset[3]["video"])


def test_a_bad_record_is_replaced_by_the_next_and_counted(with_a_bad_record):
    dataset = ClipDataset(with_a_bad_record, 17, 32)
    items = [dataset[i] for i in range(6)]
    assert [item["replaced"] for item in items] == [0, 0, 1, 0, 0, 0]
    assert items[2]["source"] == "3.mp4" and items[2]["sample_index"] == 2
    clips = load_clips(with_a_bad_record, 17, 32)
    assert clips.frames.shape[0] == 5 and [source for source, _ in clips.dropped] == ["2.mp4"]
    batches = ClipBatches(dataset, seed=0)
    batches(0, BatchSpec(5, 32, 6))  # all six records
    assert batches.replaced == 1


def test_too_long_a_clip_is_an_error_that_says_so(shards):
    with pytest.raises(UserError, match="29 frames are too few for 33"):
        ClipDataset(shards, 33, 32)[0]
    with pytest.raises(UserError, match="29 frames are too few for 33"):
        load_clips(shards, 33, 32)


def test_a_damaged_shard_stops_training(shards, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    shard = sorted(copy.rglob("*.mds"))[-1]
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1  # within the last record
    shard.write_bytes(content)
    dataset = ClipDataset(copy, 5, 32)
    with pytest.raises(UserError, match=shard.name):
        [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("kind", ["memory", "decoded"])
def test_batches_are_a_function_of_seed_and_step(shards, kind):
    source = load_clips(shards, 29, 32) if kind == "memory" else ClipDataset(shards, 17, 32)
    spec = BatchSpec(5, 32, 4)
    batch = ClipBatches(source, seed=1)(7, spec)
    assert batch.shape == (4, 3, 5, 32, 32) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1
    again = ClipBatches(source, seed=1, workers=2)
    again(3, spec)  # a batch between changes nothing: a run resumed at step 7 sees the same clips
    assert torch.equal(again(7, spec), batch)
    assert not torch.equal(again(8, spec), batch) and not torch.equal(ClipBatches(source, seed=2)(7, spec), batch)
    # consecutive frames, in order
    seen = indices(((batch[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy())
    assert seen == list(range(seen[0], seen[0] + 5))


def test_ranks_share_a_batch_without_overlap():
    clips = np.arange(8, dtype=np.uint8)[:, None, None, None, None] * np.ones((8, 5, 16, 16, 3), np.uint8)
    whole = ClipBatches(clips, seed=0)(4, BatchSpec(5, 16, 8))
    parts = [ClipBatches(clips, seed=0, rank=rank, world_size=2)(4, BatchSpec(5, 16, 8)) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    values = ((whole[:, 0, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(values) == list(range(8))  # no clip twice


def test_smaller_batches_are_scaled_with_antialiasing(shards):
    stripes = np.zeros((1, 5, 64, 64, 3), np.uint8)
    stripes[:, :, :, ::2] = 255
    small = ClipBatches(stripes, seed=0)(0, BatchSpec(1, 32, 1))
    assert small.shape == (1, 3, 1, 32, 32) and small.abs().max() < 0.6
    with pytest.raises(UserError, match="batches of 9 frames can't be cut from clips of 5"):
        ClipBatches(stripes, seed=0)(0, BatchSpec(9, 64, 1))


def test_the_split_is_fixed_by_its_seed():
    train, held_out = split_clips(101, 0.1, seed=3)
    assert len(held_out) == 11 and sorted([*train, *held_out]) == list(range(101))
    again = split_clips(101, 0.1, seed=3)
    assert (again[0] == train).all() and (again[1] == held_out).all()
    assert set(split_clips(101, 0.1, seed=4)[1]) != set(held_out)
    assert len(split_clips(101, 0.0, seed=3)[1]) == 0 and len(split_clips(2, 0.9, seed=3)[0]) == 1


def test_batches_of_a_split_hold_its_clips_only_and_say_which(shards):
    clips = load_clips(shards, 5, 32)
    batches = ClipBatches(clips, seed=0, indices=np.array([1, 3, 4]))
    assert len(batches) == 3
    names = {name for step in range(8) for name in batches.names(step, BatchSpec(5, 32, 2))}
    assert names == {clips.sources[index] for index in (1, 3, 4)}
    decoded = ClipBatches(ClipDataset(shards, 5, 32), seed=0, indices=np.array([1, 3, 4]))
    assert decoded.names(2, BatchSpec(5, 32, 2)) == batches.names(2, BatchSpec(5, 32, 2))
    parts = [ClipBatches(clips, 0, rank, 2, indices=np.arange(4)).names(5, BatchSpec(5, 32, 4)) for rank in range(2)]
    assert sum(parts, []) == ClipBatches(clips, 0, indices=np.arange(4)).names(5, BatchSpec(5, 32, 4))
    whole = torch.cat(list(batches.in_order(BatchSpec(5, 32, 2), limit=3)))
    assert whole.shape == (3, 3, 5, 32, 32) and torch.equal(
        whole, torch.cat(list(batches.in_order(BatchSpec(5, 32, 2), limit=9)))
    )
