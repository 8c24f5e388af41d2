"""Goodput: the share of a run's wall time that went into steps that counted, with one preemption and one batch whose loss is not a number.

    python -m benchmarks.goodput --keep                  half an hour on two cores, two processes under torchrun
    python -m benchmarks.goodput --seconds 120 --ranks 1

A tiny network trains on random codes for as many steps as the time takes, with validations, background checkpoints and an offline
Weights & Biases. At a quarter of its steps one loss is not a number (`VIDEOAR_FAULT`) and the batch is left out; at half of them SIGTERM
comes to the process that was started (torchrun, where there is one), which saves and ends; then the same command is typed again, at once.

goodput          productive seconds, as the run has counted them, over the wall time from typing the first command to the end of the second
wall_seconds     that time, by this program's clock
seconds          where it went: steps that counted, left_out (the bad batch), lost (steps done but not kept), validation, saving (what saves
                 made the training wait), samples and other, starting (from a process's beginning to its first step), launching (from typing
                 the command to the process's beginning), leaving (from a process's last word to the end of the command)
problems         whatever does not add up: none is expected. Within `ROUNDING` the parts add up to the wall time, each process's account
                 to the times of its events, and the seconds of all lines of metrics.jsonl to the productive seconds; each step has one line
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import hardware, report
from benchmarks.tiny_codes import write_codes, write_tokenizer
from evaluation.run_files import PretrainRun

HOUSE = Path(__file__).resolve().parents[1]
ROUNDING = 0.1
"""Seconds: a process's beginning is known to a hundredth, and numbers are logged to a thousandth."""
TRIAL = 12
"""Steps of the run that tells how long a step takes."""


@dataclass(frozen=True)
class Launch:
    """One typing of the command.

    Args:
        began, ended: seconds since the epoch.
        status: of its end.
    """

    began: float
    ended: float
    status: int


