"""`videoar submit`: writes a job's script beside its run and hands it to SLURM."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cluster.slurm_config import SlurmConfig
from cluster.slurm_script import Work, check_work, script
from tokenizer.errors import UserError
from tokenizer.files import write_whole


def submit(
    job: SlurmConfig, chain: Sequence[Work], dry_run: bool = False, working_folder: Path | None = None
) -> list[str]:
    """Submits one job a piece of work, each to begin when the one before has ended well.

    Args:
        job: how each is booked.
        chain: what they run; each script goes to its `folder`.
        dry_run: print the scripts and write, submit nothing.
        working_folder: of the commands; None: the current one.

    Returns:
        the jobs' numbers.

    Raises:
        UserError: settings do not fit, the folder can't be written, or SLURM refuses the job.
    """
    place = Path(os.path.abspath(working_folder or "."))
    for work in chain:
        check_work(job, work)
    texts = [script(job, work, place) for work in chain]
    if dry_run:
        for work, text in zip(chain, texts):
            print(f"# ==== {work.folder / f'{work.name}.sbatch'}")
            print(text)
        return []
    numbers: list[str] = []
    for work, text in zip(chain, texts):
        file = work.folder / f"{work.name}.sbatch"
        try:
            work.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, text)
        except OSError as error:
            raise UserError(
                f"the script {file} can't be written ({error.strerror}): name another folder for the run."
            ) from error
        # on the command line, as it is not known when the script is written
        after = [f"--dependency=afterok:{numbers[-1]}"] if numbers else []
        numbers.append(_sbatch([*after, str(file)]))
    return numbers


def _sbatch(words: Sequence[str]) -> str:
    # settings of the shell's, as SBATCH_PARTITION, hold for what the script leaves open; a step's own would confuse the job
    environment = {name: value for name, value in os.environ.items() if not re.match(r"SLURM_(?!CONF)", name)}
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *words], capture_output=True, text=True, env=environment, timeout=300
        )
    except FileNotFoundError:
        raise UserError(
            "there is no sbatch here: run this on a login node of the SLURM cluster, or add --dry-run."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            "sbatch has not answered for five minutes: see whether the cluster's controller is up."
        ) from None
    if done.returncode:
        reason = " ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
        raise UserError(f"SLURM refuses the job ({reason.rstrip('.')}): mend the setting and submit {words[-1]} again.")
    return done.stdout.strip().split(";")[0]


def stage_chain(work: Work, stages: Sequence[str]) -> list[Work]:
    """One piece of work a stage of a training, in their order; each stops after its stage.

    Args:
        work: the whole run.
        stages: the stages' names.
    """
    return [
        replace(work, name=f"{work.name}-{number}-{safe_name(stage)}", words=(*work.words, f"--last_stage={stage}"))
        for number, stage in enumerate(stages, 1)
    ]


def safe_name(text: str) -> str:
    """A name as SLURM and file systems like it."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.") or "stage"
