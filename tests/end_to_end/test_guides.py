"""What the guides tell people to type."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import videoar
from tokenizer import settings

HOUSE = Path(__file__).resolve().parents[2]


def commands(page: str) -> list[str]:
    """The lines of a page's blocks that are marked `bash`."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (HOUSE / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_for_a_node_is_understood(monkeypatch):
    """Its verb, its words and its settings, as the command line takes them; what they do needs GPUs and data."""
    monkeypatch.chdir(HOUSE)
    verbs = set()
    for line in commands("one-node.md"):
        words = shlex.split(line)
        words = words[words.index("videoar") + 1 :]
        args, rest = videoar._parser().parse_known_args(words)
        verbs.add(args.verb)
        if args.settings_class:
            module, name = args.settings_class.split(":")
            settings.load(getattr(import_module(module), name), args.config, rest)
        else:
            assert not rest, line
    assert verbs == {"shards", "tokenizer", "encode", "plan", "pretrain", "status", "export", "generate", "evaluate"}


@pytest.mark.timeout(1800)
def test_every_command_for_a_laptop_does_what_it_says(tmp_path: Path):
    lines = commands("laptop.md")
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
