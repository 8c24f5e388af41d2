"""Before a training: the ranks of each node, then all ranks, add up numbers. Run by `videoar submit`'s script under `parallel.launch`.

It prints "local NODE" once a node's own ranks and devices are well, or "bad NODE: reason": what a node's ranks do alone needs no other
node, not even a store on it, so that only the node itself can be to blame, however slow it or the others are. Then all tell all how
they are, and "ranks NODE" is printed once the ranks of all nodes have added up, too. A failure there blames nobody: it is the network's
between them, or a node's that never came.

VIDEOAR_SICK_RANKS=NODE in the environment makes a node's ranks add up wrongly, to try what happens then.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tokenizer.launcher import end_with_launcher

TIMEOUT = datetime.timedelta(seconds=120)
"""That a node's ranks may take alone, and all together."""
CONNECT = datetime.timedelta(seconds=10)
"""To reach the launchers' store, which is there before any rank is."""
NUMBERS = {"cpu": 2**18, "cuda": 2**26}
"""How many float32 are added up."""


class SickRank(RuntimeError):
    """Numbers did not add up."""


def main() -> int:
    """Checks this rank, its node, and all ranks; its exit status."""
    end_with_launcher()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    well = _alone(node)
    try:
        if not _all_are(well):
            return 1
    except (OSError, dist.DistError) as error:
        print(f"{node}: not all nodes could tell how they are ({_short(error)})", file=sys.stderr, flush=True)
        return 1
    device = _device()
    dist.init_process_group(_backend(device), timeout=TIMEOUT)
    _add_up(device)  # the first one also connects
    seconds = _add_up(device)
    if os.environ["LOCAL_RANK"] == "0":
        print(f"ranks {node}", flush=True)
    if dist.get_rank() == 0:
        moved = 4 * NUMBERS[device.type] / seconds / 1e9
        print(f"{dist.get_world_size()} ranks add up {moved:.2f} GB/s over {dist.get_backend()}", flush=True)
    dist.destroy_process_group()
    return 0


def _alone(node: str) -> bool:
    """Whether this rank and the others of its node are well; says so."""
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])

    def late() -> None:
        print(f"bad {node}: its ranks do not add up within {TIMEOUT.total_seconds():.0f} s", flush=True)
        with contextlib.suppress(Exception):
            _all_are(False)
        os._exit(1)  # the main thread may never come back

    clock = threading.Timer(TIMEOUT.total_seconds(), late)
    clock.daemon = True
    clock.start()
    try:
        device = _device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif "SLURM_GPUS_ON_NODE" in os.environ:
            raise SickRank("torch sees none of the GPUs that the job has booked")
        # the launcher's own folder, which no other node's ranks and nobody else can write to
        store = dist.FileStore(str(Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / "preflight"), size)
        dist.init_process_group(_backend(device), store=store, rank=rank, world_size=size, timeout=2 * TIMEOUT)
        _add_up(device, wrong=os.environ.get("VIDEOAR_SICK_RANKS") == node)
        dist.destroy_process_group()
    except Exception as error:
        print(f"bad {node}: rank {os.environ['RANK']}: {_short(error)}", flush=True)
        return False
    finally:
        clock.cancel()
    if rank == 0:
        print(f"local {node}", flush=True)
    return True


def _all_are(well: bool) -> bool:
    """Tells all nodes whether this rank is well, and waits until all nodes have told; whether all are.

    Also a rank that is not waits: the launchers' store ends with the first node's ranks, and the others could not tell any more. A node
    has told once all of its ranks are well or one is not: the others may hang.

    Raises:
        OSError, DistError: the store has gone, or not all have told in time.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # refused at once where the first node's launcher has ended; torch would try for long
    socket.create_connection((host, port), CONNECT.total_seconds()).close()
    server = dist.TCPStore(host, port, is_master=False, timeout=CONNECT)
    store, node = dist.PrefixStore(f"preflight/{os.environ['TORCHELASTIC_RUN_ID']}", server), os.environ["GROUP_RANK"]
    if well:
        told = store.add(f"well/{node}", 1) == int(os.environ["LOCAL_WORLD_SIZE"])
    else:
        told = store.add(f"bad/{node}", 1) == 1
        store.add("bad", 1)
    if told and store.add("told", 1) == int(os.environ["GROUP_WORLD_SIZE"]):
        store.set("all", "told")
    store.wait(["all"], 2 * TIMEOUT)
    return store.add("bad", 0) == 0


def _short(error: Exception) -> str:
    """Its words in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _device() -> torch.device:
    """This rank's."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _add_up(device: torch.device, wrong: bool = False) -> float:
    """All ranks add up their numbers and look at the sum; seconds. One of them can be `wrong` on purpose."""
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = torch.full((NUMBERS[device.type],), float(rank + 1 + wrong), device=device)
    started = time.monotonic()
    dist.all_reduce(numbers)
    differ = int((numbers != size * (size + 1) / 2).sum())  # waits for the device
    if differ:
        raise SickRank(f"{differ} of {len(numbers)} sums of {size} ranks are wrong on {device}")
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
