"""The planner's memory against real steps, and what the paper's sizes take on each GPU by layout.

    python -m benchmarks.memory --keep           some two minutes on 2 cores
    python -m benchmarks.memory --table          only the table of the paper's sizes, in Markdown: nothing is run

planned_over_measured    `parallel.memory.estimate` over the peak of all tensors of a step (model, optimizer, forward, backward, update), as
                         torch's allocator reports them: of a small network on one and two processes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import hardware, report
from benchmarks.training import Training, clips, network
from inference.config import ModelConfig
from parallel.memory import Memory, estimate
from parallel.setup import ParallelConfig, destroy, initialize
from tokenizer.scales import ScaleSchedule

SMALL = ModelConfig(
    num_layers=6, hidden_size=256, num_attention_heads=4, scales=ScaleSchedule.square(8, 6).scales, num_frames=5, bits=32, text_dim=64,
    max_text_length=16,
)  # fmt: skip
CLIPS, MICROBATCHES = 4, 4
RUNS = {
    "one process": ParallelConfig(),
    "bfloat16": ParallelConfig(precision="bfloat16"),
    "recompute selective": ParallelConfig(recompute="selective"),
    "recompute full": ParallelConfig(recompute="full"),
    "TP2": ParallelConfig(tensor_parallel_size=2),
    "PP2": ParallelConfig(pipeline_parallel_size=2),
    "PP2 virtual": ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_size=3),
    "CP2": ParallelConfig(context_parallel_size=2),
    "DP2": ParallelConfig(),
}

PAPER = {"L": "ucf101-l", "XL": "ucf101-xl", "4B": "t2v-4b"}
"""The sizes' files in pretrain/configs/."""
BF16 = ParallelConfig(precision="bfloat16")
# size, clip, grid, scales, latent frames, clips a forward pass, processes, layout
PLANS = (
    ("L", "17x128x128", (8, 8), 6, 5, 16, 8, BF16),
    ("L", "17x256x256", (16, 16), 10, 5, 4, 8, BF16),
    ("XL", "17x128x128", (8, 8), 6, 5, 8, 8, BF16),
    ("XL", "17x128x128", (8, 8), 6, 5, 8, 8, replace(BF16, tensor_parallel_size=2)),
    ("4B", "17x256x256", (16, 16), 10, 5, 4, 64, BF16),
    ("4B", "17x256x256", (16, 16), 10, 5, 4, 64, replace(BF16, tensor_parallel_size=2)),
    ("4B", "17x512x512", (32, 32), 12, 5, 1, 64, replace(BF16, tensor_parallel_size=4)),
    ("4B", "65x384x672", (24, 42), 12, 17, 1, 64, replace(BF16, tensor_parallel_size=4, recompute="full")),
    ("4B", "65x384x672", (24, 42), 12, 17, 1, 64, replace(BF16, tensor_parallel_size=4, context_parallel_size=2, recompute="full")),
    ("4B", "65x384x672", (24, 42), 12, 17, 1, 64, replace(BF16, tensor_parallel_size=4, context_parallel_size=4, recompute="selective")),
    (
        "4B", "65x384x672", (24, 42), 12, 17, 1, 64,
        replace(BF16, tensor_parallel_size=4, pipeline_parallel_size=2, virtual_pipeline_size=3, context_parallel_size=2, recompute="full"),
    ),
)  # fmt: skip


def main() -> None:
    """Compares, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print what the paper's sizes take")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if args.only:
        ratio = planned_over_measured(RUNS[args.only])
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(ratio))
        return
    results = {name.replace(" ", "_"): _launch(name) for name in RUNS}
    report(
        "memory",
        hardware("cpu", 1),
        {f"planned_over_measured_{name}": value for name, value in results.items()},
        args.keep,
    )


def planned_over_measured(parallel: ParallelConfig, model: ModelConfig = SMALL) -> float:
    """Of the process whose step takes the most memory."""
    info = initialize(parallel, 0)
    layout = model.layout(multiple=parallel.sequence_multiple)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training = Training(model, parallel, info, [clips(model, CLIPS, layout) for _ in range(MICROBATCHES)])
        for _ in range(2):  # the first step makes the optimizer's states
            training.step()
    peak = torch.tensor(_peak(profiler))
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    planned = estimate(model, parallel, info.world_size, layout, CLIPS, MICROBATCHES, gpu=False)
    destroy()
    return round(planned.total / peak.item(), 3)


def table() -> str:
    """Markdown: one line a plan."""
    head = [
        "size",
        "clip",
        "clips",
        "GPUs",
        "layout",
        "weights + gradients",
        "optimizer",
        "activations",
        "at work",
        "communication",
        "together (GiB)",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for size, clip, grid, scales, frames, number, processes, parallel in PLANS:
        model = network(PAPER[size], ScaleSchedule.for_grid(*grid, scales), frames)
        layout = model.layout()
        # enough microbatches to fill the pipeline
        memory = estimate(model, parallel, processes, layout, number, 4 * parallel.pipeline_parallel_size)
        cells = [size, clip, str(number), str(processes), _name(parallel, processes), *_gigabytes(memory)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gigabytes(memory: Memory) -> list[str]:
    states = (memory.parameters + memory.gradients, memory.optimizer)
    parts = (*states, memory.activations, memory.working, memory.communication, memory.total)
    return [f"{part / 2**30:.1f}" for part in parts]


def _name(parallel: ParallelConfig, processes: int) -> str:
    sizes = {
        "TP": parallel.tensor_parallel_size,
        "CP": parallel.context_parallel_size,
        "PP": parallel.pipeline_parallel_size,
    }
    data = processes
    for size in sizes.values():
        data //= size
    name = " ".join(f"{what} {size}" for what, size in {**sizes, "DP": data}.items() if size > 1)
    name += f", {parallel.virtual_pipeline_size} virtual stages" if parallel.virtual_pipeline_size > 1 else ""
    return name + (f", recompute {parallel.recompute}" if parallel.recompute != "none" else "")


def _peak(profiler: profile) -> int:
    """The largest sum of all tensors, in bytes, since the profiler began."""
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    largest = now = 0
    for _, change in changes:
        now += change
        largest = max(largest, now)
    return largest


def _launch(name: str) -> float:
    processes = 2 if name[:2] in ("TP", "PP", "CP", "DP") else 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, "-m", "benchmarks.memory", "--only", name],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
