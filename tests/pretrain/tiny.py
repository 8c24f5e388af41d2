"""Tiny runs on random code shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tiny_codes import DIM, TEXT_DIM, write_codes, write_tokenizer

__all__ = ["DIM", "TEXT_DIM", "finish", "launch", "metrics", "stage", "write_codes", "write_run", "write_tokenizer"]
ROOT = Path(__file__).parents[2]


def write_run(folder: Path, **changes: Any) -> Path:
    """Tokenizer, codes and the settings of a run of one stage with everything on; the YAML file."""
    if not (folder / "codes").exists():
        write_codes(folder / "codes", write_tokenizer(folder / "tokenizer"))
    settings: dict[str, Any] = {
        "out": str(folder / "run"),
        "tokenizer": str(folder / "tokenizer"),
        "network": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_text_length": 3},
        "optimizer": {"lr": 0.003, "warmup_steps": 2},
        "wandb": {"mode": "disabled"},
        "log_every": 1,
        "stages": [stage(folder / "codes", 10)],
    }
    file = folder / f"{changes.get('out', 'run').rsplit('/')[-1]}.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return file


def stage(codes: Path, steps: int, /, **changes: Any) -> dict[str, Any]:
    """A stage of images and clips with flips, frame masks and condition dropout."""
    return {
        "name": "one",
        "codes": [{"dir": str(codes), "proportion": 0.75}, {"dir": str(codes), "num_frames": 1, "proportion": 0.25}],
        "steps": steps,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "p_mask": 0.3,
        "condition_dropout": 0.2,
    } | changes


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


PROGRAM = """
import sys
from pretrain.config import PretrainConfig
from pretrain.train import main_entry
from tokenizer import settings
if __name__ == "__main__":
    main_entry(settings.load(PretrainConfig, sys.argv[1], sys.argv[2:]))
"""


TORCHRUN = ("torch.distributed.run",)
FT_LAUNCHER = ("nvidia_resiliency_ext.fault_tolerance.launcher", "--max-restarts", "1")


def launch(
    folder: Path, settings: Path, processes: int, *overrides: str, launcher: Sequence[str] = TORCHRUN
) -> subprocess.Popen:
    """Starts a run under torchrun, or another launcher that takes its arguments."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", *launcher, "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [*command, str(program), str(settings), *overrides],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    """Waits for a run that must succeed; its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    return output
