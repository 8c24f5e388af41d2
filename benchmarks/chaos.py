"""Chaos: runs that are killed with -9 at random moments and started again end as undisturbed ones.

    python -m benchmarks.chaos --keep                     some 15 minutes on 2 idle cores
    python -m benchmarks.chaos --seed 3 --only train --run 7      one of them again

Each run is killed one to three times (`chaos_scene`, `kills`), at moments drawn from an undisturbed run's events and times, half of
them even in time and half even over the stretches between two events, so that merges and checkpoints are hit, too.

encode   `videoar encode`: an actor, or the driver alone (its Ray processes and actors go on for a while, beside the next start), or all
         processes; started again at once. Equal: all files and folders of the output, byte for byte, and nothing else there.
train    `videoar pretrain`, a tiny network on those codes with a process that reads ahead: the process alone, or all of them; every fourth
         run on two ranks under torchrun: a rank, torchrun alone, or all. Equal: the clips of every step (also at each kill, up to there),
         all numbers of metrics.jsonl, the checkpoints' weights, byte for byte, and nothing else there.

But for torchrun's, the commands are forked from a process that has imported everything: while Python starts nothing is written, and a kill
there would show nothing. What was started must have ended, and left no shared memory; processes that have to be killed after a minute are
counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.chaos_encode import EncodeScene
from benchmarks.chaos_scene import Outcome, Scene, summary
from benchmarks.chaos_train import TrainScene
from benchmarks.report import hardware, report

CLIPS, STEPS = 30, (40, 20)
RANKS_EVERY = 4
"""Of the training runs every so many is one of two ranks."""


def main() -> None:
    """Runs all, says how each ended, and ends with status 1 if one is not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed and when")
    parser.add_argument("--only", choices=("encode", "train"), help="one kind of runs")
    parser.add_argument("--run", type=int, help="only the run of this number")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vc-"))  # short: sockets in it have paths of at most 107 characters
    os.environ["TMPDIR"] = str(folder / "t")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # as `Life` sets them
    (folder / "t").mkdir()
    numbers = range(args.runs) if args.run is None else [args.run]
    encode = EncodeScene(folder / "encode", CLIPS, preloaded=True)
    encode.undisturbed()
    results: dict[str, Any] = {"seed": args.seed}
    outcomes: list[Outcome] = []
    if args.only != "train":
        found = [disturbed(encode, number, args.seed, folder) for number in numbers]
        results |= summary("encode", [encode], found)
        outcomes += found
    if args.only != "encode":
        scenes = [
            TrainScene(folder / f"train{ranks}", encode.codes, encode.tokenizer, STEPS, ranks, preloaded=ranks == 1)
            for ranks in (1, 2)
        ]
        for scene in scenes:
            scene.undisturbed()
        found = [disturbed(scenes[number % RANKS_EVERY == 3], number, args.seed, folder) for number in numbers]
        results |= summary("train", scenes, found)
        outcomes += found
    if all(outcome.equal for outcome in outcomes):
        shutil.rmtree(folder)
    else:
        print(f"what the unequal runs left is in {folder}", file=sys.stderr)
    report("chaos", hardware("cpu", os.cpu_count() or 1), results, args.keep)
    sys.exit(not all(outcome.equal for outcome in outcomes))


def disturbed(scene: Scene, number: int, seed: int, folder: Path) -> Outcome:
    """One run, and a line about it."""
    outcome = scene.disturbed(number, seed)
    shutil.rmtree(folder / "t" / "ray", ignore_errors=True)  # the logs of Ray's sessions
    kills = "; ".join(map(str, outcome.kills))
    left = [f"left running: {', '.join(outcome.left)}"] if outcome.left else []
    left += [f"left in shared memory: {', '.join(outcome.shared_memory)}"] if outcome.shared_memory else []
    end = "equal" if outcome.equal else f"NOT EQUAL: {'; '.join(outcome.problems)}"
    print(
        f"{scene.name} {number}, {outcome.seconds:.0f} s: {'. '.join([kills, *left, end])}", file=sys.stderr, flush=True
    )
    return outcome


if __name__ == "__main__":
    main()
