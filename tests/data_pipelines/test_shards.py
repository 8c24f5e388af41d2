"""Packing: layouts, rejected files, and outputs that are whole or absent."""

import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter

from data_pipelines import shard_part
from data_pipelines import shards as shards_module
from data_pipelines.clips import read_clip
from data_pipelines.decode import choose_decoder
from data_pipelines.probe import VideoInfo, probe
from data_pipelines.random_access import ShardFolder
from data_pipelines.shard_part import ShardsConfig
from data_pipelines.shards import read_shards_receipt, write_shards
from data_pipelines.sources import find_sources
from tests.data_pipelines.media import cut, write_audio, write_video
from tokenizer.errors import UserError
from tokenizer.progress import Meter


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
    receipt = write_shards(corpus / "clips.csv", out, ShardsConfig(shard_size="6kb", workers=2, part_files=4))
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
        assert record["fps"] == pytest.approx(8) and record["rotation"] == 0
        assert record["size"] == path.stat().st_size
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        np.testing.assert_array_equal(record["timestamps"], info.timestamps)
    assert read_shards_receipt(out) == receipt


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_written_once_and_the_same_bytes_each_time(corpus, tmp_path):
    options = ShardsConfig(shard_size="6kb", part_files=3)
    first = write_shards(corpus / "clips.csv", tmp_path / "a", options)
    before, times = content(tmp_path / "a"), {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    assert write_shards(corpus / "clips.csv", tmp_path / "a", options) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == times
    write_shards(corpus / "clips.csv", tmp_path / "b", dataclasses.replace(options, workers=3))
    assert content(tmp_path / "b") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # neither locks nor unfinished folders
    with pytest.raises(UserError, match=r"other arguments \(min_frames\)"):
        write_shards(corpus / "clips.csv", tmp_path / "a", dataclasses.replace(options, min_frames=5))
    assert write_shards(corpus / "clips.csv", tmp_path / "c", ShardsConfig(min_frames=5))["clips"] == 6


def test_images_and_videos_by_a_jsonl_table(corpus, tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (40, 56, 3)).astype(np.uint8)
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp"):
        Image.fromarray(picture).save(tmp_path / name, quality=95)
    cut(tmp_path / "a.png", 1.0).rename(tmp_path / "whole.png")
    Image.fromarray(picture).save(tmp_path / "cut.png")
    cut(tmp_path / "cut.png", 0.4)
    (tmp_path / "not.jpg").write_text("no picture")
    names = ["whole.png", "b.jpg", "c.webp", "d.bmp", "cut.png", "not.jpg", str(corpus / "videos" / "good0.mp4")]
    rows = [json.dumps({"path": name, "caption": f"this is {Path(name).name}"}) for name in names]
    (tmp_path / "mixed.jsonl").write_text("\n".join([rows[0], "", *rows[1:], '{"path": "gone.mp4", "caption": null}']))
    receipt = write_shards(tmp_path, tmp_path / "out")  # the folder's one table
    assert (receipt["clips"], receipt["rejected"]) == (5, 3)
    folder, decoder = ShardFolder(tmp_path / "out"), choose_decoder()
    for row, name in enumerate(["whole.png", "b.jpg", "c.webp", "d.bmp"]):
        record = folder[row]
        assert (record["source"], record["caption"], record["frames"]) == (name, f"this is {name}", 1)
        assert (record["width"], record["height"]) == (56, 40)
        shown = read_clip(record, decoder, 1, 32, 48)[0]
        wanted = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)
        assert abs(shown.astype(int).mean((0, 1)) - wanted.mean((0, 1))).max() < 8  # the same picture, cropped
    assert folder[4]["frames"] == 17
    rejected = {json.loads(line)["source"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()}
    assert rejected == {"cut.png", "not.jpg", "gone.mp4"}
    half = '{"path": "half.mp4", "caption": "a \\ud83d"}'  # of an emoji
    (tmp_path / "half.jsonl").write_text(rows[0] + "\n" + half)
    assert write_shards(tmp_path / "half.jsonl", tmp_path / "half")["reasons"] == {
        "name or caption is no valid text": 1
    }
    for line in ("[1]", "{", '{"path": "a.mp4"}', '{"path": 3, "caption": ""}'):
        (tmp_path / "bad.jsonl").write_text(rows[0] + "\n" + line + "\n")
        with pytest.raises(UserError, match=r"line 2 of .*bad\.jsonl"):
            find_sources(tmp_path / "bad.jsonl")


def test_files_over_the_limit_are_not_read(corpus, tmp_path):
    size = (corpus / "videos" / "good2.mp4").stat().st_size
    receipt = write_shards(corpus / "clips.csv", tmp_path / "out", ShardsConfig(max_size=f"{size}b"))
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    large = {entry["source"] for entry in rejected if entry["reason"].startswith("too large (")}
    assert "videos/good4.mp4" in large and "videos/good2.mp4" not in large
    assert receipt["reasons"]["too large"] == len(large)


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
    (tmp_path / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n")
    split = ShardsConfig(split=(str(tmp_path / "testlist01.txt"),))
    receipt = write_shards(tmp_path / "ucf", tmp_path / "test", split)
    assert receipt["clips"] == 1 and receipt["classes"] == ["Archery", "YoYo"]
    assert ShardFolder(tmp_path / "test")[0]["class_id"] == 1
    with pytest.raises(UserError, match="was written with other arguments"):
        write_shards(tmp_path / "ucf", tmp_path / "out", split)
    (tmp_path / "testlist01.txt").write_text("YoYo/v_YoYo_g09_c01.avi\n")
    with pytest.raises(UserError, match="1 of the 1 videos of testlist01.txt are not there"):
        write_shards(tmp_path / "ucf", tmp_path / "other", split)


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
    for size in ("large", "0b", "-3mb", "4gb"):
        with pytest.raises(UserError, match=f"'{size}' is no shard_size"):
            write_shards(corpus / "clips.csv", out, ShardsConfig(shard_size=size))
    with pytest.raises(UserError, match="workers is -1: it must be at least 0"):
        ShardsConfig(workers=-1)
    (tmp_path / "comma.csv").write_text("path,caption\na.mp4,one, two\n")
    with pytest.raises(UserError, match=r"line 2 of .*comma.csv has more values than columns"):
        write_shards(tmp_path / "comma.csv", out)
    (tmp_path / "pathless.csv").write_text("path,caption\na.mp4,one\n,two\n")
    with pytest.raises(UserError, match=r"line 3 of .*pathless.csv has no path"):
        write_shards(tmp_path / "pathless.csv", out)
    (tmp_path / "latin.csv").write_bytes(b"path,caption\n" + b"a.mp4,one\n" * 9000 + b"b.mp4,caf\xe9\n")
    with pytest.raises(UserError, match="latin.csv can't be read as a table in UTF-8"):
        write_shards(tmp_path / "latin.csv", out)
    assert not out.exists() and not list(tmp_path.glob("out.*"))  # nothing half-written stays
    out.mkdir()
    (out / "index.json").write_text("{}")
    with pytest.raises(UserError, match="was not written by this command"):
        write_shards(corpus / "clips.csv", out)
    with pytest.raises(UserError, match="holds no finished raw shards"):
        read_shards_receipt(out)


def _write_and_die(table: Path, out: Path) -> None:
    """Dies when three parts are whole and the fourth is being read, like a machine's driver that is killed."""
    read = shard_part.probe

    def slow(*arguments: Any) -> VideoInfo:
        if len(list(out.parent.glob("*.unfinished/0*/part.json"))) >= 3:
            time.sleep(1.5)
        return read(*arguments)

    def advance(meter: Meter, *unused: Any) -> None:
        if len(list(out.parent.glob("*.unfinished/0*/part.json"))) >= 3:
            os.kill(os.getpid(), signal.SIGKILL)

    shard_part.probe, Meter.advance = slow, advance  # type: ignore[assignment]
    write_shards(table, out, SMALL_PARTS)


SMALL_PARTS = ShardsConfig(shard_size="6kb", part_files=2, workers=1)


def test_a_killed_run_goes_on_with_what_is_missing(corpus, tmp_path):
    out, left = tmp_path / "shards", tmp_path / "shards.unfinished"
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(corpus / "clips.csv", out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    kept = {p: p.stat().st_mtime_ns for p in left.glob("0*/*")}
    assert len(list(left.glob("0*/part.json"))) >= 3
    # the process of the fourth part is still at work; the next run waits until it has noticed
    assert write_shards(corpus / "clips.csv", out, SMALL_PARTS)["clips"] == 5
    assert not left.exists()
    assert all((out / p.relative_to(left)).stat().st_mtime_ns == time for p, time in kept.items())
    write_shards(corpus / "clips.csv", tmp_path / "undisturbed", SMALL_PARTS)
    assert content(out) == content(tmp_path / "undisturbed")


def test_what_another_run_has_left_is_not_mixed_in(corpus, tmp_path, monkeypatch):
    left = tmp_path / "out.unfinished"
    (left / "00000").mkdir(parents=True)
    (left / "00000" / "part.json").write_text('{"rows": 9, "rejected": []}')
    (left / "arguments.json").write_text("{}")
    assert write_shards(corpus / "clips.csv", tmp_path / "out", SMALL_PARTS)["clips"] == 5
    (tmp_path / "mine.unfinished").mkdir()
    with pytest.raises(UserError, match="mine.unfinished exists and was not written by this command"):
        write_shards(corpus / "clips.csv", tmp_path / "mine", SMALL_PARTS)
    monkeypatch.setattr(shards_module, "LOCK_WAIT", 0)
    with open(tmp_path / "busy.unfinished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing .*busy"):
            write_shards(corpus / "clips.csv", tmp_path / "busy", SMALL_PARTS)


def test_two_runs_at_once_make_one_folder(corpus, tmp_path):
    arguments = (corpus / "clips.csv", tmp_path / "out", SMALL_PARTS)
    runs = [multiprocessing.get_context("fork").Process(target=write_shards, args=arguments) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(ShardFolder(tmp_path / "out")) == 5


def test_a_run_that_was_killed_just_before_its_end_only_needs_its_name(corpus, tmp_path):
    receipt = write_shards(corpus / "clips.csv", tmp_path / "out", SMALL_PARTS)
    (tmp_path / "out").rename(tmp_path / "out.unfinished")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.unfinished").iterdir()}
    assert write_shards(corpus / "clips.csv", tmp_path / "out", SMALL_PARTS) == receipt
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times


def test_one_file_alone_and_a_folder_with_odd_characters(corpus, tmp_path):
    out = tmp_path / "a #1?" / "shards"
    assert write_shards(corpus / "videos" / "good0.mp4", out)["clips"] == 1
    assert write_shards(corpus / "clips.csv", out.with_name("more"), ShardsConfig(part_files=1))["clips"] == 5
    assert [ShardFolder(out.with_name("more"))[row]["frames"] for row in range(5)] == [17, 18, 19, 20, 21]


def test_a_file_that_kills_the_decoder_is_listed(corpus, tmp_path, monkeypatch):
    poison = (corpus / "videos" / "good3.mp4").read_bytes()

    def deadly(video: bytes, *rest: int) -> VideoInfo:
        if video == poison:
            os.kill(os.getpid(), signal.SIGSEGV)
        return probe(video, *rest)

    monkeypatch.setattr(shard_part, "probe", deadly)  # the parts' processes are forks of this one
    receipt = write_shards(corpus / "clips.csv", tmp_path / "out", ShardsConfig(part_files=4))
    assert receipt["clips"] == 4 and receipt["reasons"]["crashed the decoder"] == 1
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {"source": "videos/good3.mp4", "reason": "crashed the decoder (SIGSEGV)"} in rejected


def test_a_process_that_was_killed_from_outside_condemns_no_file(corpus, tmp_path, monkeypatch):
    def hungry(video: bytes, *rest: int) -> VideoInfo:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return probe(video, *rest)

    monkeypatch.setattr(shard_part, "probe", hungry)
    with pytest.raises(UserError, match="killed by SIGKILL at videos/good0.mp4: if memory ran out, .* fewer --workers"):
        write_shards(corpus / "clips.csv", tmp_path / "out", ShardsConfig(part_files=4, workers=1))
    monkeypatch.undo()
    assert write_shards(corpus / "clips.csv", tmp_path / "out", ShardsConfig(part_files=4))["clips"] == 5


def test_no_space_left_is_one_sentence_and_keeps_the_parts_that_are_whole(corpus, tmp_path, monkeypatch):
    def full(writer: MDSWriter, sample: dict) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))
        original(writer, sample)

    original = MDSWriter.write
    monkeypatch.setattr(MDSWriter, "write", full)
    with pytest.raises(UserError, match=r"00000 could not be written \(File too large\): mend that and start again"):
        write_shards(corpus / "clips.csv", tmp_path / "out", SMALL_PARTS)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(MDSWriter, "write", original)
    assert write_shards(corpus / "clips.csv", tmp_path / "out", SMALL_PARTS)["clips"] == 5


def test_a_damaged_shard_is_an_error(corpus, tmp_path):
    out = tmp_path / "shards"
    write_shards(corpus / "clips.csv", out, ShardsConfig(shard_size="6kb"))
    shard = sorted(out.rglob("*.mds"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=shard.name):
        folder = ShardFolder(out)
        for row in range(len(folder)):
            folder[row]
