"""A process that torchrun started ends when torchrun is killed; one that somebody else started does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

HOUSE = Path(__file__).resolve().parents[2]
RANK = """
import sys, time
from tokenizer.launcher import end_with_launcher
end_with_launcher()
print("ready", flush=True)
time.sleep(100)
"""
LAUNCHER = f"""
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
rank.wait()
"""


@pytest.mark.parametrize("torchrun", [True, False])
def test_a_killed_launcher_takes_its_processes_along(torchrun: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    environment |= {"TORCHELASTIC_RUN_ID": "none"} if torchrun else {}
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], cwd=HOUSE, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    rank = psutil.Process(int(launcher.stdout.readline()))
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 30
    while torchrun and _lives(rank):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert _lives(rank) != torchrun
    if not torchrun:
        rank.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
