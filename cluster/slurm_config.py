"""How a job is booked on a SLURM cluster: the settings of `videoar submit`, checked so that no value can become shell code.

Values that stand in `#SBATCH` lines must match a pattern; values that stand in commands are quoted as well (`slurm_script`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenizer.errors import UserError, check_each

DESCRIPTION = Path(__file__).with_name("jobs") / "slurm.yaml"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
LIST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+,-]*")
MEMORY = re.compile(r"\d+[KMGT]?")
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d")
OPTION = re.compile(r"[a-z][a-z0-9-]*")
VALUE = re.compile(r"[A-Za-z0-9@][A-Za-z0-9@._+,:=/&|*()\[\]-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
DEPENDENCY = re.compile(r"(singleton|(after|afterany|afterok|afternotok|aftercorr)(:\d+(_\d+)?(\+\d+)?)+)([,?].*)?")
IMAGE = re.compile(r"[A-Za-z0-9/][A-Za-z0-9._/:@#+=-]*")
START = 120
"""Seconds of a start that must fit into a job besides the warning: the checks before it, imports, restoring, a step."""
OWN = (
    "job-name", "nodes", "ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "cpus-per-task", "mem", "time",
    "partition", "account", "qos", "exclusive", "signal", "requeue", "no-requeue", "open-mode", "output", "error",
    "array", "dependency", "kill-on-invalid-dep", "export", "chdir", "wrap", "parsable",
)  # fmt: skip
"""sbatch's options that the script sets itself."""