class GoodputRun:
    """A run that is preempted once and has one bad batch.

    Args:
        folder: for everything.
        ranks: data-parallel processes; under torchrun where there are more than one.
        wandb: mode of Weights & Biases.
    """

    def __init__(self, folder: Path, ranks: int = 1, wandb: str = "offline"):
        self.folder, self.ranks, self.wandb = folder, ranks, wandb
        write_codes(folder / "codes", write_tokenizer(folder / "tokenizer"), side=4, scales=3, clips=96)

    def trial(self) -> float:
        """Seconds of a step, validations and saves not counted."""
        with self._start("trial", TRIAL) as started:
            started.wait()
        lines = PretrainRun(self.folder / "trial").training
        return sum(line["seconds"] for line in lines[2:]) / len(lines[2:])

    def run(self, steps: int) -> list[Launch]:
        """The run in the folder `run`: to half of its steps, and on."""
        nan = max(2, steps // 4)
        metrics = self.folder / "run" / "metrics.jsonl"
        with self._start("run", steps, f"nan@{nan}") as first:
            lines = at = 0
            while first.process.poll() is None:
                if metrics.exists():
                    with metrics.open("rb") as file:
                        file.seek(at)
                        lines, at = lines + file.read().count(b"\n"), file.tell()
                if lines >= steps // 2:
                    first.process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.05)
            launches = [first.wait()]
        with self._start("run", steps) as second:
            return [*launches, second.wait()]

    def _start(self, name: str, steps: int, fault: str = "") -> _Started:
        codes = str(self.folder / "codes")
        stage = {
            "name": "one",
            "codes": [{"dir": codes}],
            "steps": steps,
            "global_batch_size": 16,
            "micro_batch_size": 8,
        }
        content: dict[str, Any] = {
            "out": str(self.folder / name),
            "tokenizer": str(self.folder / "tokenizer"),
            "network": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "max_text_length": 3},
            "optimizer": {"lr": 1e-3, "warmup_steps": 10},
            "wandb": {"mode": self.wandb},
            "resilience": {"on_bad_step": "skip"},
            "log_every": 1,
            "checkpoint_every": max(5, steps // 10),
            "validate_every": max(5, steps // 10),
            "validation_batches": 2,
            "stages": [stage | {"validation": codes}],
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        command = [
            sys.executable,
            *(launcher if self.ranks > 1 else []),
            "-m",
            "videoar",
            "pretrain",
            "--config",
            str(file),
        ]
        environment = os.environ | {"PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        began = time.time()
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=HOUSE, env=environment | {"VIDEOAR_FAULT": fault}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )  # fmt: skip
        return _Started(process, began, self.folder / f"{name}.log")


@dataclass(frozen=True)
class _Started:
    process: subprocess.Popen
    began: float
    log: Path

    def __enter__(self) -> _Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # this program is ended itself; torchrun ends what it has started
            self.process.terminate()
            self.process.wait()

    def wait(self) -> Launch:
        """Until it has ended as it should.

        Raises:
            RuntimeError: it has failed.
        """
        status = self.process.wait()
        ended = time.time()
        if status not in (0, 3) and not (status == 1 and "stopped by a signal and saved" in self.log.read_text()):
            raise RuntimeError(f"the command ended with status {status}: {self.log.read_text()[-3000:]}")
        return Launch(self.began, ended, status)


def account(out: Path, launches: list[Launch], steps: int) -> dict[str, Any]:
    """The results, with what does not add up under "problems".

    Args:
        out: the run's folder.
        launches: in their order.
        steps: of the run.
    """
    run = PretrainRun(out)
    starts = [event for event in run.events if event["event"] == "start"]
    ends = [event for event in run.events if event["event"] in ("stopped", "finished")]
    lines, problems = run.training, []
    wall = launches[-1].ended - launches[0].began
    productive = lines[-1]["productive_seconds"]
    parts: dict[str, float] = {"counted": productive, "launching": 0.0, "leaving": 0.0}
    for launch, start, end in zip(launches, starts, ends, strict=True):
        began = start["time"] - start["starting_seconds"]
        parts["launching"] += began - launch.began
        parts["leaving"] += launch.ended - end["time"]
        for kind, seconds in end["seconds"].items():
            parts[kind] = parts.get(kind, 0.0) + seconds
        _same(problems, "a process's account and its events", sum(end["seconds"].values()), end["time"] - began)
    parts["launching"] += sum(after.began - before.ended for before, after in zip(launches, launches[1:]))
    parts["lost"] = parts.pop("steps") - productive
    _same(problems, "the parts and the wall time", sum(parts.values()), wall)
    _same(problems, "the lines' seconds and the productive seconds", sum(line["seconds"] for line in lines), productive)
    if [line["global_step"] for line in lines] != list(range(1, steps + 1)):
        problems.append("not each step has one line")
    if [event["event"] for event in ends] != ["stopped", "finished"]:
        problems.append(f"the run ended as {[event['event'] for event in ends]}")
    bad = [event for event in run.events if event["event"] == "bad_step"]
    if len(bad) != 1 or not parts.get("left_out", 0.0) > 0:
        problems.append(f"{len(bad)} bad steps were recorded, {parts.get('left_out', 0.0)} s left out")
    if parts["lost"] < -ROUNDING:
        problems.append(f"{-parts['lost']:.3f} s counted more than were done")
    logged = lines[-1]["goodput"]
    _same(
        problems, "goodput as logged and as it follows", logged * (lines[-1]["time"] - run.facts["began"]), productive
    )
    return {
        "goodput": round(productive / wall, 4),
        "logged_goodput": round(logged, 4),
        "wall_seconds": round(wall, 1),
        "steps": steps,
        "seconds": {kind: round(seconds, 2) for kind, seconds in sorted(parts.items())},
        "problems": problems,
    }


def _same(problems: list[str], what: str, one: float, other: float) -> None:
    if abs(one - other) > ROUNDING:
        problems.append(f"{what} differ: {one:.3f} s and {other:.3f} s")


def measure(folder: Path, seconds: float, ranks: int, wandb: str = "offline") -> dict[str, Any]:
    """The results of a run of about so many seconds.

    Args:
        folder, ranks, wandb: see `GoodputRun`.
        seconds: of the whole run.
    """
    run = GoodputRun(folder, ranks, wandb)
    steps = max(20, round(seconds / run.trial()))
    return account(folder / "run", run.run(steps), steps)


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of the whole run (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel processes (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with what it has started
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args.seconds, args.ranks)
    for problem in results["problems"]:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    report("goodput", f"{hardware('cpu', 1)}, {args.ranks} processes", results, args.keep)


if __name__ == "__main__":
    main()
