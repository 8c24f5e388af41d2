"""The chain of steps: finished steps are skipped, killed ones run again, what they took is added up, children are measured and ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.chains import Chain, run_chains
from cluster.local import CommandFailed, run
from cluster.steps import Ledger, Step

HOUSE = Path(__file__).resolve().parents[2]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_finished_step_is_not_done_again(tmp_path):
    step = Step("count", (python(f"open({str(tmp_path / 'n')!r}, 'a').write('x')"),))
    for _ in range(2):
        Ledger(tmp_path).run(step, "1/1")
    assert (tmp_path / "n").read_text() == "x"
    entry = json.loads((tmp_path / "steps.json").read_text())["count"]
    assert entry["done"] and entry["attempts"] == 1


def test_a_failed_step_is_named_and_runs_again(tmp_path):
    flag = tmp_path / "flag"
    code = f"import os, sys, time; time.sleep(0.5); sys.exit(0 if os.path.exists({str(flag)!r}) else 3)"
    step = Step("fragile", (python(code),))
    with pytest.raises(CommandFailed, match="status 3.*fragile.log"):
        Ledger(tmp_path).run(step, "1/1")
    first = json.loads((tmp_path / "steps.json").read_text())["fragile"]
    assert not first["done"]
    flag.touch()
    Ledger(tmp_path).run(step, "1/1")
    second = json.loads((tmp_path / "steps.json").read_text())["fragile"]
    assert second["done"] and second["attempts"] == 2
    assert second["seconds"] >= first["seconds"] + 0.5  # both attempts count


def test_other_settings_are_noticed(tmp_path):
    settings = tmp_path / "a.yaml"
    settings.write_text("a: 1")
    step = Step("one", (python("pass"),), inputs=(settings,))
    Ledger(tmp_path).run(step, "1/1")
    assert Ledger(tmp_path).changed([step]) == []
    settings.write_text("a: 2")
    assert Ledger(tmp_path).changed([step]) == ["one"]
    assert Ledger(tmp_path).changed([Step("one", (python("1"),))]) == ["one"]


def test_memory_of_children_counts_and_threads_are_set(tmp_path):
    child = "import os; x = bytearray(os.urandom(1) * 150_000_000); import time; time.sleep(1.5); print(os.environ['OMP_NUM_THREADS'])"
    peak = run(
        python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"),
        tmp_path / "log",
        threads=3,
    )
    assert 0.15 < peak < 0.4
    assert (tmp_path / "log").read_text().strip() == "3"


def test_chains_go_side_by_side_and_one_that_fails_stops_no_other(tmp_path):
    def meet(mine, other):
        """Ends only if the other chain runs at the same time."""
        code = f"""
import pathlib, sys, time
pathlib.Path({str(tmp_path / mine)!r}).touch()
for _ in range(300):
    if pathlib.Path({str(tmp_path / other)!r}).exists(): sys.exit(0)
    time.sleep(0.1)
sys.exit(4)"""
        return python(code)

    commands = {"a": [meet("a", "b")], "b": [meet("b", "a"), python("raise SystemExit(3)")], "c": [python("pass")]}
    chains = [
        Chain(name, tmp_path / f"chain-{name}", tuple(Step(str(i), (c,)) for i, c in enumerate(its)))
        for name, its in commands.items()
    ]
    ends = {}
    run_chains(chains, 2, lambda chain, done: ends.update({chain.name: done}))
    assert ends == {"a": True, "b": False, "c": True}
    entries = json.loads((tmp_path / "chain-b" / "steps.json").read_text())
    assert entries["0"]["done"] and not entries["1"]["done"]


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_whole_tree(tmp_path, name):
    mark = tmp_path / "pid"
    sleeper = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    middle = (
        sleeper
        if name == signal.SIGKILL
        else f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    )
    outer = subprocess.Popen(
        python(f"import sys; from cluster.local import run; run((sys.executable, '-c', {middle!r}))"),
        cwd=HOUSE,
        stderr=subprocess.DEVNULL,
        # a shell's background jobs, and so tests that run as one, are born deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(200):
        if mark.exists() and mark.read_text():
            break
        time.sleep(0.1)
    os.kill(outer.pid, name)
    outer.wait(timeout=30)
    for _ in range(50):
        if not psutil.pid_exists(int(mark.read_text())):
            return
        time.sleep(0.1)
    raise AssertionError("the sleeper outlived its chain")
