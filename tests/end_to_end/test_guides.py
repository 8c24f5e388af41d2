"""What the guides tell people to type is typed here, in the order of the page, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]


def commands(page: str) -> list[str]:
    """The lines of a page's blocks that are marked `bash`."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (HOUSE / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", ["laptop.md"])
def test_every_command_of_a_guide_does_what_it_says(page: str, tmp_path: Path):
    lines = commands(page)
    assert len(lines) > 5
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(HOUSE),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    for line in lines:
        done = subprocess.run(
            ["bash", "-c", line.replace("CONFIGS", str(HOUSE))],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for name in ("circle.mp4", "longer.gif", "ruler.json", "model/README.md", "pretrain/metrics.jsonl"):
        assert (tmp_path / name).stat().st_size > 0
