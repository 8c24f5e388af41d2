"""Shards on S3: the same items as from a local folder, and an error that names the shard where they can't be had."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pytest
import torch
from google.api_core import exceptions as google
from streaming import MDSWriter

from data_pipelines import read_ahead, remote
from data_pipelines.clips import ClipDataset
from data_pipelines.code_stream import CodeBatch, CodeStream, Source
from data_pipelines.codes import CodeDataset
from data_pipelines.encode import EncodeConfig
from data_pipelines.random_access import HASH, ShardFolder
from data_pipelines.shard_index import merge_indexes
from data_pipelines.shard_part import ShardsConfig
from data_pipelines.shards import write_shards
from pretrain.config import PretrainConfig, SourceConfig, StageConfig
from pretrain.stages import make_plan
from tests.data_pipelines.code_folders import FRAMES, write_code_folder
from tests.data_pipelines.encode_here import encode_here
from tests.data_pipelines.media import write_video
from tests.data_pipelines.s3_server import ENVIRONMENT, Relay, S3Server, free_port
from tests.pretrain.tiny import write_codes, write_tokenizer
from tokenizer.errors import Fault, UserError

SHARDS = 28
BATCHES = 14  # an epoch of 4 clips each, so that every batch needs two shards that no earlier one has fetched
OUTAGE = 10.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of buckets: codes, another set with the same manifest, codes with damaged shards, raw clips, and large records."""
    folder = tmp_path_factory.mktemp("store")
    bucket = folder / "buckets" / "bucket"
    write_code_folder(bucket / "codes", [2] * SHARDS)
    write_code_folder(bucket / "other", [2] * SHARDS, seed=1)
    write_code_folder(bucket / "damaged", [1, 1, 1, 1])
    shard = [bucket / "damaged" / f"{number:05d}" / "shard.00000.mds" for number in range(4)]
    content = bytearray(shard[0].read_bytes())
    content[-20] ^= 1
    shard[0].write_bytes(content)
    shard[1].write_bytes(shard[1].read_bytes()[:-1])
    shard[2].unlink()
    write_codes(bucket / "tiny", write_tokenizer(folder / "tokenizer"))
    rows = ["path,caption"]
    for number in range(3):
        write_video(folder / "videos" / f"{number}.mp4", frames=17, size=(32, 32))
        rows.append(f"{number}.mp4,caption {number}")
    (folder / "videos" / "all.csv").write_text("\n".join(rows))
    write_shards(folder / "videos" / "all.csv", bucket / "clips", ShardsConfig(shard_size="4kb", workers=1))
    for number in range(4):
        with MDSWriter(columns={"noise": "bytes"}, out=str(bucket / "large" / f"{number}"), hashes=[HASH]) as writer:
            writer.write({"noise": np.random.default_rng(number).bytes(300_000)})
    merge_indexes(bucket / "large", [f"{number}" for number in range(4)])
    return folder


@pytest.fixture(scope="module")
def bucket(store: Path) -> Path:
    return store / "buckets" / "bucket"


