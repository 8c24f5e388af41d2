"""Runs of several processes without paying for the imports each time: a fork server holds them ready."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pretrain.train"])


def run_ranks(
    settings: Path, size: int, overrides: list[str], events: dict[int, tuple[int, int]] | None = None, faults: str = ""
) -> list[Any]:
    """Trains on `size` processes with the environment that torchrun gives.

    Args:
        settings, overrides: of the run.
        events: global step -> (rank, signal): the rank sends itself the signal when it begins that step.
        faults: see `pretrain.faults`.

    Returns:
        the exit codes. As torchrun does, a dead process ends the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(rank, size, port, str(settings), overrides, events or {}, faults) for rank in range(size)]
    processes = [CONTEXT.Process(target=_rank, args=entry) for entry in arguments]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.05)
        if any(process.exitcode not in (None, 0) for process in processes):
            for process in processes:
                process.kill()
    return [process.exitcode for process in processes]


def _rank(
    rank: int, size: int, port: int, file: str, overrides: list[str], events: dict[int, tuple[int, int]], faults: str
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "VIDEOAR_FAULT": faults,
    }  # fmt: skip
    import torch

    from pretrain import train
    from pretrain.config import PretrainConfig
    from tokenizer import settings

    torch.set_num_threads(1)
    step = train.Trainer._step

    def with_events(self, stage, batch, index, global_step):
        if events.get(global_step, (-1, 0))[0] == rank:
            os.kill(os.getpid(), signal.Signals(events[global_step][1]))
        return step(self, stage, batch, index, global_step)

    train.Trainer._step = with_events
    train.main_entry(settings.load(PretrainConfig, file, overrides))
