"""`videoar submit` on a real SLURM with two emulated nodes: preemption, node death, cancelling, sick nodes, chains, arrays, Ray.

One cluster serves the whole file. `benchmarks/slurm_faults.py` does the same at random moments and measures it.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.slurm_scene import SlurmScene
from data_pipelines.encode import EncodeConfig
from data_pipelines.moving_shapes import write_corpus
from data_pipelines.shard_part import ShardsConfig
from data_pipelines.shards import write_shards
from pretrain.events import read_events
from tests.cluster.emulated_slurm import EmulatedSlurm, missing
from tests.data_pipelines.encode_here import encode_here
from tests.pretrain.tiny import ROOT, stage
from tokenizer import VideoTokenizer
from tokenizer.autoencoder import AutoencoderConfig
from tokenizer.tokenizer import TokenizerConfig

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")
STEPS, EVERY = (100, 55), 25
"""Of the stages, and between checkpoints. Three stops must fit into the first stage, however short a step is beside the time that a stop
takes."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[EmulatedSlurm]:
    with (
        tempfile.TemporaryDirectory(prefix="vs-", ignore_cleanup_errors=True) as folder,
        EmulatedSlurm(Path(folder)) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def scene(slurm: EmulatedSlurm, tmp_path_factory: pytest.TempPathFactory) -> SlurmScene:
    """Two stages, gone through by an undisturbed run as one job on two nodes; in a folder whose name a shell would misread."""
    folder = tmp_path_factory.mktemp("slurm") / "a run; $HOME `id`"
    stages = [stage(folder / "codes", STEPS[0]), stage(folder / "codes", STEPS[1], name="two", lr=0.001)]
    scene = SlurmScene(folder, slurm, sum(STEPS), EVERY, stages)
    (job,) = scene.submit("whole", "--preflight=ranks")
    assert slurm.end_of(job)["JobState"] == "COMPLETED", scene.log("whole")
    assert {event["world_size"] for event in scene.starts("whole")} == {2}
    assert set(re.findall(r"^(?:ok|local|ranks) (n\d)$", scene.log("whole"), re.M)) == {"n1", "n2"}
    assert "2 ranks add up" in scene.log("whole")
    return scene


def test_a_run_that_is_cancelled_preempted_and_loses_a_node_ends_as_if_nothing_had_happened(scene: SlurmScene) -> None:
    slurm, name = scene.slurm, "disturbed"
    (job,) = scene.submit(name)
    scene.wait_for_step(job, name, 4)
    slurm.run("scancel", job)
    assert slurm.end_of(job)["JobState"] == "CANCELLED"  # saved, and not started again
    slurm.wait_for(job, lambda entry: "EndTime" in entry and not slurm.run("squeue", "-h", "-j", job, check=False))
    assert "SLURM took the job away" in scene.log(name)
    stopped = [event["global_step"] for event in read_events(scene.out(name)) if event["event"] == "stopped"]
    assert stopped == [scene.reached(name)]

    first, second = scene.submit(name, "--stages")
    assert slurm.job(second)["Dependency"].startswith(f"afterok:{first}")
    since = time.time()
    for number, how in enumerate(("limit", "urgent"), 1):
        assert scene.wait_for_step(first, name, scene.reached(name) + 4, since)
        scene.preempt(first, how)
        since = scene.wait_for_restart(first, number)
        at = scene.reached(name)
        assert scene.wait_for_start(name, since)["global_step"] == at  # no step is lost, and none is done again
    assert slurm.end_of(first)["JobState"] == "COMPLETED"
    assert scene.reached(name) == STEPS[0]

    scene.wait_for_step(second, name, STEPS[0] + EVERY + 2)
    died = time.time()
    slurm.power_off("n2")
    at = scene.reached(name)
    slurm.power_on("n2")
    start = scene.wait_for_start(name, died)
    assert STEPS[0] + EVERY <= start["global_step"] and at - start["global_step"] <= EVERY
    assert slurm.end_of(second)["JobState"] == "COMPLETED", scene.log(name)
    assert scene.same(name) == []


def test_a_sick_node_is_left_out(scene: SlurmScene) -> None:
    (job,) = scene.submit("whole", "--nodes=1", '--env={"VIDEOAR_SICK_NODE": "n1", "GLOO_SOCKET_IFNAME": "lo"}')
    ended = scene.slurm.end_of(job)  # nothing was left to train
    log = scene.log("whole")
    found = [ended[name] for name in ("JobState", "Restarts", "ExcNodeList", "BatchHost")]
    assert found == ["COMPLETED", "1", "n1", "n2"], log
    assert "bad n1: tried out: VIDEOAR_SICK_NODE names it" in log and "sick: n1; it starts again without" in log


CRASH = """
import os, signal, time
if "TORCHELASTIC_RUN_ID" in os.environ:
    if os.environ["SLURMD_NODENAME"] == "n1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(5)
"""
"""Python runs it at its start: the first node's rank crashes, the other node's is seconds later than it, and has no store any more."""


def test_of_two_nodes_only_the_one_whose_rank_crashes_is_left_out(scene: SlurmScene, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    (job,) = scene.submit("whole", "--preflight=ranks", f"--env={json.dumps(env)}")
    judged = scene.slurm.wait_for(job, lambda one: one["ExcNodeList"] != "(null)" or one["JobState"] == "FAILED")
    scene.slurm.run("scancel", job)  # it would wait for a second node for ever
    log = (scene.out("whole") / "slurm" / f"videoar-{job}.log").read_text()
    assert (judged["ExcNodeList"], judged["Restarts"]) == ("n1", "1"), log
    assert re.findall(r"^(?:bad|local) n\d.*", log, re.M) == ["bad n1: rank 0 died of SIGKILL", "local n2"]
    assert "sick: n1; it starts again without" in log


def test_a_run_that_fails_again_and_again_is_given_up(scene: SlurmScene) -> None:
    short = ("--nodes=1", "--preflight=off")
    (failing,) = scene.submit("failing", *short, "--python=/bin/false", "--max_restarts=1")
    late = scene.folder / "late.sh"
    late.write_text("#!/bin/sh\nexec sleep 600\n")  # told to stop in a start that does not come to a step
    late.chmod(0o755)
    # a mistake in the settings is no reason to try again
    (mistaken,) = scene.submit("mistaken", *short, "--", "--tokenizer", str(scene.folder / "nowhere"))
    (short_of_time,) = scene.submit("late", *short, f"--python={late}", "--max_restarts=1")
    for start in range(2):
        scene.slurm.wait_for(short_of_time, lambda _, start=start: scene.log("late").count(" on n") > start)
        scene.preempt(short_of_time, "limit")
    ended = scene.slurm.end_of(short_of_time)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "1"), scene.log("late")
    assert scene.log("late").count("told to stop before the time limit with nothing new saved since it began") == 2
    ended = scene.slurm.end_of(failing)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1")
    assert "it has failed 2 times since the beginning: no further start" in scene.log("failing")
    ended = scene.slurm.end_of(mistaken)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), scene.log("mistaken")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/ (several), tokenizer/, and codes/, encoded here."""
    base = tmp_path_factory.mktemp("raw")
    write_corpus(base / "corpus", clips=4, seed=0, size=32, validation=1)
    write_shards(base / "corpus" / "train.csv", base / "shards", ShardsConfig(workers=1, shard_size=6000))
    torch.manual_seed(0)
    sizes = AutoencoderConfig(dim=8, base_width=8, multipliers=(1, 2, 2), blocks=1, patch=4)
    VideoTokenizer(TokenizerConfig(sizes, num_scales=2)).save_pretrained(base / "tokenizer")
    encode_here(EncodeConfig(str(base / "shards"), str(base / "tokenizer"), str(base / "codes"), "32x32x5"))
    return base


def codes(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted((folder / "32x32x5").rglob("*"))
        if file.is_file()
    }


def encode_words(raw: Path, out: Path) -> list[str]:
    return [
        "--shards",
        str(raw / "shards"),
        "--tokenizer",
        str(raw / "tokenizer"),
        "--out",
        str(out),
        "--variants=32x32x5",
    ]


@pytest.mark.parametrize(
    ("name", "booking"), [("array", ["--array=2", "--nodes=1"]), ("ray", ["--nodes=2", "--cpus_per_node=1"])]
)
def test_encodings_come_in_parts_or_on_a_ray_cluster(
    scene: SlurmScene, raw: Path, name: str, booking: list[str]
) -> None:
    out = scene.folder / name
    words = ["--command=encode", *booking, "--exclusive=false", "--", *encode_words(raw, out), "--num_workers=1"]
    (job,) = scene.videoar(*words).split()
    for part in ("_0", "_1") if name == "array" else ("",):
        assert scene.slurm.end_of(f"{job}{part}")["JobState"] == "COMPLETED", scene.log(name)
    assert codes(out) == codes(raw / "codes")
    if name == "array":
        assert len(list((out / "slurm").glob("*.log"))) == 2
        assert len(json.loads((raw / "shards" / "index.json").read_text())["shards"]) > 2


def test_what_slurm_refuses_is_told(scene: SlurmScene, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RuntimeError, match="status 2"):
        scene.submit("refused", "--partition=nowhere")
    said = capsys.readouterr().err
    # with a line of its own before it where the controller answers first
    assert "SLURM refuses the job (" in said and "Batch job submission failed: Invalid partition name" in said
    assert (scene.out("refused") / "slurm" / "videoar.sbatch").is_file()
