"""`videoar encode --submit` on a real Ray cluster: what a job writes, how it ends, what it counts."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from cluster.local import end_with_parent
from cluster.ray_job import DESCRIPTION, RayJobConfig, submit_encode
from data_pipelines.encode import EncodeConfig
from data_pipelines.encode_metrics import EncodeMetrics
from data_pipelines.moving_shapes import write_corpus
from data_pipelines.random_access import ShardFolder
from data_pipelines.shard_part import ShardsConfig
from data_pipelines.shards import write_shards
from tests.cluster.ray_head import RayHead, ray_head, wait_until
from tests.data_pipelines.test_encode import CORRUPT, content, make_tokenizer, rewrite
from tokenizer import UserError, settings
from videoar import main

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ["32x32x17", "32x48x5"]
ROWS = 20  # in five shards, one row corrupt
# what `videoar encode --submit` calls, without the seconds that importing torch takes
SUBMIT = """
import json, sys
from cluster.ray_job import RayJobConfig, submit_encode
encode, job, wait = map(json.loads, sys.argv[1:])
sys.exit(submit_encode(encode, RayJobConfig(**job), wait))
"""


def _as_in_a_terminal() -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it, and so would its children


@dataclass
class Cluster:
    """A cluster and a folder with raw/, tokenizer/ and what the tests make."""

    head: RayHead
    folder: Path

    def settings(self, out: str, **changes) -> EncodeConfig:
        """Settings of `videoar encode` that are the same in all tests, save the changes."""
        values = {"num_workers": 1, "tokenizer": str(self.folder / "tokenizer"), **changes}
        return EncodeConfig(shards=str(self.folder / "raw"), out=str(self.folder / out), variants=VARIANTS, latents=True,
                            text_dim=16, batch_size=3, **values)  # fmt: skip

    def command(self, config: EncodeConfig, *words: str, **environment: str) -> subprocess.Popen:
        """Starts `videoar encode`."""
        file = Path(config.out + ".yaml")
        settings.save(config, file)
        return self._start("-m", "videoar", "encode", "--config", str(file), *words, **environment)

    def submit(
        self, config: EncodeConfig, job: dict | None = None, address: str = "", wait: bool = True, **environment: str
    ) -> subprocess.Popen:
        """Submits, to the head's address unless another is given, and follows the log."""
        encode = settings.to_dict(config) | {"ray_address": address or self.head.address}
        return self._start("-c", SUBMIT, *map(json.dumps, (encode, job or {}, wait)), **environment)

    def _start(self, *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=self.head.environment | environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, preexec_fn=_as_in_a_terminal,
        )  # fmt: skip

    def job(self, out: str) -> dict:
        """What Ray knows of the newest job with this output; {}: there is none."""
        jobs = [job for job in self.head.jobs().values() if job["metadata"]["out"] == str(self.folder / out)]
        return max(jobs, key=lambda job: job["start_time"], default={})

    def logs(self, job: str) -> str:
        """The log of a submitted job."""
        return json.loads(self.head.get(f"/api/jobs/{job}/logs"))["logs"]

    def stop(self, job: str) -> None:
        """Stops a submitted job, as `ray job stop` does."""
        self.head.get(f"/api/jobs/{job}/stop", method="POST")

    def counted(self, driver: str) -> dict[str, dict[str, float]]:
        """What one driver has counted so far: name -> variant -> value."""
        by_name: dict[str, dict[str, float]] = {}
        for name, values in self.head.counted("ray_videoar_encode_").items():
            for (who, variant), value in values.items():
                if who == driver:
                    by_name.setdefault(name, {})[variant] = value
        return by_name


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray_job")
    write_corpus(folder / "corpus", clips=ROWS, seed=0, size=48, validation=2)
    write_shards(folder / "corpus" / "train.csv", folder / "whole", ShardsConfig(workers=1))
    rows = ShardFolder(folder / "whole")
    rewrite(folder / "raw", [rows[row] for row in range(ROWS)], {CORRUPT: rows[CORRUPT]["video"][:700]})
    make_tokenizer(folder / "tokenizer", 0)
    with ray_head(num_cpus=2) as head:
        yield Cluster(head, folder)


@pytest.fixture(scope="module")
def local(cluster: Cluster) -> Iterator[Callable[[], dict[str, bytes]]]:
    """Starts `videoar encode` without the cluster; the function waits for what it writes."""
    run = cluster.command(cluster.settings("local"))

    def written() -> dict[str, bytes]:
        if run.returncode is None:
            finish(run, 0)
        return content(cluster.folder / "local")

    yield written
    run.kill()
    run.communicate()


