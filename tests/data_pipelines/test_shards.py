"""Packing: layouts, rejected files, and outputs that are whole or absent."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from data_pipelines.probe import probe
from data_pipelines.random_access import ShardFolder
from data_pipelines.shards import ShardsConfig, find_sources, read_shards_receipt, write_shards
from tests.data_pipelines.media import cut, write_audio, write_video
from tokenizer.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Five good videos, five bad ones, and a table that lists them and a sixth that is not there."""
    folder = tmp_path_factory.mktemp("corpus")
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3)).astype(np.uint8)
    for i in range(5):
        write_video(folder / "videos" / f"good{i}.mp4", frames=17 + i)
    (folder / "videos" / "empty.mp4").touch()
    write_audio(folder / "videos" / "sound.mp4")
    write_video(folder / "videos" / "short.mp4", frames=16)
    cut(write_video(folder / "videos" / "no_index.mp4", images=noise), 0.5)
    cut(write_video(folder / "videos" / "cut.mkv", images=noise), 0.5)
    names = [*(f"good{i}" for i in range(5)), "empty", "sound", "short", "no_index", "gone"]
    lines = ["number,path,caption", *(f'{n},videos/{name}.mp4,"clip, {name}"' for n, name in enumerate(names))]
    (folder / "clips.csv").write_text("\n".join([*lines, "10,videos/cut.mkv,clip cut"]) + "\n")
    return folder


def test_a_table_with_bad_rows(corpus, tmp_path):
    out = tmp_path / "shards"
    receipt = write_shards(corpus / "clips.csv", out, ShardsConfig(shard_size="6kb", workers=2))
    assert (receipt["clips"], receipt["rejected"]) == (5, 6)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    reasons = {Path(entry["source"]).stem: entry["reason"] for entry in rejected}
    assert reasons["gone"] == "missing file" and reasons["empty"] == "empty file"
    assert reasons["sound"] == "no video stream" and reasons["short"] == "too short (16 frames, 17 wanted)"
    assert reasons["no_index"].startswith("corrupt") and len(reasons) == 6
    assert sum(receipt["reasons"].values()) == 6 and receipt["reasons"]["missing file"] == 1
    folder = ShardFolder(out)
    assert len(folder) == 5 and receipt["shards"] == len(folder.shards) > 1
    for i in range(5):
        record = folder[i]
        path = corpus / record["source"]
        assert record["caption"] == f"clip, good{i}" and record["class_id"] == -1
        assert bytes(record["video"]) == path.read_bytes()  # as they came
        info = probe(path)
        assert (record["frames"], record["width"], record["height"], record["codec"]) == (17 + i, 64, 48, "h264")
        assert record["fps"] == pytest.approx(8)
        np.testing.assert_array_equal(record["timestamps"], info.timestamps)
    assert read_shards_receipt(out) == receipt


def test_written_once_and_the_same_bytes_each_time(corpus, tmp_path):
    options = ShardsConfig(shard_size="6kb")
    first = write_shards(corpus / "clips.csv", tmp_path / "a", options)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "a").iterdir()}
    assert write_shards(corpus / "clips.csv", tmp_path / "a", options) == first
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "a").iterdir()} == before
    write_shards(corpus / "clips.csv", tmp_path / "b", ShardsConfig(shard_size="6kb", workers=3))
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == {k: v[1] for k, v in before.items()}
    with pytest.raises(UserError, match=r"other arguments \(min_frames\)"):
        write_shards(corpus / "clips.csv", tmp_path / "a", ShardsConfig(min_frames=5, shard_size="6kb"))
    assert write_shards(corpus / "clips.csv", tmp_path / "c", ShardsConfig(min_frames=5))["clips"] == 6


def test_folder_layouts(corpus, tmp_path):
    assert len(find_sources(corpus)[0]) == 11  # the folder's one table
    sources, classes = find_sources(corpus / "videos")
    assert len(sources) == 10 and classes == [] and {s.caption for s in sources} == {""}
    (one,), classes = find_sources(corpus / "videos" / "good1.mp4")
    assert (one.path, one.name, one.caption, classes) == (corpus / "videos" / "good1.mp4", "good1.mp4", "", [])
    for name in ("YoYo/v_YoYo_g01_c01", "Archery/v_Archery_g01_c02", "Archery/v_Archery_g01_c01"):
        write_video(tmp_path / "ucf" / f"{name}.avi", codec="mpeg4")
    receipt = write_shards(tmp_path / "ucf", tmp_path / "out")
    assert receipt["clips"] == 3 and receipt["classes"] == ["Archery", "YoYo"]
    folder = ShardFolder(tmp_path / "out")
    found = [(folder[i]["source"], folder[i]["caption"], folder[i]["class_id"], folder[i]["codec"]) for i in range(3)]
    assert found == [
        ("Archery/v_Archery_g01_c01.avi", "Archery", 0, "mpeg4"),
        ("Archery/v_Archery_g01_c02.avi", "Archery", 0, "mpeg4"),
        ("YoYo/v_YoYo_g01_c01.avi", "YoYo", 1, "mpeg4"),
    ]


def test_input_that_cannot_be_used(corpus, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="nowhere does not exist"):
        write_shards(tmp_path / "nowhere", out)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="holds no videos"):
        write_shards(tmp_path / "void", out)
    (tmp_path / "odd.csv").write_text("path,text\na.mp4,hello\n")
    with pytest.raises(UserError, match="no column caption"):
        write_shards(tmp_path / "odd.csv", out)
    (tmp_path / "bad.csv").write_text("path,caption\na.mp4,hello\nb.mp4,you\n")
    with pytest.raises(UserError, match=r"no video of .* can be used \(2 missing file\)"):
        write_shards(tmp_path / "bad.csv", out)
    with pytest.raises(UserError, match="'large' is no shard_size"):
        write_shards(corpus / "clips.csv", out, ShardsConfig(shard_size="large"))
    assert not out.exists() and not list(tmp_path.glob("out.tmp*"))  # nothing half-written stays
    out.mkdir()
    (out / "index.json").write_text("{}")
    with pytest.raises(UserError, match="was not written by this command"):
        write_shards(corpus / "clips.csv", out)
    with pytest.raises(UserError, match="holds no finished raw shards"):
        read_shards_receipt(out)


def _write_and_die(table: Path, out: Path) -> None:
    written = 0
    original = MDSWriter.write

    def write(self, sample):
        nonlocal written
        original(self, sample)
        written += 1
        if written == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    MDSWriter.write = write  # type: ignore[method-assign]
    write_shards(table, out, ShardsConfig(shard_size="6kb", workers=1))


def test_a_killed_run_leaves_nothing_that_counts(corpus, tmp_path):
    out = tmp_path / "shards"
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(corpus / "clips.csv", out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.glob("shards.tmp.*"))) == 1  # half-written, under another name
    assert write_shards(corpus / "clips.csv", out, ShardsConfig(shard_size="6kb"))["clips"] == 5
    assert len(ShardFolder(out)) == 5


def test_a_damaged_shard_is_an_error(corpus, tmp_path):
    out = tmp_path / "shards"
    write_shards(corpus / "clips.csv", out, ShardsConfig(shard_size="6kb"))
    shard = sorted(out.glob("*.mds"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=shard.name):
        folder = ShardFolder(out)
        for row in range(len(folder)):
            folder[row]
