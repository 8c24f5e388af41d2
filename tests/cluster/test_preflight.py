"""The pre-flight check of the ranks, under launchers of three nodes on this machine: who is blamed for what."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cluster.emulated_slurm import free_ports
from tests.pretrain.tiny import ROOT

HANGS = """
import datetime, sys, time
from parallel import preflight
preflight.TIMEOUT, preflight._add_up = datetime.timedelta(seconds=2), lambda *_, **__: time.sleep(1000)
sys.exit(preflight.main())
"""


def test_nodes_whose_ranks_add_up_wrongly_or_hang_are_named_and_take_no_other_with_them(tmp_path: Path) -> None:
    """One of them is the first, on which the launchers' store lives; none waits for another's time-out."""
    hangs = tmp_path / "hangs.py"
    hangs.write_text(HANGS)
    (port,) = free_ports(1)
    check = ["-m", "parallel.preflight"]
    nodes = {"a": check, "b": check, "c": [str(hangs)]}
    launchers = [_launch(number, node, port, nodes[node]) for number, node in enumerate(nodes)]
    try:
        said = [launcher.communicate(timeout=200)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [1, 1, 1], said
    found = [re.findall(r"^(?:bad|local|ranks) .*", text, re.M) for text in said]
    assert found == [
        ["bad a: rank 0: 262144 of 262144 sums of 1 ranks are wrong on cpu"],
        ["local b"],
        ["bad c: its ranks do not add up within 2 s"],
    ], said


def _launch(number: int, node: str, port: int, check: list[str]) -> subprocess.Popen:
    words = ["--nnodes=3", "--nproc-per-node=1", "--rdzv-backend=static", f"--rdzv-endpoint=127.0.0.1:{port}"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "",
        "SLURM_NODEID": str(number), "SLURMD_NODENAME": node, "VIDEOAR_SICK_RANKS": "a",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "parallel.launch", *words, "--rdzv-id=check", *check],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