@pytest.fixture(scope="module", autouse=True)
def no_needless_collections() -> Iterator[None]:
    """Making a client makes garbage: what was imported is not to be searched through each time, in each process."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[S3Server]:
    server = S3Server(store / "buckets", store / "server.log")
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (ENVIRONMENT | {"S3_ENDPOINT_URL": server.url}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def undisturbed(bucket: Path) -> list[tuple]:
    return contents(CodeStream([Source(str(bucket / "codes"), FRAMES)], 4, shards_per_window=2), BATCHES)


def open_stream(cache: Path, workers: int = 2, timeout: float = 60) -> CodeStream:
    source = Source("s3://bucket/codes", FRAMES, cache=str(cache))
    return CodeStream([source], 4, shards_per_window=2, num_workers=workers, timeout=timeout)


def content(batch: CodeBatch) -> tuple:
    assert batch.latents is not None
    tensors = (batch.sample_index, batch.epoch, batch.class_ids, batch.tokens, batch.latents, batch.text)
    return tuple(tensor.numpy().tobytes() for tensor in tensors)


def contents(stream: CodeStream, batches: int) -> list[tuple]:
    return [content(batch) for batch in islice(stream, batches)]


@contextmanager
def new_workers() -> Iterator[list[Any]]:
    """The processes that have been started inside."""
    before, found = set(multiprocessing.active_children()), []
    yield found
    found += [process for process in multiprocessing.active_children() if process not in before]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_clips_and_codes_of_s3_are_those_of_the_local_folder(bucket: Path, undisturbed: list[tuple], tmp_path: Path):
    near = ClipDataset(bucket / "clips", 5, 32, seed=3)
    far = ClipDataset("s3://bucket/clips/", 5, 32, seed=3, cache=tmp_path / "clips")
    assert len(far) == 3 and len(far.shards.shards) > 1
    for mine, theirs in zip((far[index] for index in range(3)), (near[index] for index in range(3))):
        assert torch.equal(mine.pop("video"), theirs.pop("video")) and mine == theirs
    near, far = CodeDataset(bucket / "codes"), CodeDataset("s3://bucket/codes", cache=tmp_path / "codes")
    assert near.manifest == far.manifest
    for row in (0, 2 * SHARDS - 1, 7):
        mine, theirs = far[row], near[row]
        assert all(torch.equal(mine.pop(name), theirs.pop(name)) for name in ("tokens", "latent", "text"))
        assert mine == theirs
    assert contents(open_stream(tmp_path / "codes"), BATCHES) == undisturbed  # some shards are in the cache already


def test_raw_shards_of_s3_are_encoded_to_the_same_bytes(bucket: Path, store: Path, tmp_path: Path):
    written = {}
    for name, shards, cache in (
        ("near", str(bucket / "clips"), None),
        ("far", "s3://bucket/clips", str(tmp_path / "c")),
    ):
        config = EncodeConfig(
            shards, str(store / "tokenizer"), str(tmp_path / name), "32x32x5", batch_size=2, cache=cache
        )
        [summary] = encode_here(config)
        assert (summary.rows_in, summary.rows_out) == (3, 3)
        out = tmp_path / name / "32x32x5"
        written[name] = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert written["near"] == written["far"] and "codes.json" in written["far"]


@pytest.mark.parametrize("main", ["waits", "works"])
def test_a_worker_that_is_killed_is_an_error_and_a_restart_goes_on_exactly(
    server: S3Server, undisturbed: list[tuple], tmp_path: Path, main: str
):
    stream = open_stream(tmp_path / "cache")
    with new_workers() as workers:
        assert contents(stream, 3) == undisturbed[:3]
    assert len(workers) == 2
    state = stream.state_dict()
    said = r"that read s3://bucket/codes ahead has died .*\(pid \d+\) is killed by signal: Killed.*data_workers; start again"
    began, undisturbed_work = time.monotonic(), False
    with pytest.raises(Fault, match=said):
        server.halt()
        if main == "works":  # at a step of the training, which is not disturbed
            os.kill(workers[1].pid, signal.SIGKILL)
            end = time.monotonic() + 1
            while time.monotonic() < end:
                time.sleep(0.1)
            undisturbed_work = True
        else:
            threading.Timer(0.5, os.kill, (workers[1].pid, signal.SIGKILL)).start()
        try:
            contents(stream, BATCHES)
        finally:
            server.go_on()
    assert time.monotonic() - began < 15 and undisturbed_work == (main == "works")
    stream = open_stream(tmp_path / "cache")
    stream.load_state_dict(state)
    assert contents(stream, BATCHES - 3) == undisturbed[3:]


def test_reading_goes_on_exactly_after_an_outage(
    server: S3Server, store: Path, undisturbed: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One server answers nothing for a while, another is killed and comes back; both at once, to wait once."""
    second = S3Server(store / "buckets", store / "second.log")
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 2.0)
    streams = []
    for number, url in enumerate((server.url, second.url)):
        monkeypatch.setenv("S3_ENDPOINT_URL", url)
        streams.append(open_stream(tmp_path / f"{number}", timeout=50))
        assert contents(streams[-1], 2) == undisturbed[:2]  # the workers have this address now
    began = time.monotonic()
    server.halt()
    second.kill()
    for action in (server.go_on, second.begin):
        threading.Timer(OUTAGE, action).start()
    try:
        for stream in streams:
            assert contents(stream, BATCHES - 2) == undisturbed[2:]
            assert OUTAGE < time.monotonic() - began < 30
            stream.close()
    finally:
        second.kill()


