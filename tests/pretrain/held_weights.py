"""What each process of some layouts really holds, and what the planner says of it; under torchrun."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from benchmarks.memory import SMALL
from parallel.memory import parameters
from parallel.setup import ParallelConfig, destroy, initialize
from parallel.train_step import build_model
from tests.parallel.matrix import leave_layout

LAYOUTS = (
    ParallelConfig(tensor_parallel_size=2),
    ParallelConfig(pipeline_parallel_size=2),
    ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_size=3),
)

if __name__ == "__main__":
    found = []
    for layout in LAYOUTS:
        info = initialize(layout, 0)
        chunks = build_model(SMALL, layout, info)
        held = sum(one.numel() for chunk in chunks for one in chunk.parameters())
        both = [held, parameters(SMALL, layout, info.pipeline_parallel_rank)]
        gathered = [None] * info.world_size
        dist.all_gather_object(gathered, both)
        found.append(gathered)
        leave_layout()
    if info.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    destroy()
