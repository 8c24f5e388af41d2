"""`benchmarks/goodput.py` in two minutes: its accounts add up, and no step is lost. What share the goodput is depends on the machine and on
what else it does, and is only printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.goodput import ROUNDING, measure


def test_every_second_of_a_preempted_run_with_a_bad_batch_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results = measure(tmp_path, seconds=120, ranks=1)
    with capsys.disabled():
        print(f"\ngoodput {100 * results['goodput']:.1f}% of {results['wall_seconds']} s: {results['seconds']}")
    assert results["problems"] == []
    # what the run says of itself differs only by what it can't see: typing the last command's end
    assert 0 < results["goodput"] <= results["logged_goodput"] + 1e-3
    assert results["seconds"]["lost"] == pytest.approx(0, abs=ROUNDING)
    assert results["seconds"]["left_out"] > 0 and results["seconds"]["starting"] > 0
