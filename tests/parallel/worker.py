"""Run by the tests under torchrun: compares layouts with the plain model, moves checkpoints between them, dies while saving.

torchrun --nproc-per-node 2 worker.py layouts|checkpoints OUT.json
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from inference.config import ModelConfig
from inference.model import VideoARTransformer
from parallel import checkpoint
from parallel.convert import gather_reference
from parallel.ema import Ema
from parallel.setup import ParallelConfig, ProcessInfo, data_group, destroy, initialize
from parallel.train_step import Microbatch, build_model, build_optimizer, forward_backward, update

SEED, LR, DECAY, MICROBATCHES = 3, 1e-2, 0.1, 4
GRIDS = ((1, 1), (2, 2), (3, 3))
TEXT = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, scales=GRIDS, num_frames=3, bits=8,
    text_dim=12, max_text_length=5,
)  # fmt: skip
DEEP = dataclasses.replace(TEXT, num_layers=4)
VIRTUAL = ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_size=2)
CLASSES = ModelConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, scales=((1, 1), (1, 2)), num_frames=3, bits=6, num_classes=4,
    context_block=True, window=1, rope="flat",
)  # fmt: skip


def reference(config: ModelConfig) -> VideoARTransformer:
    """The plain model with the weights that `build_model(seed=SEED)` gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return VideoARTransformer(config)


def batch(config: ModelConfig, multiple: int, clips: slice, index: int = 0) -> Microbatch:
    """Clips `clips` of the four of microbatch `index`: unequal texts, hidden frames, dropped conditions."""
    layout = config.layout(multiple=multiple)
    draw = torch.Generator().manual_seed(100 + index)
    video, frames = layout.video_tokens, config.num_frames
    if config.num_classes:
        text, lengths = torch.tensor([0, 3, 1, 2]), torch.ones(4, dtype=torch.long)
    else:
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


def plain_logits(model: VideoARTransformer, of: Microbatch) -> torch.Tensor:
    """The reference on an unpadded sequence."""
    layout = model.config.layout()
    return model(of.inputs, layout, of.text, of.text_lengths, of.frame_mask, of.drop_condition)


def microbatches(config: ModelConfig, parallel: ParallelConfig, info: ProcessInfo) -> list[Microbatch]:
    """This data-parallel rank's share of four microbatches of four clips: enough for a pipeline's steady phase."""
    share = 4 // info.data_parallel_size
    clips = slice(info.data_parallel_rank * share, (info.data_parallel_rank + 1) * share)
    return [batch(config, parallel.sequence_multiple, clips, index) for index in range(MICROBATCHES)]


@torch.no_grad()
def gather_gradients(chunks: list[Any], info: ProcessInfo) -> dict[str, torch.Tensor]:
    """All gradients under the reference's names (each data-parallel rank holds its shard of the reduced ones)."""
    for chunk in chunks:
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            data, share = bucket.grad_data, bucket.grad_data.numel() // info.data_parallel_size
            own = data[info.data_parallel_rank * share : (info.data_parallel_rank + 1) * share].clone()
            data.zero_()[info.data_parallel_rank * share : (info.data_parallel_rank + 1) * share] = own
            dist.all_reduce(data, group=data_group())
    weights = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    for parameter in parameters:
        parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    gradients = gather_reference(chunks)
    for parameter, weight in zip(parameters, weights):
        parameter.copy_(weight)
    return gradients


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """||ours - reference|| / ||reference||."""
    return float((ours - reference).norm() / reference.norm())


