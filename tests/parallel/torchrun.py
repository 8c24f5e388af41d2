"""Scripts of the tests on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(script: Path, processes: int, *words: object, **variables: str) -> subprocess.CompletedProcess:
    """Runs a script under torchrun, on a free port, one thread a process and without a GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [*command, str(script), *map(str, words)],
        env=os.environ | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
