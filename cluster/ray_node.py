"""One node of a Ray cluster inside a SLURM job; on the first node also the command that the cluster is for.

    srun ... python -m cluster.ray_node --head ADDRESS:PORT --nodes 4 -- python -m videoar encode ... --ray_address=auto

Each task starts Ray with the cores and GPUs of its part of the job; the first one runs the command once all nodes have joined, and its
exit status is the command's. The others end when the first node's Ray does. The token that keeps strangers out is drawn by the first
node and read from the job's own folder by the others: it stands in no environment, command line or log.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

JOIN = 300.0
"""Seconds that all nodes together have to join."""


def main(words: list[str]) -> int:
    """Runs this node; its exit status."""
    split = words.index("--")
    parser = argparse.ArgumentParser(
        "cluster.ray_node", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", required=True, help="ADDRESS:PORT of the first node's Ray")
    parser.add_argument("--nodes", type=int, required=True, help="of the job")
    parser.add_argument("--notes", type=Path, required=True, help="a folder that all nodes see, for the token")
    args = parser.parse_args(words[:split])
    command = words[split + 1 :]
    first = os.environ["SLURM_NODEID"] == "0"
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token(args.notes, first))}
    # sockets in it have paths of at most 107 characters
    with tempfile.TemporaryDirectory(prefix="vr-", ignore_cleanup_errors=True) as folder:
        node = subprocess.Popen(
            _start(args.head, first, folder, os.environ), env=environment, stdout=subprocess.DEVNULL
        )
        # SLURM signals this process and all others; the command decides what becomes of it
        signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            if not first:
                node.wait()  # ends with the first node's Ray, whatever became of the work
                return 0
            address = {**environment, "RAY_ADDRESS": args.head}
            if not _joined(args.nodes, address, node):
                print(f"not all of {args.nodes} nodes joined the Ray cluster in {JOIN:.0f} s", file=sys.stderr)
                return 1
            status = subprocess.run(command, env=address).returncode
            return status if status >= 0 else 128 - status
        finally:
            node.terminate()
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()


def _token(notes: Path, first: bool) -> Path:
    """The file with this start's token, readable by its owner only."""
    name = "-".join(os.environ.get(key, "0") for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    file = notes / f".ray-token-{name}"
    if first:
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32))
        temporary.replace(file)
        return file
    deadline = time.monotonic() + JOIN
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return file


def _start(head: str, first: bool, folder: str, environment: Mapping[str, str]) -> list[str]:
    """The command that starts Ray on this node and stays with it."""
    address, _, port = head.rpartition(":")
    where = [
        f"--node-ip-address={address}",
        f"--port={port}",
        "--head",
        f"--temp-dir={folder}",
        "--include-dashboard=false",
    ]
    sizes = [
        f"--num-cpus={environment.get('SLURM_CPUS_ON_NODE', '1')}",
        f"--num-gpus={environment.get('SLURM_GPUS_ON_NODE', '0')}",
    ]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    return [*ray, *(where if first else [f"--address={head}"]), *sizes]


def _joined(nodes: int, environment: Mapping[str, str], node: subprocess.Popen) -> bool:
    """Waits until so many nodes are alive; False if they don't come, or this node's Ray ends."""
    count = (
        "import ray; ray.init(logging_level='error'); "
        "print('alive', sum(node['Alive'] for node in ray.nodes())); ray.shutdown()"
    )
    deadline = time.monotonic() + JOIN
    while node.poll() is None and time.monotonic() < deadline:
        done = subprocess.run([sys.executable, "-c", count], env=dict(environment), capture_output=True, text=True)
        if f"alive {nodes}" in done.stdout:
            return True
        time.sleep(1)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