def compare(config: ModelConfig, parallel: ParallelConfig) -> dict[str, float]:
    """One layout against the plain model, on rank 0: logits, loss, gradients, gradient norm, later losses, conversion."""
    info = initialize(parallel, SEED)
    chunks = build_model(config, parallel, info, seed=SEED)
    plain = reference(config)
    numbers: dict[str, float] = {}
    start = gather_reference(chunks)
    if info.rank == 0:
        expected = plain.state_dict()
        numbers["conversion"] = float(start.keys() != expected.keys()) + sum(
            float(not torch.equal(start[name], expected[name])) for name in expected
        )
    mine = microbatches(config, parallel, info)
    seen: list[torch.Tensor] = []

    def keep(logits: torch.Tensor, of: Microbatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        seen.append(logits.detach())
        return loss(logits, of)

    forward_backward(chunks, mine, keep, training=False)
    worst = torch.zeros(1)
    if info.is_last_stage:
        with torch.no_grad():
            worst[0] = max(difference(ours, plain_logits(plain, of)) for ours, of in zip(seen, mine))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    numbers["logits"] = worst.item()

    optimizer = build_optimizer(chunks, LR, DECAY)
    groups = [[p for p in plain.parameters() if p.dim() > 1], [p for p in plain.parameters() if p.dim() < 2]]
    adam = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": DECAY}, {"params": groups[1], "weight_decay": 0.0}],
        LR,
        betas=(0.9, 0.95),
    )
    everything = [batch(config, 1, slice(0, 4), index) for index in range(MICROBATCHES)]
    for step in range(3):
        result = forward_backward(chunks, mine, loss)
        if step == 0:
            gradients = gather_gradients(chunks, info)
        norm = update(optimizer, LR)
        adam.zero_grad()
        total = sum(loss(plain_logits(plain, of), of)[0] for of in everything) / (4 * MICROBATCHES)
        total.backward()  # type: ignore[union-attr]
        if step == 0 and info.rank == 0:
            wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
            numbers["gradients"] = max(difference(gradients[name], grad) for name, grad in wanted.items())  # type: ignore[arg-type]
            numbers["clips"] = result.clips
            numbers["report"] = abs(result.report["twice"] - 2 * result.loss)
        plain_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step()
        numbers[f"loss {step}"] = abs(result.loss - float(total.detach()))  # type: ignore[union-attr]
        numbers[f"norm {step}"] = abs(norm / float(plain_norm) - 1)
    parallel_state.destroy_model_parallel()
    return numbers


LAYOUTS = {
    "TP2 + SP": (TEXT, ParallelConfig(tensor_parallel_size=2)),
    "TP2 + SP, classes": (CLASSES, ParallelConfig(tensor_parallel_size=2)),
    "TP2": (TEXT, ParallelConfig(tensor_parallel_size=2, sequence_parallel=False)),
    "PP2": (TEXT, ParallelConfig(pipeline_parallel_size=2)),
    "PP2, virtual stages": (DEEP, VIRTUAL),
    "DP2": (TEXT, ParallelConfig()),
    "DP2, recomputation": (TEXT, ParallelConfig(recompute="full")),
    "TP2 + SP, recomputation": (TEXT, ParallelConfig(tensor_parallel_size=2, recompute="full")),
}


PRODUCTS = {
    "TP2 + SP, PP2": (TEXT, ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)),
    "TP2 + SP, PP2, virtual stages, selective recomputation": (
        DEEP,
        ParallelConfig(2, 2, virtual_pipeline_size=2, recompute="selective"),
    ),
    "TP2 + SP, DP2": (TEXT, ParallelConfig(tensor_parallel_size=2)),
    "PP2, virtual stages, DP2": (DEEP, VIRTUAL),
}
ALONE = {"TP1": (TEXT, ParallelConfig()), "TP1, classes": (CLASSES, ParallelConfig())}


def layouts(out: Path) -> None:
    """Every layout of so many processes."""
    wanted = {"1": ALONE, "2": LAYOUTS, "4": PRODUCTS}[os.environ["WORLD_SIZE"]]
    results = {name: compare(config, parallel) for name, (config, parallel) in wanted.items()}
    if int(os.environ["RANK"]) == 0:
        out.write_text(json.dumps(results))


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
        checkpoint.save(folder, save, chunks, optimizer, {"position": 17}, ema=ema)
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


def killed(out: Path) -> None:
    """Saves step 1, and dies in the middle of saving step 2."""
    info = initialize(ParallelConfig(), SEED)
    chunks = build_model(TEXT, ParallelConfig(), info, seed=SEED)
    optimizer = build_optimizer(chunks, LR)
    forward_backward(chunks, microbatches(TEXT, ParallelConfig(), info), loss)
    update(optimizer, LR)
    checkpoint.save(out, 1, chunks, optimizer, {})
    checkpoint._write_marker = lambda *unused: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save(out, 2, chunks, optimizer, {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"layouts": layouts, "checkpoints": checkpoints, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
    destroy()
