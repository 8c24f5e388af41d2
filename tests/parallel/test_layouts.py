"""The parallel network equals the plain one on every layout; checkpoints move between layouts."""

import itertools
import subprocess
from pathlib import Path

import pytest
import torch

from parallel import checkpoint
from tests.parallel import matrix
from tests.parallel.torchrun import torchrun
from tokenizer.errors import UserError

WORKER = Path(__file__).with_name("worker.py")


def start(mode: str, out: Path, processes: int, **variables: str) -> subprocess.CompletedProcess:
    return torchrun(WORKER, processes, mode, out, **variables)


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    results = matrix.everything(tmp_path_factory.mktemp("matrix"))
    print(matrix.table(results))
    return results


def test_the_parity_matrix_has_every_layout_of_up_to_four_processes(parity):
    sizes = [(1, 2), (1, 2, 3), (1, 2), (1, 2)]  # TP; PP, the last one with virtual stages; CP; DP
    wanted = sum(t * min(p, 2) * c * d <= 4 for t, p, c, d in itertools.product(*sizes))
    assert (
        len([name for name in parity if not {"without", "recompute", "sdpa", "overlap"} & set(name.split())]) == wanted
    )


def test_every_layout_equals_the_plain_model(parity):
    for layout, numbers in parity.items():
        for net in ("text", "classes"):  # changing grids, images, flips, hidden frames, dropped conditions
            one = numbers[net]
            assert one["conversion"] == 0 and one["weights"] == 1, layout  # there and back: bit for bit
            assert one["unplanned"] == 0, layout  # each process holds the weights that the planner says
            assert one["clips"] == matrix.CLIPS and 0 < one["gradients"] <= 1e-5, (layout, one)  # the worst tensor
            assert one["loss"] <= 1e-5 and one["norm"] <= 1e-5, (layout, one)


def test_every_layout_goes_on_from_the_checkpoint_of_the_one_before(parity):
    layouts = list(parity)
    for before, layout in itertools.pairwise(layouts):
        assert parity[layout]["from"] == before
        assert parity[layout]["resumed"]["loss"] <= 1e-5 and parity[layout]["resumed"]["norm"] <= 1e-5, layout


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


@pytest.mark.parametrize("moment", ["writing", "completing"])
def test_a_save_that_was_killed_half_way_is_never_loaded(tmp_path, moment):
    done = start("killed", tmp_path, 1, DIES=moment)
    assert done.returncode != 0
    left = tmp_path / ".tmp-step-2"
    assert any(left.glob("*.distcp"))  # it died after the tensors were written
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    with pytest.raises(UserError, match=r"\.tmp-step-2 is incomplete.*use .*step-1"):
        checkpoint.load_common(left)


def test_a_save_without_space_says_so_and_leaves_what_was_there(tmp_path):
    done = start("full", tmp_path, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    said = (tmp_path / "said").read_text()
    assert "step-2 could not be written" in said and "File too large" in said and said.endswith("step-1."), said
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "said",
        "step-1",
        "step-2",
    ]  # the second try had space
