"""Pre-encoding with real Ray actors, real mp4 files and a real (small, random) tokenizer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from streaming import MDSWriter

from data_pipelines import encode_pool
from data_pipelines.clips import read_clip
from data_pipelines.code_stream import CodeStream, Source
from data_pipelines.codes import CodeDataset
from data_pipelines.decode import choose_decoder
from data_pipelines.encode import EncodeConfig, EncodeSummary, encode, make_job
from data_pipelines.encode_pool import EncodeActor, EncoderPool, start_ray
from data_pipelines.encode_worker import Job, ShardEncoder, Task
from data_pipelines.moving_shapes import write_corpus
from data_pipelines.random_access import ShardFolder
from data_pipelines.shard_part import COLUMNS, ShardsConfig
from data_pipelines.shards import write_shards
from tests.data_pipelines.encode_here import encode_here
from tokenizer import UserError, VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.clip_shape import ClipShape
from tokenizer.pixels import from_pixels
from tokenizer.receipts import new_folder
from tokenizer.text import ByteTextEncoder
from tokenizer.tokenizer import TokenizerConfig

CORRUPT = 5  # row of the raw set whose bytes are cut
VARIANTS = ["32x32x17", "32x48x5"]
ROOT = Path(__file__).resolve().parents[2]


def make_tokenizer(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 2, 2), blocks=1, patch=4)
    VideoTokenizer(TokenizerConfig(sizes, num_scales=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/, raw/ (five shards of four clips, one of them corrupt), tokenizer/."""
    base = tmp_path_factory.mktemp("encode")
    write_corpus(base / "corpus", clips=20, seed=0, size=48, validation=2)
    write_shards(base / "corpus" / "train.csv", base / "whole", ShardsConfig(workers=1))
    rows = ShardFolder(base / "whole")
    rewrite(base / "raw", [rows[row] for row in range(20)], {CORRUPT: rows[CORRUPT]["video"][:700]})
    make_tokenizer(base / "tokenizer", 0)
    return base


def rewrite(out: Path, rows: list[dict], videos: dict[int, bytes]) -> None:
    """Raw shards of four rows each, some with other bytes in place of the video."""
    with new_folder(out, {"kind": "raw shards"}) as (folder, receipt):
        # every record is padded to one size, so that every shard takes four
        largest = max(len(row["video"]) for row in rows)
        writer = MDSWriter(
            columns=COLUMNS, out=str(folder), hashes=["xxh64"], size_limit=5 * (largest + 600), exist_ok=True
        )
        for number, row in enumerate(rows):
            writer.write(row | {"video": videos.get(number, row["video"])})
            if number % 4 == 3:
                writer.flush_shard()
                writer._reset_cache()
        writer.finish()
        receipt.update(classes=[])


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """One Ray for all tests of this file; its address."""
    yield start_ray(4)
    ray.shutdown()


def settings(base: Path, out: Path, **changes) -> EncodeConfig:
    config = EncodeConfig(str(base / "raw"), str(base / "tokenizer"), str(out), VARIANTS, latents=True, text_dim=16, batch_size=3,
                          num_workers=2)  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="session")