def finish(run: subprocess.Popen, status: int) -> tuple[str, str]:
    """Standard output and error of a command that must end with this status."""
    out, err = run.communicate(timeout=120)
    assert run.returncode == status, out + err
    return out, err


def test_a_job_writes_what_a_local_run_writes_and_counts_it(cluster: Cluster, local: Callable):
    words = ("--submit", "--ray-address", cluster.head.address)
    out, err = finish(cluster.command(cluster.settings("job", num_workers=0), *words), 0)
    job = cluster.job("job")
    name = job["submission_id"]
    assert f"ray job stop --address {cluster.head.address} {name}" in err and f"job {name} succeeded" in err
    assert "32x32x17: done: 20 clips in, 19 encoded, 1 could not be read." in out
    assert content(cluster.folder / "job") == local()
    assert job["entrypoint"].startswith(f"{sys.executable} -m videoar encode --shards=/")
    described = settings.load(RayJobConfig, DESCRIPTION)
    assert job["metadata"].items() >= described.metadata.items() and described.metadata
    assert job["metadata"]["variants"] == "32x32x17,32x48x5"
    env_vars = {**described.env_vars, "PYTHONPATH": str(ROOT)}
    assert job["runtime_env"]["env_vars"].items() >= env_vars.items() and described.env_vars
    seen = cluster.counted(job["job_id"])
    assert seen["clips_total"] == dict.fromkeys(VARIANTS, ROWS - 1)
    assert seen["dead_letters_total"] == dict.fromkeys(VARIANTS, 1)
    assert seen["frames_total"] == {"32x32x17": 19 * 17, "32x48x5": 19 * 5}
    assert seen["shard_seconds_count"] == dict.fromkeys(VARIANTS, 5)
    assert "worker_restarts_total" not in seen


def test_kill_9_of_the_driver_then_the_same_submission_change_nothing(cluster: Cluster, local: Callable):
    config = cluster.settings("killed")
    out, run = Path(config.out), cluster.submit(config)
    driver = cluster.head.process_with(lambda words: words[0] == sys.executable and f"--out={out}" in words)
    wait_until(lambda: list(out.glob("*/0*/receipt.json")))
    driver.kill()
    _, err = finish(run, 128 + signal.SIGKILL)
    assert "ended with status 137 (" in err
    left = {file: file.stat().st_mtime_ns for file in out.glob("*/0*/receipt.json")}
    assert 0 < len(left) < 10 and not list(out.glob("*/codes.json"))
    finish(cluster.submit(config), 0)
    assert content(out) == local()
    assert {file: file.stat().st_mtime_ns for file in left} == left  # what was done was not done again
    # the second driver counts what it has done itself
    seen = cluster.counted(cluster.job("killed")["job_id"])
    assert sum(seen["shard_seconds_count"].values()) == 10 - len(left)


def test_by_the_address_from_outside_the_gauges_follow_a_worker_that_dies(cluster: Cluster, local: Callable):
    config = cluster.settings("outside", ray_address=cluster.head.gcs)
    run = cluster.command(config, RAY_AUTH_MODE="token")
    worker = cluster.head.process_with(lambda words: words[0].startswith("ray::EncodeActor"))
    wait_until(lambda: list(Path(config.out).rglob("*.row")))
    worker.kill()
    driver = max(json.loads(cluster.head.get("/api/jobs/")), key=lambda job: job["job_id"] or "")["job_id"]

    def without_workers() -> dict[str, dict[str, float]]:
        seen = cluster.counted(driver)
        return seen if seen.get("workers") == {"": 0} and "worker_restarts_total" in seen else {}

    seen = wait_until(without_workers)
    counted = [sum(seen.get(name, {}).values()) for name in ("waiting_clips", "clips_total", "dead_letters_total")]
    assert sum(counted) == ROWS * len(VARIANTS) and counted[0] > 0
    finish(run, 0)
    assert content(Path(config.out)) == local()
    seen = cluster.counted(driver)
    assert sum(seen["clips_total"].values()) == 2 * (ROWS - 1) and seen["worker_restarts_total"] == {"": 1}


