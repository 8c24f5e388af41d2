"""A training on SLURM under preemptions and node deaths: steps lost or repeated, and the time until it trains again.

    python -m benchmarks.slurm_faults --keep              some 15 minutes on 2 cores; needs `make slurm`, and root

The cluster is emulated (`tests/cluster/emulated_slurm.py`): a real SLURM, two nodes that share this machine's cores. One run is preempted
again and again at random moments, in turn by the signal before the time limit, by `scontrol requeue`, and by a job of a higher partition.
Another loses a node to kill -9 of all its processes, first the second node, then the first; the node comes back at once, and SLURM waits
until it has noticed the loss (SlurmdTimeout is 5 seconds here, 300 by default) and 5 more before it starts a requeued job (its
credentials' expiry, 120 by default). Both runs must end with the numbers of an undisturbed one, to the last digit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.report import hardware, report
from benchmarks.slurm_scene import SlurmScene, begun
from tests.cluster.emulated_slurm import EmulatedSlurm, missing

WAYS = ("limit", "requeue", "urgent")


def main() -> None:
    """Runs both; ends with status 1 if a number is not the undisturbed run's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preemptions", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--deaths", type=int, default=2, help="of nodes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of the training (default: %(default)s)")
    parser.add_argument("--checkpoint-every", type=int, default=20, help="steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    random = Random(args.seed)
    # short: a socket in it has a path of at most 107 characters
    with (
        tempfile.TemporaryDirectory(prefix="vf-", ignore_cleanup_errors=True) as folder,
        EmulatedSlurm(Path(folder, "slurm")) as slurm,
    ):
        scene = SlurmScene(Path(folder, "runs"), slurm, args.steps, args.checkpoint_every)
        whole = slurm.end_of(*scene.submit("whole"), seconds=600)
        assert whole["JobState"] == "COMPLETED", scene.log("whole")[-3000:]
        preempted = preemptions(scene, args.preemptions, random)
        lost = deaths(scene, args.deaths, random)
    results: dict[str, Any] = {
        "steps": args.steps, "checkpoint_every": args.checkpoint_every, "seed": args.seed, "load": round(os.getloadavg()[2], 1),
        "preempted": preempted, "node_deaths": lost,
    }  # fmt: skip
    report("slurm_faults", hardware("cpu", len(os.sched_getaffinity(0))), results, args.keep)
    if preempted["differences"] or lost["differences"]:
        raise SystemExit(1)


def preemptions(
    scene: SlurmScene, count: int, random: Random, name: str = "preempted", early: float = 0.3
) -> dict[str, Any]:
    """Preempts a run so many times.

    Args:
        scene: the training.
        count: of preemptions.
        random: draws the moments: steps for most, and for a share `early` seconds of a start, in which it has not trained yet.
        name: of the run's folder.
        early: that share.
    """
    slurm, moments, again = scene.slurm, [], 0.0
    (job,) = scene.submit(name)
    for number in range(count):
        how, before = WAYS[number % len(WAYS)], scene.reached(name)
        slurm.wait_for(job, lambda entry: entry["JobState"] == "RUNNING")
        if random.random() < early:
            time.sleep(random.uniform(0.5, 10.0))
        else:
            # so that something is left for the others
            most = max(1, (scene.steps - before) // (count - number) - 1)
            if not scene.wait_for_step(job, name, before + random.randint(1, most), again):
                break
        told = time.time()
        scene.preempt(job, how)
        again = scene.wait_for_restart(job, number + 1)
        moments.append({"how": how, "at_step": scene.reached(name), "told": told, "again": again})
    ended = slurm.end_of(job, 600)
    assert ended["JobState"] == "COMPLETED", scene.log(name)[-3000:]
    starts, lost = scene.starts(name), 0
    for moment in moments:
        after = next(start["global_step"] for start in starts if start["time"] > moment["again"])
        lost += abs(moment["at_step"] - after)
        moment["seconds"] = round(moment.pop("again") - moment.pop("told"), 1)
    return {
        "preemptions": len(moments), "moments": moments, "trainings_begun": len(starts), "steps_lost_or_repeated": lost,
        "job_start_to_trainer_s": [round(start["time"] - begun(scene.log(name), start["time"]), 1) for start in starts],
        "differences": scene.same(name),
    }  # fmt: skip


def deaths(scene: SlurmScene, count: int, random: Random, name: str = "deaths") -> dict[str, Any]:
    """Kills nodes under a run, at random steps.

    Args:
        scene: the training.
        count: of deaths; the second node, then the first, in turn.
        random: draws the steps.
        name: of the run's folder.
    """
    slurm, found, died = scene.slurm, [], 0.0
    (job,) = scene.submit(name)
    for number in range(count):
        before = scene.reached(name)
        most = max(scene.checkpoint_every + 2, (scene.steps - before) // (count - number) - 1)
        scene.wait_for_step(job, name, before + random.randint(scene.checkpoint_every + 1, most), died)
        node = slurm.names[1 - number % 2]
        died, at = time.time(), scene.reached(name)
        slurm.power_off(node)
        at = max(at, scene.reached(name))
        slurm.power_on(node)
        start = scene.wait_for_start(name, died)
        first = scene.wait_for_line(name, start["global_step"] + 1)
        restarted = begun(scene.log(name), start["time"])
        found.append(
            {
                "node": node, "at_step": at, "from_step": start["global_step"], "steps_lost": at - start["global_step"],
                "death_to_training_s": round(first - died, 1), "of_that_ours_s": round(first - restarted, 1),
            }
        )  # fmt: skip
    ended = slurm.end_of(job, 600)
    assert ended["JobState"] == "COMPLETED", scene.log(name)[-3000:]
    return {"deaths": found, "differences": scene.same(name)}


if __name__ == "__main__":
    main()