def undisturbed(base: Path, cluster: str) -> tuple[Path, list[EncodeSummary]]:
    """The output of a run that nobody disturbed, and its summaries."""
    return base / "undisturbed", encode(settings(base, base / "undisturbed"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def encoding_workers() -> list[psutil.Process]:
    """The actors' processes, wherever in the tree below this process Ray has put them."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.cmdline() and child.cmdline()[0].startswith("ray::EncodeActor"):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def test_bits_are_those_of_the_tokenizer_and_of_the_stored_latents(base: Path, undisturbed: tuple[Path, list]):
    out, summaries = undisturbed
    assert summaries == [EncodeSummary(variant, 20, 19, 1, False) for variant in VARIANTS]
    tokenizer, raw = VideoTokenizer.from_pretrained(base / "tokenizer"), ShardFolder(base / "raw")
    good = [row for row in range(20) if row != CORRUPT]
    for name in VARIANTS:
        variant = ClipShape.parse(name)
        dataset = CodeDataset(out / name, tokenizer.fingerprint)
        assert len(dataset) == 19 and dataset.manifest.dead == 1
        assert dataset.schedule == tokenizer.schedule_for(variant.height, variant.width)
        agree = []
        for number, row in enumerate(good):
            item, record = dataset[number], raw[row]
            assert (item["source"], item["caption"]) == (record["source"], record["caption"])
            frames = read_clip(record, choose_decoder(), variant.frames, variant.height, variant.width)
            latent = tokenizer.encode_latent(from_pixels(frames)[None]).detach().movedim(1, 2)[0]  # [T, d, H, W]
            torch.testing.assert_close(item["latent"], latent, atol=2e-3, rtol=2e-3)
            again = tokenizer.quantizer.quantize(item["latent"].movedim(0, 1)[None], dataset.schedule).tokens()[0]
            assert torch.equal(item["tokens"], again)  # exactly, whatever rounding did
            agree.append((item["tokens"] == tokenizer.encode(from_pixels(frames)[None]).tokens()[0]).float().mean())
            text = ByteTextEncoder(16).encode(record["caption"]).astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(item["text"].numpy(), text)
        assert np.mean(agree) > 0.999  # all but bits within a float16 rounding of zero


def test_stored_latents_quantise_to_the_stored_bits_in_batches_too(base: Path, undisturbed: tuple[Path, list]):
    tokenizer = VideoTokenizer.from_pretrained(base / "tokenizer")
    stream = CodeStream(
        [Source(str(undisturbed[0] / VARIANTS[0]), 5)], 16, max_text_length=8, fingerprint=tokenizer.fingerprint
    )
    for batch in islice(stream, 3):
        again = tokenizer.quantizer.quantize(batch.latents.movedim(1, 2), batch.schedule)
        assert torch.equal(again.tokens(), batch.tokens)
        assert set(batch.text_lengths.tolist()) == {6, 8}  # "a red circle moving left slowly"; "up-left" is three words


def test_the_corrupt_clip_is_in_the_dead_letters(undisturbed: tuple[Path, list]):
    for variant in VARIANTS:
        folder = undisturbed[0] / variant
        letters = [json.loads(line) for line in (folder / "dead_letter.jsonl").read_text().splitlines()]
        assert [(letter["shard"], letter["row"]) for letter in letters] == [(1, 1)] and letters[0]["reason"]
        receipts = [json.loads((folder / f"{shard:05d}" / "receipt.json").read_text()) for shard in range(5)]
        assert [(receipt["rows_in"], receipt["rows_out"]) for receipt in receipts] == [
            (4, 4),
            (4, 3),
            (4, 4),
            (4, 4),
            (4, 4),
        ]
        assert not (folder / ".tmp").exists()


def test_a_finished_run_does_nothing(base: Path, undisturbed: tuple[Path, list], capsys: pytest.CaptureFixture):
    before = {file: file.stat().st_mtime_ns for file in undisturbed[0].rglob("*")}
    summaries = encode(settings(base, undisturbed[0]))
    assert [summary.already_done for summary in summaries] == [True, True]
    assert "32x32x17: finished before, nothing to do: 20 clips in, 19 encoded" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in undisturbed[0].rglob("*")} == before


def test_other_settings_and_another_tokenizer_are_refused(base: Path, undisturbed: tuple[Path, list], tmp_path: Path):
    with pytest.raises(
        UserError, match="32x32x17 holds codes made with other settings .*latents True instead of False.*another --out"
    ):
        encode(settings(base, undisturbed[0], latents=False))
    other = make_tokenizer(tmp_path / "other", 1)
    with pytest.raises(UserError, match="fingerprint"):
        encode(settings(base, undisturbed[0], tokenizer=str(other)))
    with pytest.raises(UserError, match="made by the tokenizer"):
        CodeDataset(undisturbed[0] / VARIANTS[0], VideoTokenizer.from_pretrained(other).fingerprint)
    (tmp_path / "mine" / "32x32x17").mkdir(parents=True)
    (tmp_path / "mine" / "32x32x17" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="was not written by"):
        encode(settings(base, tmp_path / "mine"))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_kill_9_of_a_worker_then_of_the_driver_then_a_second_run_change_nothing(
    base: Path, cluster: str, undisturbed: tuple[Path, list], tmp_path: Path
):
    out = tmp_path / "out"
    config = settings(base, out, ray_address=cluster, num_workers=1)
    program = f"from data_pipelines.encode import *; encode({config!r})"
    driver = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: list(out.rglob("*.row")))
    [worker] = encoding_workers()
    worker.kill()
    before = len(list(out.glob("*/0*/receipt.json")))
    # the driver goes on with the worker that Ray has started instead
    wait_until(lambda: len(list(out.glob("*/0*/receipt.json"))) > before)
    driver.kill()
    driver.wait()
    left = list(out.glob("*/0*/receipt.json"))
    assert before < len(left) < 10 and not list(out.glob("*/codes.json"))
    with pytest.raises(UserError, match="codes.json is missing"):
        CodeDataset(out / VARIANTS[0])
    times = {file: file.stat().st_mtime_ns for file in left}
    encode(settings(base, out, num_workers=1))
    assert content(out) == content(undisturbed[0])
    assert {file: file.stat().st_mtime_ns for file in left} == times  # what was done was not done again


class Poisoned:
    """A decoder that takes its process with it, as a library's segmentation fault would."""

    def __init__(self, decoder, deadly: bytes):
        self.decoder, self.deadly = decoder, deadly

    def decode(self, video, *arguments):
        if video == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.decoder.decode(video, *arguments)


def poison(monkeypatch: pytest.MonkeyPatch, deadly: bytes, ahead: bool) -> None:
    """Workers die at this video, which they decode one by one or ahead."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    poisoned = Poisoned

    class PoisonedActor(EncodeActor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.encoder.decoder = poisoned(choose_decoder("pyav"), deadly)
            self.encoder.decoding = ThreadPoolExecutor(2) if ahead else None

    monkeypatch.setattr(EncoderPool, "actor_class", PoisonedActor)


def test_a_row_that_kills_its_worker_is_set_aside_and_a_size_without_clips_is_an_error(
    base: Path, undisturbed: tuple[Path, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, ShardFolder(base / "raw")[9]["video"], ahead=False)
    monkeypatch.setattr(encode_pool, "KILLS", 2)  # a new worker takes seconds to start
    short, long = VARIANTS[0], "32x32x33"
    with pytest.raises(UserError, match="none of the 20 clips .* could be encoded at 32x32x33"):
        encode(settings(base, tmp_path, variants=[short, long], num_workers=1))
    assert not (tmp_path / long / "codes.json").exists() and not (tmp_path / long / "index.json").exists()
    assert len((tmp_path / long / "dead_letter.jsonl").read_text().splitlines()) == 20
    manifest = CodeDataset(tmp_path / short).manifest
    assert (manifest.rows, manifest.dead) == (18, 2)
    letters = [json.loads(line) for line in (tmp_path / short / "dead_letter.jsonl").read_text().splitlines()]
    assert [(letter["shard"], letter["row"]) for letter in letters] == [(1, 1), (2, 1)]
    assert "process died" in letters[1]["reason"]
    others = ("00000", "00001", "00003", "00004")
    same = {name: data for name, data in content(tmp_path / short).items() if name.startswith(others)}
    assert len(same) == 12 and same.items() <= content(undisturbed[0] / short).items()


def test_decoding_ahead_as_beside_a_gpu_changes_no_byte(base: Path, undisturbed: tuple[Path, list], tmp_path: Path):
    encoder, job, out = make_encoder(settings(base, tmp_path), VARIANTS[0])
    encoder.decoding = ThreadPoolExecutor(2)
    for shard in range(5):
        encoder.encode(Task(job, str(out), shard, "try"))
    written = {name: data for name, data in content(out).items() if not name.startswith(".tmp")}
    assert len(written) == 15 and written.items() <= content(undisturbed[0] / VARIANTS[0]).items()


def test_a_row_that_kills_a_worker_which_decodes_ahead_is_found_one_by_one(
    base: Path, undisturbed: tuple[Path, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, ShardFolder(base / "raw")[9]["video"], ahead=True)
    monkeypatch.setattr(encode_pool, "KILLS", 1)
    [summary] = encode(settings(base, tmp_path, variants=VARIANTS[0], num_workers=1))
    assert (summary.rows_out, summary.dead) == (18, 2)
    letters = [json.loads(line) for line in (tmp_path / VARIANTS[0] / "dead_letter.jsonl").read_text().splitlines()]
    assert [(letter["shard"], letter["row"]) for letter in letters] == [(1, 1), (2, 1)]


def test_parts_of_an_array_make_the_output_of_one_run(
    base: Path, undisturbed: tuple[Path, list], tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = replace(settings(base, tmp_path / "out"), parts=3)
    for part in (2, 0):
        assert encode_here(replace(config, part=part)) == []
        assert f"part {part} of 3 is done" in capsys.readouterr().out
    assert encode_here(replace(config, part=1)) == undisturbed[1]
    assert content(tmp_path / "out") == content(undisturbed[0])
    assert all(summary.already_done for summary in encode_here(replace(config, part=0)))
    with pytest.raises(UserError, match="part is 3 of 3 parts"):
        replace(config, part=3)


def test_a_damaged_raw_shard_is_named(base: Path, tmp_path: Path):
    shutil.copytree(base / "raw", tmp_path / "raw")
    with open(tmp_path / "raw" / "shard.00003.mds", "r+b") as file:
        file.seek(3000)
        file.write(b"\0" * 8)
    encoder, job, out = make_encoder(settings(base, tmp_path, shards=str(tmp_path / "raw")), "32x32x5")
    with pytest.raises(UserError, match="shard.00003.mds can't be read"):
        encoder.encode(Task(job, str(out), 3, "try"))
    assert not list(out.rglob("*.mds")) and not list(out.rglob("receipt.json"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shards": "/nowhere"}, "holds no finished raw shards"),
        ({"tokenizer": "/nowhere"}, "holds no tokenizer"),
        ({"variants": ["32x32x16"]}, "16 frames are not 1"),
        ({"variants": ["40x32x17"]}, "height 40 is not a multiple of 16: resize or crop to 32"),
        ({"variants": ["32"]}, "neither HEIGHTxWIDTHxFRAMES nor SIDExFRAMES"),
        ({"variants": ["32x32x17"] * 2}, "repeat themselves"),
        ({"batch_size": 0}, "at least 1"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"text_encoder": "words"}, "text encoder 'words' is unknown"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(base: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        encode(settings(base, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def make_encoder(config: EncodeConfig, variant: str) -> tuple[ShardEncoder, Job, Path]:
    encoder = ShardEncoder(config.shards, config.tokenizer, "cpu", threads=1)
    job = make_job(config, encoder.tokenizer.fingerprint, variant)
    out = Path(config.out, variant)
    (out / ".tmp").mkdir(parents=True)
    return encoder, job, out


def test_options_that_change_the_records(base: Path, tmp_path: Path):
    config = settings(base, tmp_path, latents=False, fps=4.0, text_dim=24)
    encoder, job, out = make_encoder(config, "32x32x5")
    encoder.encode(Task(job, str(out), 0, "try"))
    record = ShardFolder(out / "00000" / "32x32x5")[0]
    assert "latent" not in record and len(record["text"]) % (24 * 2) == 0 and len(record["packed"]) == 2 * 5
    frames = read_clip(ShardFolder(config.shards)[0], choose_decoder(), 5, 32, 32, fps=4.0)
    tokens = encoder.tokenizer.encode(from_pixels(frames)[None]).tokens()
    assert (np.unpackbits(np.frombuffer(record["packed"], np.uint8)) == tokens.numpy().ravel()).mean() > 0.98
    plain = encoder.tokenizer.encode(
        from_pixels(read_clip(ShardFolder(config.shards)[0], choose_decoder(), 5, 32, 32))[None]
    )
    assert not torch.equal(plain.tokens(), tokens)
