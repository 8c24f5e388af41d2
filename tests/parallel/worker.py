"""Run by the tests under torchrun: moves checkpoints with running means between layouts, dies or runs out of space while saving.

torchrun --nproc-per-node 2 worker.py checkpoints|killed|full OUT
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from inference.config import ModelConfig
from parallel import checkpoint, saving
from parallel.convert import gather_reference
from parallel.ema import Ema
from parallel.saving import Saver
from parallel.setup import ParallelConfig, ProcessInfo, destroy, initialize
from parallel.train_step import Microbatch, build_model, build_optimizer, forward_backward, update
from tokenizer.errors import UserError

SEED, LR, DECAY, MICROBATCHES = 3, 1e-2, 0.1, 4
GRIDS = ((1, 1), (2, 2), (3, 3))
TEXT = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, scales=GRIDS, num_frames=3, bits=8,
    text_dim=12, max_text_length=5,
)  # fmt: skip
DEEP = dataclasses.replace(TEXT, num_layers=4)
VIRTUAL = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_size=2)


def batch(config: ModelConfig, multiple: int, clips: slice, index: int = 0) -> Microbatch:
    """Clips `clips` of the four of microbatch `index`: unequal texts, hidden frames, dropped conditions."""
    layout = config.layout(multiple=multiple)
    draw = torch.Generator().manual_seed(100 + index)
    video, frames = layout.video_tokens, config.num_frames
    text, lengths = torch.randn(4, 5, config.text_dim, generator=draw), torch.tensor([1, 5, 3, 4])
    whole = {
        "inputs": torch.randn(4, video, config.bits, generator=draw),
        "text": text,
        "text_lengths": lengths,
        "frame_mask": torch.rand(4, frames, frames, generator=draw) > 0.5,
        "drop_condition": torch.tensor([False, True, False, True]),
        "targets": torch.randint(0, 2, (4, video, config.bits), generator=draw).float(),
    }
    return Microbatch(layout=layout, **{name: value[clips] for name, value in whole.items()})


def loss(logits: torch.Tensor, of: Microbatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Binary cross-entropy over the target tokens, summed over clips."""
    target = of.layout.target
    each = F.binary_cross_entropy_with_logits(logits[:, target], of.targets[:, target], reduction="none").mean((1, 2))
    return each.sum(), torch.tensor(len(each)), {"twice": 2 * each.detach().sum()}


def microbatches(config: ModelConfig, parallel: ParallelConfig, info: ProcessInfo) -> list[Microbatch]:
    """This data-parallel rank's share of four microbatches of four clips: enough for a pipeline's steady phase."""
    share = 4 // info.data_parallel_size
    clips = slice(info.data_parallel_rank * share, (info.data_parallel_rank + 1) * share)
    return [batch(config, parallel.sequence_multiple, clips, index) for index in range(MICROBATCHES)]


def train(parallel: ParallelConfig, folder: Path, load: Path | None, steps: int, save: int | None) -> dict[str, Any]:
    """Trains from a checkpoint or from the start; saves after the steps."""
    info = initialize(parallel, SEED)
    chunks = build_model(DEEP, parallel, info, seed=SEED if load is None else None)
    optimizer, ema = build_optimizer(chunks, LR, DECAY), Ema(chunks, 0.9)
    position = -1
    if load is not None:
        # used moments must be overwritten by the loaded ones, too
        forward_backward(chunks, microbatches(DEEP, parallel, info), loss)
        update(optimizer, LR)
        position = checkpoint.load(load, chunks, optimizer, ema)["position"]
    begin = gather_reference(chunks) | means(chunks, ema)
    losses, norms = [], []
    for _ in range(steps):
        losses.append(forward_backward(chunks, microbatches(DEEP, parallel, info), loss).loss)
        norms.append(update(optimizer, LR))
        ema.update()
    if save is not None:
        Saver(folder).save(save, chunks, optimizer, {"position": 17}, ema)
    end = gather_reference(chunks) | means(chunks, ema)
    parallel_state.destroy_model_parallel()
    return {"losses": losses, "norms": norms, "begin": begin, "end": end, "position": position}


def means(chunks: list[Any], ema: Ema) -> dict[str, torch.Tensor]:
    """The running means as the plain model's weights, with names of their own."""
    with ema.applied():
        return {f"mean of {name}": value for name, value in gather_reference(chunks).items()}


def checkpoints(out: Path) -> None:
    """Saves after 3 steps on TP 2 and goes on for 3 more on other layouts; two of them save again, and TP 2 loads that."""
    folder, tp = out.parent / "checkpoints", ParallelConfig(tensor_parallel_size=2)
    written = train(tp, folder, None, 3, 3)
    unbroken = train(tp, folder, None, 9, None)
    step3 = folder / "step-3"
    runs = {
        "TP2": train(tp, folder, step3, 3, None),
        "PP2": train(ParallelConfig(pipeline_parallel_size=2), folder, step3, 3, None),
        "DP2": train(ParallelConfig(), folder, step3, 3, 6),
        "TP2 from DP2": train(tp, folder, folder / "step-6", 0, None),
        "virtual": train(VIRTUAL, folder, step3, 3, 6),
        "TP2 from virtual": train(tp, folder, folder / "step-6", 3, None),
        "virtual from virtual": train(VIRTUAL, folder, folder / "step-6", 3, None),
    }
    if int(os.environ["RANK"]) == 0:
        torch.save({"written": written, "unbroken": unbroken, "runs": runs}, out)


def one_step(out: Path) -> tuple[Saver, list[Any], Any]:
    """A network that has saved its first step."""
    info = initialize(ParallelConfig(), SEED)
    chunks = build_model(TEXT, ParallelConfig(), info, seed=SEED)
    optimizer, saver = build_optimizer(chunks, LR), Saver(out)
    forward_backward(chunks, microbatches(TEXT, ParallelConfig(), info), loss)
    update(optimizer, LR)
    saver.save(1, chunks, optimizer, {})
    return saver, chunks, optimizer


def killed(out: Path) -> None:
    """Saves step 1, and dies while step 2 is on its way: in the thread that writes it, or just before it is complete."""
    saver, chunks, optimizer = one_step(out)
    original = saving._write_bucket

    def die(*unused: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(*args: Any) -> None:
        original(*args)
        die()

    if os.environ["DIES"] == "writing":
        saving._write_bucket = write_and_die
    else:
        saving._write_marker = die
    saver.save(2, chunks, optimizer, {}, background=True)
    saver.wait()


def full(out: Path) -> None:
    """Saves step 1; then no file may grow any more, as on a full disk."""
    saver, chunks, optimizer = one_step(out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    saver.save(2, chunks, optimizer, {}, background=True)
    try:
        saver.wait()
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (out / "said").write_text(str(error))
        saver.save(2, chunks, optimizer, {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"checkpoints": checkpoints, "killed": killed, "full": full}[sys.argv[1]](Path(sys.argv[2]))
    destroy()
