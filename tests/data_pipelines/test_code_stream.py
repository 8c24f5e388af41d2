"""Training batches: exact resume, data parallelism, proportions, reshuffling."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.code_stream import CodeStream, ShuffledRows, Source, collate
from data_pipelines.codes import CodeDataset
from tests.data_pipelines.code_folders import SCHEDULE, write_code_folder
from tokenizer import UserError


@pytest.fixture
def mix(tmp_path: Path) -> list[Source]:
    write_code_folder(tmp_path / "a", [3, 4, 2, 4], seed=1)
    write_code_folder(tmp_path / "b", [5], seed=2)
    return [
        Source(str(tmp_path / "a"), 3, 0.5),
        Source(str(tmp_path / "a"), 1, 0.25),
        Source(str(tmp_path / "b"), 2, 0.25),
    ]


def seen(stream: CodeStream, batches: int) -> list[tuple]:
    """What tells batches apart: shape, clips, epochs, bits and text."""
    return [
        (
            batch.tokens.shape[1],
            batch.sample_index.tolist(),
            batch.epoch.tolist(),
            int(batch.tokens.sum()),
            float(batch.text.sum()),
        )
        for batch in islice(stream, batches)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_five_and_five_equal_ten(mix: list[Source], workers: int):
    whole = seen(CodeStream(mix, 4, seed=7), 10)
    first = CodeStream(mix, 4, seed=7, num_workers=workers)
    assert seen(first, 5) == whole[:5]
    state = first.state_dict()
    assert sum(state["samples"]) == 20 and first.step == 5
    seen(first, 2)  # what is read after the checkpoint leaves no trace
    second = CodeStream(mix, 4, seed=7, num_workers=workers)
    second.load_state_dict(state)
    assert seen(second, 5) == whole[5:]
    assert seen(CodeStream(mix, 4, seed=8), 10) != whole


def test_each_source_may_have_a_batch_size_of_its_own(mix: list[Source]):
    sized = [replace(source, batch_size=clips) for source, clips in zip(mix, (2, 6, 4))]
    whole = list(islice(CodeStream(sized, 99, seed=3), 20))
    assert {(batch.tokens.shape[1], len(batch)) for batch in whole} == {(3, 2), (1, 6), (2, 4)}
    frames = [batch.tokens.shape[1] for batch in whole]
    assert [frames.count(number) for number in (3, 1, 2)] == [10, 5, 5]  # proportions are shares of the steps
    alone = CodeStream(sized, 99, seed=3)
    seen(alone, 7)
    assert alone.step == 7
    for rank in range(2):
        half = CodeStream(sized, 99, rank=rank, size=2, seed=3, num_workers=rank)
        half.load_state_dict(alone.state_dict())
        for batch, expected in zip(islice(half, 8), whole[7:]):
            part = expected.rows(rank * len(batch), (rank + 1) * len(batch))
            assert torch.equal(batch.sample_index, part.sample_index) and torch.equal(batch.tokens, part.tokens)
        half.close()
    with pytest.raises(UserError, match="global batch of 6 clips can't be shared by 4"):
        CodeStream(sized[1:], 99, size=4)


def test_two_ranks_read_the_halves_of_the_same_batches_also_after_a_resume(mix: list[Source]):
    whole = list(islice(CodeStream(mix, 4, seed=3), 8))
    alone = CodeStream(mix, 4, seed=3)
    seen(alone, 3)
    for rank in range(2):
        half = CodeStream(mix, 4, rank=rank, size=2, seed=3)
        half.load_state_dict(alone.state_dict())
        for batch, expected in zip(islice(half, 5), whole[3:]):
            part = expected.rows(2 * rank, 2 * rank + 2)
            assert len(batch) == 2
            assert torch.equal(batch.sample_index, part.sample_index) and torch.equal(batch.tokens, part.tokens)
            assert torch.equal(batch.latents, part.latents) and torch.equal(batch.text, part.text)
        assert half.state_dict()["samples"] != alone.state_dict()["samples"]
        assert sum(half.state_dict()["samples"]) == 8 * 4  # counted over all ranks


def test_ranks_come_from_the_arguments_alone(mix: list[Source], monkeypatch: pytest.MonkeyPatch):
    expected = seen(CodeStream(mix, 4), 3)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # ranks of one tensor-parallel group read the same clips
    assert seen(CodeStream(mix, 4), 3) == expected


def test_proportions_are_exact_and_batches_have_one_shape(mix: list[Source]):
    stream = CodeStream(mix, 2)
    frames = []
    for step, batch in enumerate(islice(stream, 40), start=1):
        frames.append(batch.tokens.shape[1])
        assert batch.tokens.shape == (2, frames[-1], 5, 8) and batch.latents.shape == (2, frames[-1], 8, 2, 2)
        for source, share in zip(range(3), (0.5, 0.25, 0.25)):
            assert abs(stream.samples[source] / 2 - share * step) < 1
    assert {count: frames.count(count) for count in (3, 1, 2)} == {3: 20, 1: 10, 2: 10}


def test_every_epoch_has_every_clip_once_in_another_order(tmp_path: Path):
    write_code_folder(tmp_path, [3, 4, 2, 4])
    stream = CodeStream([Source(str(tmp_path), 3)], 13, shards_per_window=2)  # 13 clips: an epoch a batch
    epochs = [batch.sample_index.tolist() for batch in islice(stream, 3)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    straddling = next(iter(CodeStream([Source(str(tmp_path), 3)], 20)))
    assert straddling.epoch.tolist() == [0] * 13 + [1] * 7


def test_images_and_clips_of_one_folder_have_different_sample_numbers(mix: list[Source]):
    numbers = {1: set(), 3: set(), 2: set()}
    for batch in islice(CodeStream(mix, 4), 24):
        numbers[batch.tokens.shape[1]] |= set(batch.sample_index.tolist())
    assert numbers == {3: set(range(13)), 1: set(range(13, 26)), 2: set(range(26, 31))}


def test_a_window_keeps_few_shards_in_use():
    rows = np.full(20, 10)
    order = ShuffledRows(rows, key=(0, 0), shards_per_window=4)
    epoch = [order[position] for position in range(200)]
    assert sorted(row for _, row in epoch) == list(range(200)) and {number for number, _ in epoch} == {0}
    for window in range(5):
        shards = {row // 10 for _, row in epoch[40 * window : 40 * window + 40]}
        assert len(shards) == 4
    assert [order[200 + position][0] for position in (0, 199, 200)] == [1, 1, 2]
    assert [row for _, row in epoch] != [order[200 + position][1] for position in range(200)]
    stored = ShuffledRows(rows, key=(0, 0), shards_per_window=0)
    assert [stored[position] for position in (0, 7, 201)] == [(0, 0), (0, 7), (1, 1)]


def test_the_order_never_changes_between_versions():
    order = ShuffledRows(np.array([4, 4]), key=(5, 0), shards_per_window=2)
    assert [order[position][1] for position in range(8)] == [
        4,
        5,
        7,
        1,
        6,
        3,
        2,
        0,
    ]  # a saved position must mean the same for ever


def test_texts_are_padded_and_cut(tmp_path: Path):
    clips = write_code_folder(tmp_path, [5])
    dataset = CodeDataset(tmp_path)
    batch = collate([dataset[row] for row in range(5)], 3, SCHEDULE)
    assert batch.text_lengths.tolist() == [0, 1, 2, 3, 3] and batch.text.shape == (5, 3, 4)
    np.testing.assert_array_equal(batch.text[4].numpy(), clips[4]["text"][:3].astype(np.float32))
    assert batch.text[1, 1:].abs().sum() == 0 and batch.class_ids.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(batch.codes.tokens(), batch.tokens)
    assert batch.to("cpu").schedule == SCHEDULE and batch.epoch.tolist() == [0] * 5


def test_what_cannot_be_resumed_or_divided_is_refused(mix: list[Source]):
    state = CodeStream(mix, 4, seed=1).state_dict()
    for other, name in ((CodeStream(mix, 4, seed=2), "seed"), (CodeStream(mix, 8, seed=1), "batch_sizes"),
                        (CodeStream(mix[:2], 4, seed=1), "sources")):  # fmt: skip
        with pytest.raises(UserError, match=f"'{name}' has changed"):
            other.load_state_dict(state)
    with pytest.raises(UserError, match="can't be shared by 3"):
        CodeStream(mix, 4, size=3)
    with pytest.raises(UserError, match="at least one source"):
        CodeStream([], 4)
    with pytest.raises(UserError, match="made by the tokenizer a, not by b"):
        CodeStream(mix, 4, fingerprint="b")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_stops_the_stream_and_names_it(mix: list[Source], workers: int):
    stream = CodeStream(mix[2:], 5, num_workers=workers)
    file = Path(mix[2].path, "00000", "shard.00000.mds")
    file.unlink()
    with pytest.raises(UserError, match="00000/shard.00000.mds can't be read"):
        next(stream)
