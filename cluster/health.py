"""Whether a node is fit for a run: devices, disks, shared memory, data. Each node of a job runs it before the work (`videoar submit`).

    srun ... python -m cluster.health --run /runs/l --gpus 8 --processes 8 --reads /data/codes

prints "ok NODE", or "bad NODE: reason" and ends with status 1. Needs the standard library only. A check that does not answer within a
minute, as on a hung network disk, is a reason, too.

VIDEOAR_SICK_NODE=NODE in the environment makes a node sick, to try what happens then.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

ANSWER = 60.0
"""Seconds that a check may take."""
INDEX, SHARDS = "index.json", 8
"""The list of a folder's shards, and how many of them are read: the first, the last and some between."""
FREE, SHARED = 2e9, 64e6
"""Bytes that must be free for the run's folder, and in shared memory for each process."""


class Sick(Exception):
    """What a node lacks."""


def main(words: list[str] | None = None) -> int:
    """Runs all checks and prints the outcome; the exit status."""
    parser = argparse.ArgumentParser(
        "cluster.health", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a folder that must be writable")
    parser.add_argument("--gpus", type=int, default=0, help="that must be there")
    parser.add_argument("--processes", type=int, default=1, help="of the run on this node")
    parser.add_argument(
        "--reads", type=Path, action="append", default=[], help="a file or folder that must be readable"
    )
    parser.add_argument(
        "--free", type=float, default=FREE, help="bytes that must be free for --run (default: %(default)g)"
    )
    args = parser.parse_args(words)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    checks: list[tuple[str, Callable[[], None]]] = [
        ("tried out", lambda: inject(node)),
        ("GPUs", lambda: gpus(args.gpus)),
        ("shared memory", lambda: space(Path("/dev/shm"), SHARED * args.processes)),
        ("the run's folder", lambda: writable(args.run, args.free)),
        *((f"{path}", lambda path=path: readable(path)) for path in args.reads),
    ]
    for what, check in checks:
        if reason := answer(check):
            print(f"bad {node}: {what}: {reason}", flush=True)
            return 1
    print(f"ok {node}", flush=True)
    return 0


def answer(check: Callable[[], None], seconds: float = ANSWER) -> str:
    """Why a check failed; "" if it did not."""
    reasons: list[str] = []

    def run() -> None:
        try:
            check()
        except (Sick, OSError, subprocess.SubprocessError, ValueError) as error:
            reasons.append(" ".join(str(error).split()) or type(error).__name__)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"no answer in {seconds:.0f} s"
    return reasons[0] if reasons else ""


def inject(node: str) -> None:
    """Raises Sick on the node that VIDEOAR_SICK_NODE names."""
    if os.environ.get("VIDEOAR_SICK_NODE") == node:
        raise Sick("VIDEOAR_SICK_NODE names it")


def gpus(wanted: int) -> None:
    """Raises Sick if there are fewer GPUs, or one has errors of its memory that could not be corrected."""
    if not wanted:
        return
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(
            query, capture_output=True, text=True, timeout=ANSWER / 2, check=True
        ).stdout.splitlines()
    except FileNotFoundError:
        raise Sick("there is no nvidia-smi, so no NVIDIA driver") from None
    if len(found) < wanted:
        raise Sick(f"{len(found)} instead of {wanted}")
    for line in found:
        number, _, errors = line.partition(", ")
        if errors.strip().isdigit() and int(errors) > 0:
            raise Sick(f"GPU {number} has {errors.strip()} uncorrected memory errors")


def space(folder: Path, wanted: float) -> None:
    """Raises Sick if less is free on a folder's disk."""
    disk = os.statvfs(folder)
    if (free := disk.f_bavail * disk.f_frsize) < wanted:
        raise Sick(f"{free / 1e9:.2f} GB are free on {folder}, {wanted / 1e9:.2f} are needed")


def writable(folder: Path, wanted: float) -> None:
    """Raises Sick or OSError if a file can't be written, kept and removed there, or less is free."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".health-{uuid.uuid4().hex}"
    try:
        with file.open("wb") as out:
            out.write(b"\0" * 2**20)
            out.flush()
            os.fsync(out.fileno())
    finally:
        file.unlink(missing_ok=True)
    space(folder, wanted)


def readable(path: Path) -> None:
    """Raises OSError or Sick if a file, some first files of a folder, or some shards that its index lists, can't be read."""
    files = [path] if path.is_file() else sorted(entry for entry in path.iterdir() if entry.is_file())[:4]
    for file in files:
        _read(file)
    if (index := path / INDEX).is_file():
        for file, size in shards(index):
            _read(file)
            if (found := file.stat().st_size) != size:
                raise Sick(f"{file} has {found} bytes, its index says {size}")


def shards(index: Path) -> list[tuple[Path, int]]:
    """Some shards that an index lists, with their sizes in bytes; the packed file where it is there.

    Raises:
        ValueError: it is no index.
    """
    try:
        listed = json.loads(index.read_bytes())["shards"]
        step = max(1.0, (len(listed) - 1) / (SHARDS - 1))
        chosen = {round(number * step) for number in range(min(SHARDS, len(listed)))}
        found = []
        for number in sorted(chosen):
            both = [listed[number][kind] for kind in ("zip_data", "raw_data")]
            files = [(index.parent / data["basename"], int(data["bytes"])) for data in both if data]
            found.append(next((one for one in files if one[0].is_file()), files[-1]))
        return found
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r})") from error


def _read(file: Path) -> None:
    with file.open("rb") as content:
        content.read(2**16)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = main()
    # a check that hangs on a dead disk must not hold up the end
    os._exit(status)
