"""A training as work for a SLURM job: the settings that it runs with are checked now, not after days in a queue, and kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.slurm import safe_name, stage_chain
from cluster.slurm_config import SlurmConfig
from cluster.slurm_script import Work
from parallel.setup import check_processes
from pretrain.config import PretrainConfig
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
        UserError: settings do not fit each other or the number of processes, or the folder can't be written.
    """
    config = settings.load(PretrainConfig, file, words)
    check_processes(config.parallel, job.world_size)
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
    reads = tuple(str(Path(path).absolute()) for path in dict.fromkeys(folders) if "://" not in path)
    work = Work(name, run, run / "checkpoints", ("pretrain", "--config", str(kept)), reads)
    return stage_chain(work, [stage.name for stage in config.stages]) if stages else [work]