@dataclass(frozen=True)
class SlurmConfig:
    """A booking.

    Args:
        name: of the job, the script and the log.
        nodes: how many.
        gpus_per_node: GPUs; 0 books none.
        processes_per_node: ranks; null: one a GPU, or one where there are none.
        cpus_per_node: cores; null: what the cluster gives.
        memory_per_node: as 900G, "0" for all of it; null: what the cluster gives.
        time: limit, as 24:00:00 or 2-00:00:00; null: the partition's longest.
        partition, account, qos: null: the cluster's default.
        exclusive: no other jobs on the nodes.
        options: more of sbatch's long options by name; null or "" for one without a value.
        dependency: what to wait for, in sbatch's words, as afterok:1234.
        array: an encoding in so many parts, each a job of its own; 0: one job.
        array_limit: parts at the same time; 0: as many as there is room for.
        warn_seconds: before the time limit a signal asks the run to save; a step and a save must fit in, and `time` must leave room for a
            start besides.
        max_restarts: of a run that fails without a new checkpoint since it failed last, or is stopped before the time limit without one
            since its start; preemptions and node losses that SLURM sees do not count.
        preflight: "node" looks at devices, disks and data of each node before each start, "ranks" also lets all ranks add up numbers, "off"
            does neither. A sick node is named and left out of the next start.
        container: an image; null: none.
        container_runtime: "pyxis" (srun's --container-image) or "apptainer".
        mounts: folders in the container, SOURCE:TARGET or one path for both.
        python: absolute path of the interpreter on the nodes, or in the image; null: this one's, or "python" in an image.
        project: absolute path of the checkout there, the processes' PYTHONPATH; null: this one's.
        modules: for `module load`.
        env: environment of all processes.
    """

    name: str = "videoar"
    nodes: int = 1
    gpus_per_node: int = 8
    processes_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_per_node: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclusive: bool = True
    options: dict[str, str | None] = field(default_factory=dict)
    dependency: str | None = None
    array: int = 0
    array_limit: int = 0
    warn_seconds: int = 300
    max_restarts: int = 3
    preflight: Literal["off", "node", "ranks"] = "ranks"
    container: str | None = None
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[str] = field(default_factory=list)
    python: str | None = None
    project: str | None = None
    modules: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_each(self, ("nodes",), lambda value: value >= 1, "be at least 1")
        counts = ("gpus_per_node", "array", "array_limit", "max_restarts")
        check_each(self, counts, lambda value: value >= 0, "be at least 0")
        optional = ("processes_per_node", "cpus_per_node")
        check_each(self, optional, lambda value: value is None or value >= 1, "be at least 1, or null")
        check_each(self, ("warn_seconds",), lambda value: 1 <= value <= 65535, "be from 1 to 65535 (SLURM's limit)")
        for name in ("name", "account", "qos"):
            _check(name, getattr(self, name), NAME, "letters, digits and . _ + -")
        _check("partition", self.partition, LIST, "names of partitions with commas")
        _check("memory_per_node", self.memory_per_node, MEMORY, "a number with K, M, G or T, as 900G")
        _check("time", self.time, TIME, "SLURM's form, as 90 (minutes), 24:00:00 or 2-12:00:00")
        self._check_time()
        _check("dependency", self.dependency, DEPENDENCY, "sbatch's form, as afterok:1234")
        _check("container", self.container, IMAGE, "an image's path or address without spaces")
        for part in (self.dependency or "").replace("?", ",").split(","):
            _check("dependency", part or None, DEPENDENCY, "sbatch's form, as afterok:1234")
        self._check_collections()

    def _check_time(self) -> None:
        limit = seconds(self.time) if self.time else 0
        if 0 < limit <= self.warn_seconds + START:  # 0: none
            raise UserError(
                f"time is '{self.time}', {limit} s, of which warn_seconds takes the last {self.warn_seconds}: the job would be told to "
                f"stop before it has trained; set time above {self.warn_seconds + START} s, or lower warn_seconds."
            )

    def _check_collections(self) -> None:
        for name, value in self.options.items():
            _check("an option's name", name, OPTION, "one of sbatch's long options without the dashes")
            if name in OWN:
                raise UserError(
                    f"options has {name}, which the script sets itself: leave it out; see `videoar submit --help-settings`."
                )
            _check(f"options.{name}", value or None, VALUE, "a value of sbatch's without spaces or quotes")
        for name, value in self.env.items():
            _check("a variable of env", name, VARIABLE, "a variable's name")
            _check_printable(f"env.{name}", value)
        for name in self.modules:
            _check("a module", name, re.compile(r"[A-Za-z0-9][A-Za-z0-9._+/-]*"), "a module's name")
        for mount in self.mounts:
            _check_printable("a mount", mount)
            parts = mount.split(":")
            if len(parts) > 2 or "," in mount or not all(map(os.path.isabs, parts)):
                raise UserError(f"the mount '{mount}' is not SOURCE:TARGET: give two absolute paths without commas.")
        for name in ("python", "project"):
            path = getattr(self, name)
            if path is not None:
                check_path(f"the job's {name}", path)

    @property
    def processes(self) -> int:
        """Ranks a node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.nodes * self.processes


def seconds(time: str) -> int:
    """A time limit in SLURM's form."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not days and len(parts) < 3:
        parts = [0, *parts]  # minutes, with seconds or without
    hours, minutes, rest = (*parts, 0, 0)[:3]
    return ((24 * int(days or 0) + hours) * 60 + minutes) * 60 + rest


def check_path(what: str, path: str) -> None:
    """Raises UserError for a path that isn't absolute, or that can't stand in an `#SBATCH` line."""
    if not os.path.isabs(path) or "://" in path:
        raise UserError(f"{what} is '{path}': give an absolute path, one that every node of the cluster sees.")
    _check_printable(what, path)
    if bad := set(path) & set("%\"'\\"):
        raise UserError(
            f"{what} is '{path}': {' '.join(sorted(bad))} means something else to sbatch: choose another path."
        )


def _check_printable(what: str, text: str) -> None:
    if not text.isprintable():
        raise UserError(f"{what} has a line break or a control character: take it out.")


def _check(what: str, value: str | None, pattern: re.Pattern[str], form: str) -> None:
    if value is not None and not pattern.fullmatch(value):
        raise UserError(f"{what} is {value!r}: it must be {form}.")
