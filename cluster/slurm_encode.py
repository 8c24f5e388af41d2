"""`videoar encode` as work for SLURM: one node, an array of jobs that share the shards, or one Ray cluster over several nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.slurm import safe_name
from cluster.slurm_config import SlurmConfig
from cluster.slurm_script import Work
from tokenizer.errors import UserError
from tokenizer.files import write_whole

GIVEN = ("ray_address", "parts", "part")
"""What the script says itself."""


def encode_work(encode: Mapping[str, Any], job: SlurmConfig, write: bool) -> Work:
    """What the job runs.

    Args:
        encode: all settings of `videoar encode` by name.
        job: the booking.
        write: keep the settings beside the output; else they are only checked.

    Raises:
        UserError: the output is no local folder or can't be written, or a setting is one that the script sets.
    """
    if "://" in encode["out"]:
        raise UserError(f"--out is '{encode['out']}': give a folder that every node of the cluster sees.")
    if encode["ray_address"] is not None or encode["parts"] != 1:
        raise UserError("ray_address and parts are set by the job's script: leave them out, and set nodes or array.")
    out = Path(encode["out"]).absolute()
    name = safe_name(job.name)
    kept = out / "slurm" / f"{name}.yaml"
    if write:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            values = {key: value for key, value in encode.items() if key not in GIVEN}
            write_whole(kept, yaml.safe_dump(values, sort_keys=False))
        except OSError as error:
            raise UserError(f"{kept} can't be written ({error.strerror}): name another --out.") from error
    sizes = encode["variants"].split(",") if isinstance(encode["variants"], str) else encode["variants"]
    reads = tuple(str(Path(path).absolute()) for path in (encode["shards"], encode["tokenizer"]) if "://" not in path)
    fills = encode["threads"] if encode["device"] == "cpu" and not encode["num_workers"] else 0
    # a shard that is done is a folder named by its number
    return Work(name, out, out / sizes[0], ("encode", "--config", str(kept)), reads, ranks=False, workers_threads=fills)
