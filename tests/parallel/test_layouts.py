"""The parallel network equals the plain one on every layout; checkpoints move between layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]


def start(mode: str, out: Path, processes: int) -> subprocess.CompletedProcess:
    """Runs the worker under torchrun, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, WORKER, mode, out], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("processes, count", [(1, 2), (2, 8), (4, 4)])
def test_every_layout_equals_the_plain_model(tmp_path, processes, count):
    done = start("layouts", tmp_path / "out.json", processes)
    assert done.returncode == 0, done.stderr[-3000:]
    layouts = json.loads((tmp_path / "out.json").read_text())
    assert len(layouts) == count
    for layout, numbers in layouts.items():
        assert numbers["conversion"] == 0, layout  # there and back: bit for bit
        assert numbers["logits"] <= 1e-6, (layout, numbers)
        assert numbers["gradients"] <= 1e-5, (layout, numbers)  # the worst tensor
        assert numbers["clips"] == 16 and numbers["report"] <= 1e-6, (layout, numbers)
        for step in range(3):  # AdamW with decay on matrices only, clipping, gradient norm
            assert numbers[f"loss {step}"] <= 1e-6, (layout, numbers)
            assert numbers[f"norm {step}"] <= 1e-4, (layout, numbers)


def test_a_checkpoint_goes_on_where_it_was_on_another_layout(tmp_path):
    done = start("checkpoints", tmp_path / "out.pt", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    out = torch.load(tmp_path / "out.pt", weights_only=False)
    written, unbroken, runs = out["written"], out["unbroken"], out["runs"]
    assert unbroken["losses"][:3] == written["losses"]
    for layout in ("TP2", "PP2", "DP2", "virtual"):
        assert runs[layout]["position"] == 17
        assert equal(runs[layout]["begin"], written["end"]), layout
        # equal moments and step counts, or Adam would part ways at once
        assert runs[layout]["losses"] == pytest.approx(unbroken["losses"][3:6], abs=1e-6), layout
        assert runs[layout]["norms"] == pytest.approx(unbroken["norms"][3:6], rel=1e-4), layout
    assert runs["TP2"]["losses"] == unbroken["losses"][3:6]  # the same layout: the same numbers, bit for bit
    assert equal(runs["TP2 from DP2"]["begin"], runs["DP2"]["end"])
    assert not torch.equal(written["end"]["head.weight"], written["end"]["mean of head.weight"])
    for layout in ("TP2 from virtual", "virtual from virtual"):
        assert equal(runs[layout]["begin"], runs["virtual"]["end"])
        assert runs[layout]["losses"] == pytest.approx(unbroken["losses"][6:], abs=1e-6), layout
        assert runs[layout]["norms"] == pytest.approx(unbroken["norms"][6:], rel=1e-4), layout


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_save_that_was_killed_half_way_is_never_loaded(tmp_path):
    done = start("killed", tmp_path, 1)
    assert done.returncode != 0
    from parallel import checkpoint
    from tokenizer.errors import UserError

    left = tmp_path / ".tmp-step-2"
    assert any(left.glob("*.distcp"))  # it died after the tensors were written
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    with pytest.raises(UserError, match=r"\.tmp-step-2 is incomplete.*use .*step-1"):
        checkpoint.load_common(left)