def test_ends_that_are_not_success(cluster: Cluster, tmp_path: Path):
    missing = cluster.submit(cluster.settings("missing", tokenizer=str(tmp_path / "none")))
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\necho $WISH\nexec sleep 600\n")
    sleeper.chmod(0o755)
    description = {"python": str(sleeper), "env_vars": {"WISH": "let me sleep"}, "entrypoint_num_cpus": 0}
    stopped = cluster.submit(cluster.settings("stopped"), description | {"metadata": {"who": "me"}})
    left = cluster.submit(cluster.settings("left"), description)
    name, _ = finish(cluster.submit(cluster.settings("unwatched"), description, wait=False), 0)
    assert name.strip() == cluster.job("unwatched")["submission_id"]

    def asleep(out: str) -> str:
        job = cluster.job(out)
        return job["submission_id"] if job and "let me sleep" in cluster.logs(job["submission_id"]) else ""

    name = wait_until(lambda: asleep("stopped"))
    assert cluster.job("stopped")["metadata"]["who"] == "me"
    assert cluster.job("stopped")["entrypoint"].startswith(f"{sleeper} -m videoar")
    cluster.stop(name)
    out, err = finish(stopped, 3)
    assert "let me sleep\n" in out and err.endswith(
        "status 3 (Job was intentionally stopped); the same command goes on from there\n"
    )
    name = wait_until(lambda: asleep("left"))
    wait_until(lambda: "let me sleep" in (left.stdout.readline() if left.stdout else ""))  # it follows
    left.send_signal(signal.SIGINT)
    assert f"ray job logs -f --address {cluster.head.address} {name}" in finish(left, 130)[1]
    assert cluster.job("left")["status"] == "RUNNING"
    for out in ("left", "unwatched"):
        cluster.stop(wait_until(lambda out=out: asleep(out)))
    out, err = finish(missing, 2)
    assert f"videoar encode: {tmp_path / 'none'} holds no tokenizer" in out
    assert err.endswith("ended with status 2 (Job entrypoint command failed with exit code 2)\n")


def test_an_address_that_nobody_answers_and_a_wrong_token(cluster: Cluster):
    nobody = cluster.submit(cluster.settings("none"), address="http://127.0.0.1:9")
    stranger = cluster.submit(cluster.settings("none"), RAY_AUTH_TOKEN="another")
    assert "no Ray cluster answers at http://127.0.0.1:9 (Failed to connect" in finish(nobody, 1)[1]
    assert (
        f"{cluster.head.address} refuses the token or misses one: put the token of its head" in finish(stranger, 1)[1]
    )
    assert cluster.job("none") == {}


ENCODE = asdict(EncodeConfig("/raw", "/tokenizer", "/out", ray_address="http://head:8265", fps=8.0))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shards": "raw"}, "--shards is 'raw': give an absolute path, one that every node"),
        ({"out": "out"}, "--out is 'out'"),
        ({"text_encoder": "t5:models/t5"}, "--text_encoder t5: is 'models/t5'"),
        ({"ray_address": None}, "--submit needs the address of a Ray cluster"),
    ],
)
def test_what_no_cluster_could_do_is_refused_before_it_is_asked(changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        submit_encode(ENCODE | changes, RayJobConfig())


def test_the_driver_gets_the_settings_and_the_description(tmp_path: Path):
    job = RayJobConfig("/py", "/project", {"A": "1"}, 0.5, {"head": 0.1}, {"out": "mine"})
    request = job.request(ENCODE)
    assert request["runtime_env"] == {"env_vars": {"A": "1", "PYTHONPATH": "/project"}}
    assert (request["entrypoint_num_cpus"], request["entrypoint_resources"]) == (0.5, {"head": 0.1})
    assert request["metadata"] == {"out": "mine", "variants": "64x64x17"}
    words = shlex.split(request["entrypoint"])
    assert words[:4] == ["/py", "-m", "videoar", "encode"]
    assert settings.load(EncodeConfig, None, words[4:]) == EncodeConfig(**ENCODE | {"ray_address": "auto"})
    listed = ENCODE | {"variants": VARIANTS, "out": "/a folder/$x", "latents": True}
    words = shlex.split(job.request(listed)["entrypoint"])
    assert settings.load(EncodeConfig, None, words[4:]) == EncodeConfig(**listed | {"ray_address": "auto"})
    for changes, message in (
        ({"python": "python3"}, "job's python is 'python3'"),
        ({"entrypoint_num_cpus": -1}, "at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            RayJobConfig(**changes)


def test_without_ray_counting_raises_nothing():
    metrics = EncodeMetrics()
    metrics.show({"32x32x17": 1000}, 2)
    metrics.shard_done("32x32x17", {"rows_out": 3, "shapes": {"32x32x17": 3}, "dead": [{}]}, 1.0)
    metrics.worker_lost()


def test_options_of_submitting_need_submit(capsys: pytest.CaptureFixture):
    words = ["encode", "--shards=/raw", "--tokenizer=/tokenizer", "--out=/out"]
    assert main([*words, "--no-wait"]) == 2
    assert "give --submit too" in capsys.readouterr().err