def test_pauses_between_attempts_grow_and_leave_time_for_a_last_attempt():
    for attempt in range(1000):
        assert 0.8 <= remote._pause(attempt, 1000) / min(0.5 * 2**attempt, 30) <= 1.2
    left, attempts = 100.0, 0
    while left > 1:
        left, attempts = left - remote._pause(attempts, left), attempts + 1
        assert left == 0 or remote._pause(attempts, left) <= max(0.5, left / 2)
    assert attempts > 8


def test_attempts_go_on_until_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    attempts: list[float] = []
    attempt = remote.Remote._attempt

    def noted(*arguments: Any) -> None:
        attempts.append(time.monotonic())
        attempt(*arguments)

    monkeypatch.setattr(remote.Remote, "_attempt", noted)
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's
    began = time.monotonic()
    with pytest.raises(
        Fault, match="s3://bucket/codes/index.json could not be fetched within 3 s .EndpointConnectionError"
    ):
        ShardFolder("s3://bucket/codes", tmp_path, timeout=3)
    # botocore's own tries would go on for minutes; a busy machine may be seconds late
    assert 3 <= time.monotonic() - began < 10 and len(attempts) >= 3 and attempts[-1] - began > 1.5
    assert len(re.findall("tried again for up to [23] s", capfd.readouterr().err)) == 1


