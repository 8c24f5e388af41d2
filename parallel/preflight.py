"""Before a training: the ranks of each node, then all ranks, add up numbers. Run by `videoar submit`'s script under `parallel.launch`.

It prints "local NODE" once a node's own ranks and devices are well, and "ranks NODE" once the ranks of all nodes are: where the first
line is missing, that node is to blame; where only the second is, the network between them, or a node that never came.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

from tokenizer.launcher import end_with_launcher

TIMEOUT = datetime.timedelta(seconds=120)
NUMBERS = {"cpu": 2**18, "cuda": 2**26}
"""How many float32 are added up."""


class SickRank(RuntimeError):
    """Numbers did not add up."""


def main() -> int:
    """Checks this rank, its node, and all ranks; its exit status."""
    end_with_launcher()
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    elif "SLURM_GPUS_ON_NODE" in os.environ:
        raise SickRank(f"{node}: torch sees none of the GPUs that the job has booked")
    # the launcher's own store, which lives on this node or the first one; a prefix keeps the two groups apart
    backend = "nccl" if device.type == "cuda" else "gloo"
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=TIMEOUT)
    here = dist.PrefixStore(f"preflight/{os.environ['TORCHELASTIC_RUN_ID']}/{os.environ['GROUP_RANK']}", store)
    dist.init_process_group(backend, store=here, rank=rank, world_size=size, timeout=TIMEOUT)
    _add_up(device)
    dist.destroy_process_group()
    if rank == 0:
        print(f"local {node}", flush=True)
    dist.init_process_group(backend, timeout=TIMEOUT)
    _add_up(device)  # the first one also connects
    seconds = _add_up(device)
    if rank == 0:
        print(f"ranks {node}", flush=True)
    if dist.get_rank() == 0:
        moved = 4 * NUMBERS[device.type] / seconds / 1e9
        print(f"{dist.get_world_size()} ranks add up {moved:.2f} GB/s over {backend}", flush=True)
    dist.destroy_process_group()
    return 0


def _add_up(device: torch.device) -> float:
    """All ranks add up their numbers and look at the sum; seconds."""
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = torch.full((NUMBERS[device.type],), float(rank + 1), device=device)
    started = time.monotonic()
    dist.all_reduce(numbers)
    wrong = int((numbers != size * (size + 1) / 2).sum())  # waits for the device
    if wrong:
        raise SickRank(f"{wrong} of {len(numbers)} sums of {size} ranks are wrong on {device}")
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
