"""A real SLURM on this machine: controller, authentication and one daemon a node, with all state in a folder of its own.

    with EmulatedSlurm(folder, nodes=2) as slurm:
        slurm.run("srun", "-N2", "hostname")
        slurm.power_off("n2")

Each node is a process namespace with a host name of its own, so that `power_off` kills all of its processes at once, as a power loss
would. They share the machine's cores, files and network (127.0.0.1). Ports are free ones and everything is ended by its process id, so
that several can run side by side. Needs Debian's slurmctld, slurmd, slurm-client and munge (`make slurm`), and root for the namespaces.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "unshare")
CPUS = 8


def missing() -> str:
    """Why no SLURM can be started here; "" if one can."""
    absent = [program for program in PROGRAMS if _find(program) is None]
    if absent:
        return f"SLURM is not installed here ({', '.join(absent)}): run `make slurm`"
    if os.geteuid():
        return "emulated SLURM nodes need root, for a process namespace each"
    probe = subprocess.run(
        ["unshare", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "true"], capture_output=True
    )
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.decode().strip()}"


class EmulatedSlurm:
    """SLURM with nodes n1, n2, ... on this machine.

    Args:
        folder: for everything; its path must be short (a socket lies in it).
        nodes: how many.
        kill_wait: seconds between SLURM's SIGTERM and its SIGKILL, also where a job of the partition `urgent` takes the nodes.
    """

    def __init__(self, folder: Path, nodes: int = 2, kill_wait: int = 120):
        self.folder, self.kill_wait = folder, kill_wait
        self.names = [f"n{number + 1}" for number in range(nodes)]
        self.config = folder / "slurm.conf"
        self.environment = os.environ | {
            "SLURM_CONF": str(self.config),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._nodes: dict[str, subprocess.Popen] = {}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> EmulatedSlurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemons:
            subprocess.run(["scancel", "--me", "--full"], env=self.environment, capture_output=True, timeout=30)
        for process in (*self._nodes.values(), *reversed(self._daemons)):
            process.kill()  # a node's processes end with its namespace
            process.wait()

    def run(self, *words: str, check: bool = True) -> str:
        """Runs a command of SLURM's; its standard output."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: name -> value."""
        return dict(
            word.split("=", 1) for word in self.run("scontrol", "-o", "show", "job", number).split() if "=" in word
        )

    def wait_for(self, number: str, fits: Callable[[dict[str, str]], bool], seconds: float = 500.0) -> dict[str, str]:
        """Waits until a job is as it should be.

        Raises:
            TimeoutError: it is not after so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not fits(job := self.job(number)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {seconds:.0f} s the job is still {job}")
            time.sleep(0.1)
        return job

    def end_of(self, number: str, seconds: float = 500.0) -> dict[str, str]:
        """Waits until a job has ended for good, whatever became of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
        return self.wait_for(number, lambda job: job["JobState"] in over, seconds)

    def power_off(self, node: str) -> None:
        """kill -9 of all processes of a node."""
        process = self._nodes.pop(node)
        process.kill()
        process.wait()

    def power_on(self, node: str) -> None:
        """Starts a node; it has joined when this returns."""
        hosts = self.folder / "hosts"
        script = f"mount --bind {hosts} /etc/hosts; hostname {node}; exec slurmd -D -N {node} -f {self.config}"
        with (self.folder / "log" / f"{node}.out").open("ab") as log:
            self._nodes[node] = subprocess.Popen(
                ["unshare", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child", "sh", "-c", script],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        self._until(lambda: self._state(node) in ("idle", "mixed", "allocated", "completing"), f"node {node}")

    def _state(self, node: str) -> str:
        return self.run("sinfo", "-h", "-p", "main", "-n", node, "-o", "%T", check=False).strip()

    def _start(self) -> None:
        for name in ("state", "log", "run", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self.folder.chmod(0o755)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        hosts = Path("/etc/hosts").read_text().rstrip("\n")
        (self.folder / "hosts").write_text(f"{hosts}\n127.0.0.1 {' '.join(self.names)}\n")
        self.config.write_text(self._configuration())
        run = self.folder / "run"
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
            f"--log-file={self.folder}/log/munged.log", f"--seed-file={run}/munge.seed",
        )  # fmt: skip
        self._until((run / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c", "-f", str(self.config))
        self._until(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")
        for node in self.names:
            self.power_on(node)

    def _daemon(self, *words: str) -> None:
        with (self.folder / "log" / f"{words[0]}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    words, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    preexec_fn=_end_with_parent,
                )
            )  # fmt: skip

    def _until(self, ready: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} does not come up: see {self.folder}/log")
            time.sleep(0.05)

    def _configuration(self) -> str:
        host, folder, user = socket.gethostname().split(".")[0], self.folder, "root"
        controller, *ports = free_ports(1 + len(self.names))
        nodes = "".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=8000 State=UNKNOWN\n"
            for node, port in zip(self.names, ports)
        )
        # the credential's expiry is what a requeued job waits before it may start again
        return f"""ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait={self.kill_wait}
MinJobAge=3600
SlurmdTimeout=5
MessageTimeout=10
TCPTimeout=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={self.kill_wait}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def _end_with_parent() -> None:
    """Killed when the tests' process dies, however that ends: nobody else would end it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, held all at once so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