def test_a_storage_that_does_not_answer_is_an_error_in_time(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In three ways, without and with workers; all at once, to wait once."""
    relays, streams = {how: Relay(server.port) for how in ("refuses", "is silent", "drips")}, []
    for how, workers in (("refuses", 2), ("is silent", 0), ("is silent", 2), ("drips", 0)):
        monkeypatch.setenv("S3_ENDPOINT_URL", relays[how].url)
        streams.append(open_stream(tmp_path / f"{how} {workers}", workers, timeout=4))
        next(streams[-1])  # its clients have connections
    began = time.monotonic()

    def read(stream: CodeStream) -> float:
        said = r"^s3://bucket/codes/\d+/shard.00000.mds could not be fetched within 4 s"
        with pytest.raises(Fault, match=said) as caught:
            contents(stream, BATCHES)
        assert "Traceback" not in str(caught.value)
        return time.monotonic() - began

    for how, relay in relays.items():
        relay.become(how)
    try:
        with ThreadPoolExecutor(len(streams)) as pool:
            assert max(pool.map(read, streams)) < 10
    finally:
        for relay in relays.values():
            relay.close()
    assert all(stream.step < BATCHES for stream in streams) and not list(tmp_path.rglob("*.part*"))


def test_a_worker_that_hangs_is_an_error_in_time(bucket: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read_ahead, "GRACE", 0.5)
    stream = CodeStream([Source(str(bucket / "codes"), FRAMES)], 4, num_workers=2, timeout=2)
    with new_workers() as workers:
        next(stream)
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    with at_most(20), pytest.raises(Fault, match="no batch of /.*/codes came within 2 s"):
        for _ in stream:
            pass


def test_a_storage_that_refuses_is_an_error_at_once(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with at_most(20):
        with pytest.raises(
            UserError, match="s3://nowhere/codes/index.json can't be fetched, the storage answers 404 Not Found"
        ):
            ShardFolder("s3://nowhere/codes", tmp_path)
        with pytest.raises(UserError, match="s3://bucket/nothing/codes.json .*answers 404 Not Found"):
            CodeDataset("s3://bucket/nothing", cache=tmp_path)
        with pytest.raises(
            UserError, match="ftp://bucket/index.json can't be fetched .ValueError: Unsupported remote path"
        ):
            ShardFolder("ftp://bucket", tmp_path)
    iam = boto3.client("iam", endpoint_url=server.url)
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    policy = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    server.check_credentials(True)
    try:
        with (
            at_most(20),
            pytest.raises(UserError, match="s3://bucket/codes/index.json .*answers 403 Forbidden.*credentials"),
        ):
            ShardFolder("s3://bucket/codes", tmp_path)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        assert len(ShardFolder("s3://bucket/codes", tmp_path)) == 2 * SHARDS
    finally:
        server.check_credentials(False)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with at_most(20), pytest.raises(UserError, match="NoCredentialsError"):
        ShardFolder("s3://bucket/codes", tmp_path / "new")


def test_other_clients_answers_are_understood():
    assert remote._status(google.NotFound("no")) == 404 and remote._status(google.TooManyRequests("later")) == 429
    assert remote._status(ConnectionError("refused")) is None


def test_damaged_shards_of_the_remote_are_named_and_never_kept(tmp_path: Path):
    dataset = CodeDataset("s3://bucket/damaged", cache=tmp_path)
    for row, why in enumerate(("is damaged .its content does not have the hash", "is damaged .it has .* bytes where",
                               "can't be fetched, the storage answers 404")):  # fmt: skip
        with pytest.raises(UserError, match=f"s3://bucket/damaged/0000{row}/shard.00000.mds {why}") as caught:
            dataset[row]
        assert caught.type is UserError  # no later start would fare better
    assert dataset[3]["caption"] == "clip 3"
    assert [file.parent.name for file in tmp_path.rglob("*shard*") if file.suffix != ".lock"] == ["00003"]


def test_a_damaged_cache_is_mended(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    whole = [CodeDataset("s3://bucket/codes", cache=tmp_path)[row] for row in (0, 2)]
    files = [tmp_path / f"0000{shard}" / "shard.00000.mds" for shard in (0, 1)]
    content = bytearray(files[0].read_bytes())
    content[-20] ^= 1
    files[0].write_bytes(content)
    files[1].write_bytes(b"")  # as after a power loss
    dataset = CodeDataset("s3://bucket/codes", cache=tmp_path)
    assert all(torch.equal(dataset[row]["latent"], item["latent"]) for row, item in zip((0, 2), whole))
    assert capfd.readouterr().err.count("is made anew") == 2


def test_a_cache_does_not_answer_for_another_set(bucket: Path, tmp_path: Path):
    assert (bucket / "codes" / "codes.json").read_bytes() == (bucket / "other" / "codes.json").read_bytes()
    CodeDataset("s3://bucket/codes", cache=tmp_path / "codes")[0]
    with pytest.raises(UserError, match="holds other codes or clips than s3://bucket/other: empty it"):
        CodeDataset("s3://bucket/other", cache=tmp_path / "codes")
    ClipDataset("s3://bucket/clips", 5, 32, cache=tmp_path / "clips")[0]
    with pytest.raises(UserError, match="holds other codes or clips than s3://bucket/large: empty it"):
        ShardFolder("s3://bucket/large", tmp_path / "clips")


@pytest.mark.parametrize("damage", ["gone", "flipped", "cut"])
def test_a_local_shard_that_fails_under_workers_is_named(
    bucket: Path, undisturbed: list[tuple], tmp_path: Path, damage: str
):
    shutil.copytree(bucket / "codes", tmp_path / "codes")
    stream = CodeStream([Source(str(tmp_path / "codes"), FRAMES)], 4, shards_per_window=2, num_workers=2, timeout=30)
    assert contents(stream, 2) == undisturbed[:2]
    for file in (tmp_path / "codes").rglob("*.mds"):
        stored = bytearray(file.read_bytes())
        stored[-20] ^= 1
        file.unlink() if damage == "gone" else file.write_bytes(stored if damage == "flipped" else stored[:-1])
    got: list[tuple] = []
    with at_most(20), pytest.raises(UserError, match=r"^the shard .*/codes/\d+/shard.00000.mds can't be read"):
        for batch in stream:
            got.append(content(batch))
    assert got == undisturbed[2 : 2 + len(got)] and len(got) <= 4  # what was read ahead, nothing else


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(bucket: Path, small_disk: Path):
    expected = [row["noise"] for row in (ShardFolder(bucket / "large")[number] for number in range(4))]
    folder = ShardFolder("s3://bucket/large", small_disk / "cache")
    assert [folder[row]["noise"] for row in (0, 1)] == expected[:2]
    for _ in range(2):
        with (
            at_most(20),
            pytest.raises(UserError, match=f"the disk of the cache {small_disk}/cache.* is full .s3://bucket/large/2/"),
        ):
            folder[2]
    assert [file.parent.name for file in sorted(small_disk.rglob("*shard*")) if file.suffix != ".lock"] == ["0", "1"]
    assert folder[1]["noise"] == expected[1]
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    for opened in (folder, ShardFolder("s3://bucket/large", small_disk / "cache")):
        assert [opened[row]["noise"] for row in range(4)] == expected


def _read_all(cache: Path, start: Any, answers: Any, backwards: bool) -> None:
    start.wait()
    folder = CodeDataset("s3://bucket/codes", cache=cache)
    rows = range(2 * SHARDS)
    items = {row: folder[row]["latent"].numpy().tobytes() for row in (reversed(rows) if backwards else rows)}
    answers.put([items[row] for row in rows])


def test_two_processes_fill_one_cache(server: S3Server, bucket: Path, tmp_path: Path):
    expected = [CodeDataset(bucket / "codes")[row]["latent"].numpy().tobytes() for row in range(2 * SHARDS)]
    context, before = multiprocessing.get_context("fork"), len(server.downloads())
    start, answers = context.Event(), context.Queue()
    processes = [
        context.Process(target=_read_all, args=(tmp_path, start, answers, back)) for back in (False, False, True)
    ]
    for process in processes:
        process.start()
    start.set()
    assert [answers.get(timeout=60) for _ in processes] == [expected] * 3
    for process in processes:
        process.join()
    shards = [path for path in server.downloads()[before:] if path.endswith(".mds")]
    assert len(shards) == len(set(shards)) == SHARDS  # none was fetched twice


def _read_for_ever(cache: Path, first: Any) -> None:
    for batch in open_stream(cache):
        first.put(content(batch))


def test_killed_processes_leave_nothing_that_stops_the_next(server: S3Server, undisturbed: list[tuple], tmp_path: Path):
    before, pids = set(os.listdir("/dev/shm")), []
    context = multiprocessing.get_context("fork")
    for with_workers in (True, False):
        cache, first = tmp_path / str(with_workers), context.Queue()
        process = context.Process(target=_read_for_ever, args=(cache, first))
        process.start()
        assert first.get(timeout=60) == undisturbed[0]
        server.halt()  # the workers hold the locks of the shards that they fetch
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        pids += [process.pid, *(worker.pid for worker in workers)]
        time.sleep(0.5)
        process.kill()
        process.join()
        if with_workers:
            for worker in workers:
                worker.kill()
            psutil.wait_procs(workers, timeout=10)
        server.go_on()
        with at_most(20):
            assert contents(open_stream(cache), BATCHES) == undisturbed
        assert not list(cache.rglob("*.part*"))
        assert not psutil.wait_procs(workers, timeout=20)[1], "workers outlive the process that started them"
    left = set(os.listdir("/dev/shm")) - before
    assert not [name for name in left if any(str(pid) in name for pid in pids) or re.match(r"\d{6}_", name)]


def test_validation_clips_are_kept_where_the_stage_says(store: Path, tmp_path: Path):
    codes = (SourceConfig(str(store / "buckets" / "bucket" / "tiny")),)
    stage = StageConfig(
        "one",
        codes,
        steps=1,
        global_batch_size=4,
        micro_batch_size=4,
        validation="s3://bucket/tiny",
        validation_cache=str(tmp_path / "cache"),
    )
    run = PretrainConfig(str(tmp_path), str(store / "tokenizer"), (stage,))
    stream = make_plan(run).stages[0].validation_stream(run, 0, 1)
    assert stream is not None and len(next(stream)) == 4
    assert list((tmp_path / "cache").rglob("*.mds"))


def test_the_setting_of_a_run_bounds_its_downloads(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sources = (SourceConfig("s3://bucket/tiny", cache=str(tmp_path / "cache")),)
    stage = StageConfig("one", sources, steps=1, global_batch_size=4, micro_batch_size=4)
    run = PretrainConfig(str(tmp_path), str(store / "tokenizer"), (stage,), data_timeout=3, data_workers=1)
    stream = make_plan(run).stages[0].stream(run, 0, 1)
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with at_most(10), ThreadPoolExecutor(1) as pool:
        again = pool.submit(make_plan, run)
        with pytest.raises(
            UserError, match="s3://bucket/tiny/00000/2x3/shard.00000.mds could not be fetched within 3 s"
        ):
            next(stream)
        with pytest.raises(UserError, match="s3://bucket/tiny/codes.json could not be fetched within 3 s"):
            again.result()
    with pytest.raises(UserError, match="data_timeout is 0: it must be above 0"):
        replace(run, data_timeout=0)
