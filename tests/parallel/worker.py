"""Run by the tests under torchrun: moves checkpoints with running means between layouts, dies or runs out of space while saving.

torchrun --nproc-per-node 2 worker.py checkpoints|killed|full OUT
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from parallel import checkpoint, saving
from parallel.convert import gather_reference
from parallel.ema import Ema
from parallel.saving import Saver
from parallel.setup import ParallelConfig, destroy, initialize
from parallel.train_step import build_model, build_optimizer, forward_backward, update
from tests.parallel.matrix import SEED, TEXT, leave_layout, loss, share
from tokenizer.errors import UserError

LR, DECAY = 1e-2, 0.1
VIRTUAL = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_size=2)


def train(parallel: ParallelConfig, folder: Path, load: Path | None, steps: int, save: int | None) -> dict[str, Any]:
    """Trains from a checkpoint or from the start; saves after the steps."""
    info = initialize(parallel, SEED)
    chunks = build_model(TEXT, parallel, info, seed=SEED if load is None else None)
    optimizer, ema = build_optimizer(chunks, LR, DECAY), Ema(chunks, 0.9)
    position = -1
    if load is not None:
        # used moments must be overwritten by the loaded ones, too
        forward_backward(chunks, share(TEXT, parallel, info, 0), loss)
        update(optimizer, LR)
        position = checkpoint.load(load, chunks, optimizer, ema)["position"]
    begin = gather_reference(chunks) | means(chunks, ema)
    losses, norms = [], []
    for _ in range(steps):
        losses.append(forward_backward(chunks, share(TEXT, parallel, info, 0), loss).loss)
        norms.append(update(optimizer, LR))
        ema.update()
    if save is not None:
        Saver(folder).save(save, chunks, optimizer, {"position": 17}, ema)
    end = gather_reference(chunks) | means(chunks, ema)
    leave_layout()
    return {"losses": losses, "norms": norms, "begin": begin, "end": end, "position": position}


def means(chunks: list[Any], ema: Ema) -> dict[str, torch.Tensor]:
    """The running means as the plain model's weights, with names of their own."""
    with ema.applied():
        return {f"mean of {name}": value for name, value in gather_reference(chunks).items()}


def checkpoints(out: Path) -> None:
    """Saves after 3 steps on TP 2 and goes on for 3 more on other layouts; two of them save again, and TP 2 loads that."""
    folder, tp = out.parent / "checkpoints", ParallelConfig(tensor_parallel_size=2)
    written = train(tp, folder, None, 3, 3)
    unbroken = train(tp, folder, None, 9, None)
    step3 = folder / "step-3"
    runs = {
        "TP2": train(tp, folder, step3, 3, None),
        "PP2": train(ParallelConfig(pipeline_parallel_size=2), folder, step3, 3, None),
        "DP2": train(ParallelConfig(), folder, step3, 3, 6),
        "TP2 from DP2": train(tp, folder, folder / "step-6", 0, None),
        "virtual": train(VIRTUAL, folder, step3, 3, 6),
        "TP2 from virtual": train(tp, folder, folder / "step-6", 3, None),
        "virtual from virtual": train(VIRTUAL, folder, folder / "step-6", 3, None),
    }
    if int(os.environ["RANK"]) == 0:
        torch.save({"written": written, "unbroken": unbroken, "runs": runs}, out)


def one_step(out: Path) -> tuple[Saver, list[Any], Any]:
    """A network that has saved its first step."""
    info = initialize(ParallelConfig(), SEED)
    chunks = build_model(TEXT, ParallelConfig(), info, seed=SEED)
    optimizer, saver = build_optimizer(chunks, LR), Saver(out)
    forward_backward(chunks, share(TEXT, ParallelConfig(), info, 0), loss)
    update(optimizer, LR)
    saver.save(1, chunks, optimizer, {})
    return saver, chunks, optimizer


def killed(out: Path) -> None:
    """Saves step 1, and dies while step 2 is on its way: in the thread that writes it, or just before it is complete."""
    saver, chunks, optimizer = one_step(out)
    original = saving._write_bucket

    def die(*unused: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(*args: Any) -> None:
        original(*args)
        die()

    if os.environ["DIES"] == "writing":
        saving._write_bucket = write_and_die
    else:
        saving._write_marker = die
    saver.save(2, chunks, optimizer, {}, background=True)
    saver.wait()


def full(out: Path) -> None:
    """Saves step 1; then no file may grow any more, as on a full disk."""
    saver, chunks, optimizer = one_step(out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    saver.save(2, chunks, optimizer, {}, background=True)
    try:
        saver.wait()
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (out / "said").write_text(str(error))
        saver.save(2, chunks, optimizer, {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"checkpoints": checkpoints, "killed": killed, "full": full}[sys.argv[1]](Path(sys.argv[2]))
    destroy()
