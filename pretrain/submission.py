"""A training as work for a SLURM job: the settings that it runs with are checked now, not after days in a queue, and kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from cluster.slurm import safe_name, stage_chain
from cluster.slurm_config import SlurmConfig
from cluster.slurm_script import Work
from inference.config import ModelConfig
from parallel.setup import ProcessInfo, check_layout
from pretrain.config import PretrainConfig
from pretrain.train import check_batches
from tokenizer import settings
from tokenizer.errors import UserError


def pretrain_work(file: Path | None, words: Sequence[str], job: SlurmConfig, stages: bool, write: bool) -> list[Work]:
    """What the job, or the chain of jobs, runs.

    Args:
        file, words: the run's settings, as of `videoar pretrain`.
        job: the booking.
        stages: a job a stage.
        write: keep the settings beside the run; else they are only checked.

    Raises:
        UserError: settings do not fit each other or the number of processes (layout, heads, layers, batches of all stages), or the folder
            can't be written.
    """
    config = settings.load(PretrainConfig, file, words)
    check_sizes(config, job.world_size)
    if config.resilience.hang_monitor == "nvidia":
        raise UserError(
            "resilience.hang_monitor is nvidia, whose ft_launcher a SLURM job's script does not use: choose auto or own."
        )
    if stages and config.last_stage is not None:
        raise UserError("--stages goes through all stages: leave last_stage out.")
    rooted = config.rooted()
    run = Path(rooted.out).absolute()
    name = safe_name(job.name)
    kept = run / "slurm" / f"{name}.yaml"
    if write:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            settings.save(config, kept)
        except OSError as error:
            raise UserError(f"{kept} can't be written ({error.strerror}): name another `out`.") from error
    folders = [rooted.tokenizer, *(source.dir for stage in rooted.stages for source in stage.codes)]
    folders += [stage.validation for stage in rooted.stages if stage.validation is not None]
    reads = tuple(str(Path(path).absolute()) for path in dict.fromkeys(folders) if "://" not in path)
    work = Work(name, run, run / "checkpoints", ("pretrain", "--config", str(kept)), reads)
    return stage_chain(work, [stage.name for stage in config.stages]) if stages else [work]


def check_sizes(config: PretrainConfig, world_size: int) -> None:
    """What the run checks at its start, as far as it needs no codes, which may be encoded by a job before it.

    Args:
        config: the run.
        world_size: processes.

    Raises:
        UserError: the processes, the network or a stage's batches do not divide.
    """
    network = asdict(config.network)
    del network["condition"]
    # its grids and frames come with the codes; no size depends on them
    check_layout(ModelConfig(**network, scales=((1, 1),), num_frames=1), config.parallel, world_size)
    parallel = config.parallel
    together = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.context_parallel_size
    check_batches(config, ProcessInfo(0, world_size, 0, world_size // together, 0, 0, True, torch.device("cpu")))
