"""What `videoar submit` refuses and what it writes, without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster import health
from cluster.slurm import safe_name, submit
from cluster.slurm_config import DESCRIPTION, SlurmConfig, seconds
from cluster.slurm_encode import encode_work
from cluster.slurm_script import Work, check_work, script
from data_pipelines.encode import EncodeConfig
from parallel.launch import exit_status
from pretrain.submission import pretrain_work
from tests.pretrain.tiny import ROOT, stage, write_run
from tokenizer import settings
from tokenizer.errors import UserError
from videoar import main

BAD = [
    ("name", "a b", "name is 'a b'"),
    ("name", "--wrap=reboot", "name is"),
    ("name", "a\n#SBATCH --uid=0", "name is"),
    ("partition", "gpu;reboot", "partition is"),
    ("account", "$(id)", "account is"),
    ("qos", "`id`", "qos is"),
    ("time", "soon", "time is 'soon': it must be SLURM's form"),
    ("time", "24:00:00;id", "time is"),
    ("time", "1-", "time is"),
    ("memory_per_node", "9 G", "memory_per_node is"),
    ("dependency", "afterok:1;id", "dependency is"),
    ("dependency", "afterok:1,nonsense", "dependency is"),
    ("container", "image --privileged", "container is"),
    ("options", {"Reservation": "x"}, "an option's name is"),
    ("options", {"reservation": "x y"}, "options.reservation is"),
    ("options", {"reservation": "x\ny"}, "options.reservation is"),
    ("options", {"output": "/etc/passwd"}, "options has output, which the script sets itself"),
    ("env", {"A B": "1"}, "a variable of env is"),
    ("env", {"A": "1\nreboot"}, "env.A has a line break"),
    ("modules", ["cuda;id"], "a module is"),
    ("mounts", ["data:/data"], "the mount 'data:/data'"),
    ("mounts", ["/a:/b,/c:/d"], "the mount"),
    ("python", "python3", "the job's python is 'python3'"),
    ("project", "/a'b", "means something else to sbatch"),
    ("nodes", 0, "nodes is 0"),
    ("gpus_per_node", -1, "gpus_per_node is -1"),
    ("processes_per_node", 0, "processes_per_node is 0"),
    ("warn_seconds", 0, "warn_seconds is 0"),
    ("warn_seconds", 70000, "from 1 to 65535"),
    ("time", "5", "time is '5', 300 s, of which warn_seconds takes the last 300: .* above 420 s"),
    ("time", "00:07:00", "time is '00:07:00', 420 s, of which"),
    ("max_restarts", -1, "max_restarts is -1"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), BAD, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(BAD)]
)
def test_what_could_be_shell_code_or_nonsense_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        SlurmConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("time", ["90", "24:00:00", "2-00", "2-12:30", "2-12:30:00", "90:30"])
@pytest.mark.parametrize(
    "dependency", [None, "singleton", "afterok:1:2", "afterok:1,afterany:2_3", "after:4+10?afternotok:5"]
)
def test_what_sbatch_takes_is_taken(time: str, dependency: str | None) -> None:
    assert SlurmConfig(time=time, dependency=dependency).time == time


def test_a_time_limit_is_read_as_sbatch_reads_it() -> None:
    told = {
        "90": 5400,
        "90:30": 5430,
        "24:00:01": 86401,
        "2-00": 172800,
        "2-12:30": 217800,
        "1-00:00:07": 86407,
        "0": 0,
    }
    assert {text: seconds(text) for text in told} == told
    assert SlurmConfig(time="0").time == "0"  # none
    assert SlurmConfig(time="8").time == "8" and SlurmConfig(time="3", warn_seconds=59).warn_seconds == 59


def test_the_file_beside_the_code_says_what_the_class_does() -> None:
    job = settings.load(SlurmConfig, DESCRIPTION)
    assert job == SlurmConfig(env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    assert list(yaml.safe_load(DESCRIPTION.read_text())) == [
        name for name in settings.to_dict(SlurmConfig()) if name not in ("dependency", "array", "array_limit")
    ]


def header(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def work(**changes) -> Work:
    return Work(
        **{"name": "run", "run": Path("/runs/l"), "progress": Path("/runs/l/checkpoints"), "words": ("pretrain",)}
        | changes
    )


def test_each_setting_of_a_booking_has_its_place() -> None:
    plain = script(SlurmConfig(), work(), Path("/here"))
    job = SlurmConfig(
        nodes=4, gpus_per_node=4, processes_per_node=2, cpus_per_node=64, memory_per_node="900G", time="1-00:00:00", partition="a,b",
        account="ac", qos="high", exclusive=False, options={"constraint": "h100&ib", "spread-job": None}, dependency="afterok:7",
        warn_seconds=120, max_restarts=5, python="/py", project="/code", modules=["cuda/13.0"], env={"NAME": "it's $HOME"},
    )  # fmt: skip
    text = script(job, work(), Path("/here"))
    for line in (
        "--nodes=4", "--gpus-per-node=4", "--cpus-per-task=64", "--mem=900G", "--time=1-00:00:00", "--partition=a,b", "--account=ac",
        "--qos=high", "--constraint=h100&ib", "--spread-job", "--dependency=afterok:7", "--signal=B:USR1@120",
    ):  # fmt: skip
        assert line in header(text) and line not in header(plain)
    assert "--exclusive" in header(plain) and "--exclusive" not in header(text)
    for words in (
        "max_restarts=5", "export PYTHONPATH=/code", "module load cuda/13.0", "export NAME='it'\"'\"'s $HOME'", "--nproc-per-node=2",
        "--gpus 4", "--processes 2", "--cpus-per-task=64", "/py -m parallel.launch",
    ):  # fmt: skip
        assert words in text and words not in plain, words
    for one in (plain, text):
        subprocess.run(["bash", "-n"], input=one, text=True, check=True)


@pytest.mark.parametrize(("preflight", "steps"), [("off", []), ("node", ["health"]), ("ranks", ["health", "ranks"])])
def test_checks_before_a_start_can_be_left_out(preflight: str, steps: list[str]) -> None:
    text = script(SlurmConfig(preflight=preflight), work(), Path("/here"))  # type: ignore[arg-type]
    assert [name for name in ("health", "ranks") if f"inspect {name}" in text] == steps


def test_containers() -> None:
    job = SlurmConfig(container="docker://nvcr.io#nvidia/pytorch:26.01-py3", mounts=["/data", "/a b:/b"])
    text = script(job, work(), Path("/here"))
    assert "--container-image=docker://nvcr.io#nvidia/pytorch:26.01-py3" in text
    assert (
        f"--container-mounts='/data:/data,/a b:/b,{Path(__file__).parents[2]}:" in text
        and "--container-workdir=/here" in text
    )
    assert " python -m parallel.launch" in text  # the image's
    own = script(
        SlurmConfig(container="/images/v.sif", container_runtime="apptainer", mounts=["/data"]), work(), Path("/here")
    )
    assert "apptainer exec --nv --bind=/data:/data" in own.replace(" \\\n   ", "") and "--container-image" not in own
    assert "--nv" not in script(
        SlurmConfig(container="/v.sif", container_runtime="apptainer", gpus_per_node=0), work(), Path("/here")
    )


def test_arrays_and_ray_are_for_encodings(tmp_path: Path) -> None:
    encode = settings.to_dict(EncodeConfig("/raw", "/tokenizer", str(tmp_path / "out"), "32x32x17,64x64x17", threads=2))
    parts = SlurmConfig(array=8, array_limit=2)
    text = script(parts, encode_work(encode, parts, write=True), tmp_path)
    assert "--array=0-7%2" in header(text) and '--parts=8 --part="$SLURM_ARRAY_TASK_ID"' in text.replace(" \\\n   ", "")
    assert "SLURM_CPUS_ON_NODE / 2" in text and "parallel.launch" not in text
    assert settings.load(EncodeConfig, tmp_path / "out" / "slurm" / "videoar.yaml") == EncodeConfig(**encode)
    ray = SlurmConfig(nodes=3)
    assert "cluster.ray_node" in script(ray, encode_work(encode, ray, write=False), tmp_path)
    with pytest.raises(UserError, match="only encodings come in parts"):
        check_work(parts, work())
    with pytest.raises(UserError, match="a part has one node"):
        check_work(SlurmConfig(array=2, nodes=2), work(ranks=False))
    with pytest.raises(UserError, match="set by the job's script"):
        encode_work(encode | {"parts": 2}, parts, write=False)
    with pytest.raises(UserError, match="a folder that every node"):
        encode_work(encode | {"out": "s3://bucket/out"}, parts, write=False)


@pytest.mark.parametrize("folder", ["a%j", 'a"b', "a'b", "a\\b", "a\nb"])
def test_a_folder_that_sbatch_would_misread_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match="the run's folder"):
        script(SlurmConfig(), work(run=Path("/runs") / folder), Path("/here"))


def test_bad_words_end_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write_run(tmp_path))
    base = ["submit", "--config", file, "--gpus_per_node=0", "--dry-run"]
    for words, message in (
        (["--nodse=2"], "unknown key 'nodse': the nearest known key is 'nodes'"),
        (["--nodes=two"], "do not fit SlurmConfig"),
        (["--time=soon"], "time is 'soon'"),
        (["--nodes=3", "--", "--parallel.tensor_parallel_size=2"], "start 2 or 4 processes"),
        (["--nodes=4", "--", "--parallel.tensor_parallel_size=4"], "num_attention_heads 2 does not divide"),
        (["--nodes=4", "--", "--parallel.pipeline_parallel_size=4"], "num_layers 2 does not divide"),
        (["--nodes=3"], "global_batch_size 4 is no multiple of micro_batch_size 2 x 3 data-parallel ranks"),
        (["--", "--resilience.hang_monitor=nvidia"], "whose ft_launcher a SLURM job's script does not use"),
        (["--", "--optimzer.lr=1"], "unknown key 'optimzer.lr'"),
        (["--", "--last_stage=two"], "last_stage is 'two': choose one of the stages, one"),
        (["--command=encode", "--stages"], "--stages makes a job of each stage of a training"),
        (["--array=2"], "only encodings come in parts"),
    ):
        assert main([*base, *words]) == 2, words
        assert message in capsys.readouterr().err
    recipe = ["submit", "--config", str(ROOT / "pretrain" / "configs" / "t2v-4b.yaml"), "--dry-run", "--nodes"]
    assert main([*recipe, "3"]) == 2 and "x 6 data-parallel ranks: choose a multiple of 24" in capsys.readouterr().err
    assert main([*recipe, "4"]) == 0 and "--nodes=4" in capsys.readouterr().out
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(base[:-1]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = str(write_run(tmp_path))
    assert (
        main(["submit", "--config", file, "--nodes", "2", "--gpus_per_node", "1", "--dry-run", "--", "--seed", "7"])
        == 0
    )
    text = capsys.readouterr().out
    assert "#SBATCH --nodes=2" in text and "--nproc-per-node=1" in text
    assert not (tmp_path / "run").exists()
    assert submit(SlurmConfig(), [work(run=tmp_path / "x")], dry_run=True) == [] and not (tmp_path / "x").exists()


def test_names_are_what_file_systems_and_slurm_like() -> None:
    assert [safe_name(text) for text in ("I: images", "../x", "stage-2", "--", "ä")] == [
        "I-images",
        "x",
        "stage-2",
        "stage",
        "stage",
    ]


@pytest.mark.parametrize(
    ("codes", "asked", "status"),
    [
        ([3, 3], False, 3), ([3, -15], False, 3), ([-15, -10], True, 3), ([-15], False, 1), ([1, -15], True, 1), ([-9], True, 1),
        ([2, -15], False, 2), ([3, 2], True, 2), ([4], False, 1), ([-11], False, 1),
    ],
)  # fmt: skip
def test_a_launchers_status_says_how_its_ranks_ended(codes: list[int], asked: bool, status: int) -> None:
    assert exit_status(codes, asked) == status


def test_a_sick_node_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    (tmp_path / "data").write_text("x")
    words = ["--run", str(tmp_path / "run"), "--reads", str(tmp_path / "data"), "--reads", str(tmp_path)]
    assert health.main(words) == 0 and capsys.readouterr().out == "ok n7\n"
    (tmp_path / "file").write_text("")
    disk = os.statvfs(tmp_path)
    for more, reason in (
        (["--reads", str(tmp_path / "gone")], f"bad n7: {tmp_path}/gone: [Errno 2]"),
        (["--run", str(tmp_path / "file" / "run")], "bad n7: the run's folder: [Errno 20]"),
        (["--free", str(2 * disk.f_blocks * disk.f_frsize)], "bad n7: the run's folder: "),
        (["--processes", "100000000"], "bad n7: shared memory: "),
    ):
        assert health.main([*words, *more]) == 1
        assert capsys.readouterr().out.startswith(reason)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert health.main([*words, "--gpus", "8"]) == 1
    assert "bad n7: GPUs: there is no nvidia-smi" in capsys.readouterr().out
    for fault, status in (("n7", 1), ("n8", 0)):
        monkeypatch.setenv("VIDEOAR_SICK_NODE", fault)
        assert health.main(words) == status


def test_shards_in_sub_folders_are_read_too(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    file = write_run(
        tmp_path, stages=[stage(tmp_path / "codes", 2, validation="held-out"), stage(tmp_path / "codes", 2)]
    )
    shutil.copytree(tmp_path / "codes", tmp_path / "held-out")
    words = ["--root", str(tmp_path)]
    [run] = pretrain_work(file, words, SlurmConfig(gpus_per_node=0), stages=False, write=False)
    assert run.reads == tuple(str(tmp_path / name) for name in ("tokenizer", "codes", "held-out"))

    def check() -> str:
        health.main(["--run", str(run.run), *(word for path in run.reads for word in ("--reads", path))])
        return capsys.readouterr().out

    assert check() == "ok n7\n"
    [shard] = (tmp_path / "held-out").rglob("*.mds")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert f"bad n7: {tmp_path}/held-out: {shard} has {len(whole) - 1} bytes, its index says {len(whole)}" in check()
    shard.unlink()
    assert f"bad n7: {tmp_path}/held-out: [Errno 2] No such file or directory: '{shard}'" in check()
    (tmp_path / "held-out" / "index.json").write_text("[]")
    assert "is no index of shards" in check()


@pytest.mark.parametrize(
    ("count", "chosen"), [(1, [0]), (3, [0, 1, 2]), (8, list(range(8))), (71, list(range(0, 71, 10)))]
)
def test_shards_from_the_first_to_the_last_are_chosen(tmp_path: Path, count: int, chosen: list[int]) -> None:
    (tmp_path / "1").touch()
    listed = [
        {"zip_data": {"basename": f"{n}", "bytes": 1}, "raw_data": {"basename": f"{n}.raw", "bytes": 2}}
        for n in range(count)
    ]
    (tmp_path / "index.json").write_text(json.dumps({"shards": listed}))
    found = health.shards(tmp_path / "index.json")
    # of a packed shard the raw file is made where it is first read
    assert found == [(tmp_path / (f"{n}" if n == 1 else f"{n}.raw"), 1 if n == 1 else 2) for n in chosen]


def test_a_disk_that_does_not_answer_is_a_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it waits for a writer, as a dead network disk waits for its server
    assert health.answer(lambda: print((tmp_path / "pipe").read_text()), 0.2) == "no answer in 0 s"
    os.close(os.open(tmp_path / "pipe", os.O_RDWR))
    assert health.answer(lambda: health.space(tmp_path, 0.0), 5.0) == ""
