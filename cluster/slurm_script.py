"""The sbatch script of a job: a header, the settings, `jobs/slurm.sh` (signals, requeueing, restarts), the steps, and their order."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.slurm_config import SlurmConfig, check_path
from tokenizer.errors import UserError

BODY = Path(__file__).with_name("jobs") / "slurm.sh"
PROJECT = Path(__file__).resolve().parents[1]
LAST_WORDS = 60
"""Seconds that the other nodes' launchers have once the first has ended."""


@dataclass(frozen=True)
class Work:
    """What a job runs.

    Args:
        name: of the script and the job: letters, digits and . _ + -.
        run: absolute path of the run's folder; script, settings and logs go to its sub-folder `slurm`.
        progress: the folder whose newest `step-N`, or numbered entry, tells whether a failing run gets on.
        words: the `videoar` command: sub-command and arguments.
        reads: absolute paths of what every node must be able to read.
        ranks: the command is a training under torchrun; False: a driver with Ray around it where there are several nodes.
        workers_threads: threads of an encoding worker, to fill a node's cores with workers; 0: the settings say how many.
    """

    name: str
    run: Path
    progress: Path
    words: tuple[str, ...]
    reads: tuple[str, ...] = ()
    ranks: bool = True
    workers_threads: int = 0

    @property
    def folder(self) -> Path:
        """Where the script and its logs lie."""
        return self.run / "slurm"


def script(job: SlurmConfig, work: Work, working_folder: Path) -> str:
    """The script's text.

    Args:
        job: the booking.
        work: what it runs.
        working_folder: absolute; where the command runs, so that relative paths in its settings mean the same.

    Raises:
        UserError: a path can't be used.
    """
    for what, path in (("the run's folder", work.run), ("the working folder", working_folder)):
        check_path(what, str(path))
    project = job.project or str(PROJECT)
    python = job.python or ("python" if job.container else sys.executable)
    steps = _Steps(job, work, working_folder, project, python)
    order = ["inspect health"] if job.preflight != "off" else []
    if job.preflight == "ranks" and work.ranks:
        order += ["port=$(free_port); inspect ranks"]
    order += ["port=$(free_port)", "follow launch; status=$?", '[ "$status" = 0 ] || judge "$status"', 'say "done"']
    settings = {
        "run": work.run,
        "progress": work.progress,
        "max_restarts": job.max_restarts,
    }
    parts = [
        "#!/bin/bash",
        "# Written by `videoar submit`. It can be read, changed, and submitted again by: sbatch THIS_FILE",
        *(f"#SBATCH {line}" for line in _header(job, work)),
        "",
        "set -u",
        *(f"{name}={shlex.quote(str(value))}" for name, value in settings.items()),
        "",
        BODY.read_text().rstrip("\n"),
        "",
        f"cd {shlex.quote(str(working_folder))} || exit 1",
        *(f"module load {name}" for name in job.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in _environment(job, project).items()),
        "",
        *steps.functions(),
        "# ---- the order",
        *order,
    ]
    return "\n".join(parts) + "\n"


def _header(job: SlurmConfig, work: Work) -> list[str]:
    log = work.folder / f"{work.name}-{'%A_%a' if job.array else '%j'}.log"
    values: list[tuple[str, object]] = [
        ("job-name", work.name),
        ("nodes", job.nodes),
        ("ntasks-per-node", 1),
        ("gpus-per-node", job.gpus_per_node or None),
        ("cpus-per-task", job.cpus_per_node),
        ("mem", job.memory_per_node),
        ("time", job.time),
        ("partition", job.partition),
        ("account", job.account),
        ("qos", job.qos),
        ("array", _array(job)),
        ("dependency", job.dependency),
        ("kill-on-invalid-dep", "yes"),
        ("signal", f"B:USR1@{job.warn_seconds}"),
        ("open-mode", "append"),
        ("output", f'"{log}"' if " " in str(log) else log),
    ]
    lines = [f"--{name}={value}" for name, value in values if value is not None]
    lines += ["--requeue"] + (["--exclusive"] if job.exclusive else [])
    return lines + [f"--{name}={value}" if value else f"--{name}" for name, value in job.options.items()]


def _array(job: SlurmConfig) -> str | None:
    if not job.array:
        return None
    return f"0-{job.array - 1}" + (f"%{job.array_limit}" if job.array_limit else "")


def _environment(job: SlurmConfig, project: str) -> dict[str, str]:
    return {"PYTHONPATH": project, "PYTHONUNBUFFERED": "1", **job.env}


