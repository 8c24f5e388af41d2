"""The code dataset: exact contents, prefixes, refusals and damaged shards; one cache for several processes."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.codes import CodeDataset, CodeFolder, Manifest
from data_pipelines.random_access import ShardFolder
from tests.data_pipelines.code_folders import DIM, FRAMES, SCHEDULE, write_code_folder
from tests.pretrain.tiny import write_codes
from tokenizer import UserError


def test_records_come_back_exactly(tmp_path: Path):
    clips = write_code_folder(tmp_path, [3, 4])
    dataset = CodeDataset(tmp_path, expected_fingerprint="a")
    assert len(dataset) == 7 and dataset.schedule == SCHEDULE
    for number in (6, 0, 3):
        item, clip = dataset[number], clips[number]
        assert item["tokens"].dtype == torch.bool and torch.equal(item["tokens"], clip["tokens"])
        assert item["latent"].dtype == torch.float32 and torch.equal(item["latent"], clip["latent"].float())
        np.testing.assert_array_equal(item["text"].numpy(), clip["text"].astype(np.float32))
        assert (item["caption"], item["class_id"], item["sample_index"]) == (f"clip {number}", number % 3, number)
    # 5 tokens of 8 bits: 5 bytes a frame, as DESIGN section 5 counts them
    assert len(dataset.shards[0]["packed"]) == FRAMES * SCHEDULE.tokens_per_frame * DIM // 8 == 15


def test_a_prefix_of_frames(tmp_path: Path):
    clips = write_code_folder(tmp_path, [2])
    item = CodeDataset(tmp_path, num_frames=1)[1]
    assert torch.equal(item["tokens"], clips[1]["tokens"][:1])
    assert torch.equal(item["latent"], clips[1]["latent"][:1].float())
    with pytest.raises(UserError, match="3 latent frames, 4 were asked for"):
        CodeDataset(tmp_path, num_frames=4)


def test_several_shapes_in_one_folder(tmp_path: Path):
    write_codes(tmp_path, "a", clips=4, others=((4, 2, 3),))
    folder = CodeFolder(tmp_path)
    small, large = (CodeDataset(folder, bucket=number) for number in (0, 1))
    assert [len(small), len(large)] == [4, 3] and large.rows_per_shard.tolist() == [3]
    assert small[3]["tokens"].shape == (3, 5, 8) and large[0]["tokens"].shape == (2, 17, 8)
    assert [large[row]["caption"] for row in range(3)] == ["clip 0", "clip 1", "clip 2"]
    for dataset in (small, large):
        with pytest.raises(IndexError):
            dataset[len(dataset)]
    with pytest.raises(UserError, match="clips of 2 shapes: name one"):
        CodeDataset(tmp_path)


def test_without_latents(tmp_path: Path):
    write_code_folder(tmp_path, [2], latents=False)
    assert CodeDataset(tmp_path)[0]["latent"] is None


def test_codes_of_another_tokenizer_or_unfinished_ones_are_refused(tmp_path: Path):
    write_code_folder(tmp_path, [2], fingerprint="theirs")
    with pytest.raises(UserError, match="made by the tokenizer theirs, not by ours"):
        CodeDataset(tmp_path, expected_fingerprint="ours")
    (tmp_path / "codes.json").unlink()
    with pytest.raises(UserError, match="codes.json is missing"):
        CodeDataset(tmp_path)
    with pytest.raises(UserError, match="codes.json is missing"):
        CodeDataset(tmp_path / "nowhere")


def test_another_format_and_a_damaged_manifest_are_refused(tmp_path: Path):
    write_code_folder(tmp_path, [2])
    content = (tmp_path / "codes.json").read_text()
    (tmp_path / "codes.json").write_text(content.replace('"format": 2', '"format": 3'))
    with pytest.raises(UserError, match="format 3"):
        Manifest.read(tmp_path)
    (tmp_path / "codes.json").write_text(content[:50])
    with pytest.raises(UserError, match="can't be read"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_missing_or_damaged_shard_is_an_error_that_names_it(tmp_path: Path, damage: str):
    write_code_folder(tmp_path, [3, 3, 3])
    file = tmp_path / "00001" / "shard.00000.mds"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        content[-20] ^= 1
        file.write_bytes(content)
    dataset = CodeDataset(tmp_path)
    assert dataset[2]["caption"] == "clip 2" and dataset[6]["caption"] == "clip 6"
    with pytest.raises(UserError, match="00001/shard.00000.mds can't be read"):
        dataset[4]


def test_a_shard_that_goes_while_it_is_in_use(tmp_path: Path):
    write_code_folder(tmp_path, [3])
    dataset = CodeDataset(tmp_path)
    assert dataset[0]["class_id"] == 0
    (tmp_path / "00000" / "shard.00000.mds").unlink()
    with pytest.raises(UserError, match="it is missing"):
        dataset[1]


def test_a_cache_fetches_what_is_asked_for_and_fetches_it_again(tmp_path: Path):
    clips = write_code_folder(tmp_path / "far", [3, 3])
    dataset = CodeDataset(tmp_path / "far", cache=tmp_path / "near")
    assert not list((tmp_path / "near").rglob("*.mds"))
    assert torch.equal(dataset[4]["tokens"], clips[4]["tokens"])
    assert [file.parent.name for file in (tmp_path / "near").rglob("*.mds")] == ["00001"]
    shutil.rmtree(tmp_path / "near" / "00001")  # evicted by somebody
    assert torch.equal(dataset[5]["tokens"], clips[5]["tokens"])
    write_code_folder(tmp_path / "other", [1], fingerprint="b")
    with pytest.raises(UserError, match="holds other codes"):
        CodeDataset(tmp_path / "other", cache=tmp_path / "near")


def test_pickled_for_worker_processes_and_bounds(tmp_path: Path):
    write_code_folder(tmp_path, [2, 2])
    folder = pickle.loads(pickle.dumps(ShardFolder(tmp_path)))
    assert [folder[row]["caption"] for row in range(4)] == [f"clip {row}" for row in range(4)]
    with pytest.raises(IndexError):
        folder[4]
    with pytest.raises(UserError, match="name a local folder as its cache"):
        ShardFolder("s3://bucket/codes")