@dataclass(frozen=True)
class _Steps:
    """The job's steps as shell functions; each runs one task a node."""

    job: SlurmConfig
    work: Work
    working_folder: Path
    project: str
    python: str

    def functions(self) -> list[str]:
        lines = ["# ---- the steps: one task a node"]
        if self.job.preflight != "off":
            lines += self._function("health", "devices, disks and data of each node", self._health())
        if self.job.preflight == "ranks" and self.work.ranks:
            lines += self._function(
                "ranks", "all ranks add up numbers", [*self._torchrun(), "-m", "parallel.preflight"]
            )
        return lines + self._function("launch", "the work itself", self._launch())

    def _function(self, name: str, comment: str, words: Sequence[str]) -> list[str]:
        return [f"{name}() {{ # {comment}", "  exec " + " \\\n    ".join(_lines([*self._srun(), *words])), "}", ""]

    def _srun(self) -> list[str]:
        job = self.job
        words = [
            "srun", '--nodes="$SLURM_JOB_NUM_NODES"', '--ntasks="$SLURM_JOB_NUM_NODES"', "--ntasks-per-node=1", "--input=none",
            # the others have time to save where one has ended; and no launcher is tied to one core
            f"--wait={LAST_WORDS}", "--kill-on-bad-exit=0", "--cpu-bind=none",
        ]  # fmt: skip
        if job.cpus_per_node:
            words.append(f"--cpus-per-task={job.cpus_per_node}")
        if not job.container:
            return words
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in (*job.mounts, *self._own_mounts())]
        if job.container_runtime == "pyxis":
            listed = shlex.quote(",".join(mounts))
            where = shlex.quote(str(self.working_folder))
            return [
                *words,
                f"--container-image={job.container}",
                f"--container-mounts={listed}",
                f"--container-workdir={where}",
            ]
        binds = [f"--bind={shlex.quote(mount)}" for mount in mounts]
        gpus = ["--nv"] if job.gpus_per_node else []
        return [
            *words,
            "apptainer",
            "exec",
            *gpus,
            *binds,
            f"--pwd={shlex.quote(str(self.working_folder))}",
            job.container,
        ]

    def _own_mounts(self) -> list[str]:
        return list(dict.fromkeys((self.project, str(self.work.run), str(self.working_folder))))

    def _health(self) -> list[str]:
        reads = [word for path in self.work.reads for word in ("--reads", shlex.quote(path))]
        sizes = ["--gpus", str(self.job.gpus_per_node), "--processes", str(self.job.processes)]
        return [shlex.quote(self.python), "-m", "cluster.health", "--run", '"$run"', *sizes, *reads]

    def _torchrun(self) -> list[str]:
        # an id of its own for each start: a process that an earlier start left behind finds no place in this one
        return [
            shlex.quote(self.python), "-m", "parallel.launch", '--nnodes="$SLURM_JOB_NUM_NODES"',
            f"--nproc-per-node={self.job.processes}", "--rdzv-backend=static", '--rdzv-endpoint="$head:$port"',
            '--rdzv-id="$SLURM_JOB_ID-$restart"',
        ]  # fmt: skip

    def _launch(self) -> list[str]:
        words = [shlex.quote(word) for word in self.work.words]
        if self.work.ranks:
            return [*self._torchrun(), "-m", "videoar", *words]
        if self.job.array:
            words += [f"--parts={self.job.array}", '--part="$SLURM_ARRAY_TASK_ID"']
        driver = [shlex.quote(self.python), "-m", "videoar", *words]
        if self.job.nodes == 1:
            if threads := self.work.workers_threads:
                # Ray would count the machine's cores, not the job's
                driver.append(f"--num_workers=$((SLURM_CPUS_ON_NODE > {threads} ? SLURM_CPUS_ON_NODE / {threads} : 1))")
            return driver
        return [
            shlex.quote(self.python), "-m", "cluster.ray_node", '--head="$head:$port"', '--nodes="$SLURM_JOB_NUM_NODES"',
            '--notes="$notes"', "--", *driver, "--ray_address=auto",
        ]  # fmt: skip


def _lines(words: Sequence[str]) -> list[str]:
    """Some words a line, for readers."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) < 110:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def check_work(job: SlurmConfig, work: Work) -> None:
    """Raises UserError where booking and work don't fit together."""
    if work.ranks and job.array:
        raise UserError(f"array is {job.array}: only encodings come in parts; a training takes more nodes instead.")
    if job.array and job.nodes > 1:
        raise UserError(
            f"array is {job.array} and nodes is {job.nodes}: a part has one node; set nodes to 1, or array to 0."
        )
