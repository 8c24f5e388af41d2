"""The parity matrix: every layout of up to four processes against the plain model of `inference/`, printed as a table.

    python -m tests.parallel.matrix                                      all layouts, some three minutes on 2 cores
    torchrun --nproc-per-node 2 matrix.py OUT.json FOLDER STEPS          those of two processes

Each layout trains some steps with flipped bits, hidden frames and dropped conditions on clips and images of changing grids, saves
in the background after three of them, and then goes on from what the layout before it saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_pipelines.code_stream import CodeBatch
from inference.config import ModelConfig
from inference.initial import InitialWeights
from inference.model import VideoARTransformer
from parallel import checkpoint
from parallel.convert import gather_reference
from parallel.memory import parameters as planned_parameters
from parallel.saving import Saver
from parallel.setup import ParallelConfig, ProcessInfo, destroy, initialize
from parallel.train_step import Microbatch, build_model, build_optimizer, forward_backward, update
from pretrain.batch_loss import microbatch
from pretrain.bitwise_loss import bitwise_loss
from pretrain.error_correction import ErrorCorrectionConfig
from pretrain.objective import ObjectiveConfig
from pretrain.randomness import Randomness
from tests.parallel.torchrun import torchrun
from tokenizer.scales import ScaleSchedule

SEED, LR, DECAY, CLIPS, MICROBATCHES, SAVED = 3, 2e-3, 0.1, 8, 4, 3
GRIDS = ((1, 1), (2, 2), (3, 3))
TEXT = ModelConfig(
    num_layers=4, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, scales=GRIDS, num_frames=3, bits=8,
    text_dim=12, max_text_length=5,
)  # fmt: skip
CLASSES = ModelConfig(
    num_layers=4, hidden_size=16, num_attention_heads=2, scales=((1, 1), (1, 2)), num_frames=3, bits=6, num_classes=4,
    context_block=True, window=1, rope="flat",
)  # fmt: skip
# what a step's clips look like: frames and grids; images are clips of one frame
BUCKETS = ((3, GRIDS), (1, GRIDS), (2, ((1, 1), (2, 3))), (3, GRIDS), (3, GRIDS[:2]))
PLAIN = ParallelConfig()


def objective(config: ModelConfig) -> ObjectiveConfig:
    """Everything random is on."""
    return ObjectiveConfig(
        randomness=Randomness(SEED),
        error_correction=ErrorCorrectionConfig(p_max=0.25),
        p_mask=0.3,
        condition_dropout=0.3,
        class_conditional=config.num_classes > 0,
    )


def clips(config: ModelConfig, step: int) -> CodeBatch:
    """The global batch of a step: unequal texts, latents on even steps."""
    draw = torch.Generator().manual_seed(100 + step)
    frames, grids = BUCKETS[step % len(BUCKETS)] if not config.num_classes else (config.num_frames, config.scales)
    schedule, bits = ScaleSchedule(grids), config.bits
    lengths = torch.randint(1, config.max_text_length + 1, (CLIPS,), generator=draw)
    text = torch.randn(CLIPS, config.max_text_length, max(config.text_dim, 1), generator=draw)
    text[torch.arange(config.max_text_length) >= lengths[:, None]] = 0
    return CodeBatch(
        tokens=torch.rand(CLIPS, frames, schedule.tokens_per_frame, bits, generator=draw) > 0.5,
        latents=torch.randn(CLIPS, frames, bits, *schedule.grid, generator=draw) if step % 2 == 0 else None,
        text=text,
        text_lengths=lengths,
        class_ids=torch.randint(0, max(config.num_classes, 1), (CLIPS,), generator=draw),
        sample_index=torch.arange(CLIPS) + CLIPS * step,
        epoch=torch.zeros(CLIPS, dtype=torch.long),
        schedule=schedule,
    )


def microbatches(config: ModelConfig, parallel: ParallelConfig, rank: int, size: int, step: int) -> list[Microbatch]:
    """A data-parallel rank's share of a step: enough microbatches for a pipeline's steady phase."""
    share, each = CLIPS // size, CLIPS // size // MICROBATCHES
    batch = clips(config, step).rows(rank * share, (rank + 1) * share)
    parts = [batch.rows(start, start + each) for start in range(0, share, each)]
    return [microbatch(part, objective(config), config, parallel, training=True) for part in parts]


def loss(logits: torch.Tensor, of: Microbatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The trainer's."""
    return bitwise_loss(logits, of.targets, of.layout, "scale")


@dataclasses.dataclass
class Expected:
    """What the plain model does: losses and gradient norms by step, and the first step's gradients by name."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]


def plain(config: ModelConfig, steps: int) -> Expected:
    """The plain model with torch's AdamW."""
    model = VideoARTransformer(config)
    model.load_state_dict(dict(InitialWeights(VideoARTransformer.shapes(config), config.num_layers, SEED)))
    groups = [[p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]]
    decay = [{"params": group, "weight_decay": rate} for group, rate in zip(groups, (DECAY, 0.0))]
    adam, found = torch.optim.AdamW(decay, LR, betas=(0.9, 0.95)), Expected([], [], {})
    for step in range(steps):
        adam.zero_grad()
        total = torch.zeros(())
        for of in microbatches(config, PLAIN, 0, 1, step):
            logits = model(of.inputs, of.layout, of.text, of.text_lengths, of.frame_mask, of.drop_condition)
            total = total + loss(logits, of)[0] / CLIPS
        total.backward()
        if step == 0:
            found.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.losses.append(float(total.detach()))
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        adam.step()
    return found


@torch.no_grad()
def gather_gradients(chunks: list[Any]) -> dict[str, torch.Tensor]:
    """All gradients under the reference's names (each rank holds its shard of the reduced ones)."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for chunk in chunks:
        for bucket in (bucket for buffer in chunk.buffers for bucket in buffer.buckets):
            data, share = bucket.grad_data, bucket.grad_data.numel() // group.size()
            own = data[group.rank() * share : (group.rank() + 1) * share].clone()
            data.zero_()[group.rank() * share : (group.rank() + 1) * share] = own
            dist.all_reduce(data, group=group)
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


def train(
    config: ModelConfig, parallel: ParallelConfig, expected: Expected, save: Path | None, load: Path | None
) -> dict[str, float]:
    """One layout against the plain model, on rank 0; from a checkpoint of step `SAVED` or from the start."""
    info = initialize(parallel, SEED)
    saver = None if save is None else Saver(save)
    chunks = build_model(config, parallel, info, seed=SEED if load is None else None)
    numbers: dict[str, float] = {"loss": 0.0, "norm": 0.0}
    held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    unplanned = torch.tensor(abs(held - planned_parameters(config, parallel, info.pipeline_parallel_rank)))
    dist.all_reduce(unplanned)
    numbers["unplanned"] = float(unplanned)
    if load is None:
        start = gather_reference(chunks)
        drawn = InitialWeights(VideoARTransformer.shapes(config), config.num_layers, SEED)
        numbers["conversion"] = sum(float(not torch.equal(value, drawn[name])) for name, value in start.items())
        numbers["weights"] = len(start) / len(drawn)
    optimizer, first, steps = build_optimizer(chunks, LR, DECAY), 0, len(expected.losses)
    if load is not None:
        first, steps = SAVED, SAVED + 2
        checkpoint.load(load, chunks, optimizer)
    for step in range(first, steps):
        result = forward_backward(chunks, share(config, parallel, info, step), loss)
        if step == 0:
            found = gather_gradients(chunks)
            numbers["gradients"] = max(
                (difference(found[name], grad) for name, grad in expected.gradients.items() if found), default=0
            )
            numbers["clips"] = result.clips
        norm = update(optimizer, LR)
        numbers["loss"] = max(numbers["loss"], abs(result.loss - expected.losses[step]))
        numbers["norm"] = max(numbers["norm"], abs(norm / expected.norms[step] - 1))
        if saver is not None:
            saver.poll()
            if step + 1 == SAVED:
                saver.save(SAVED, chunks, optimizer, {}, background=True)  # the steps that follow must not reach it
    if saver is not None:
        saver.wait()
    leave_layout()
    return numbers


def leave_layout() -> None:
    """Makes room for the next layout; megatron forgets its groups, but their threads would stay and slow the next ones down."""
    dist.barrier()  # a group that one process leaves while another still waits in it ends the other (gloo: SIGABRT)
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_names):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def share(config: ModelConfig, parallel: ParallelConfig, info: ProcessInfo, step: int) -> list[Microbatch]:
    """This process's microbatches."""
    return microbatches(config, parallel, info.data_parallel_rank, info.data_parallel_size, step)


def layouts(world: int) -> dict[str, ParallelConfig]:
    """{TP 1, 2} x {PP 1, 2, 2 with virtual stages} x {CP 1, 2} x {DP 1, 2} of so many processes, and variants of two."""
    found: dict[str, ParallelConfig] = {}
    for pipeline, virtual in ((1, 1), (2, 1), (2, 2)):
        for tensor in (1, 2):
            for context in (1, 2):
                data, rest = divmod(world, tensor * context * pipeline)
                if rest or data not in (1, 2):
                    continue
                parts = [("TP", tensor), ("PP", pipeline), ("CP", context), ("DP", data)]
                name = " ".join(f"{what}{size}" for what, size in parts if size > 1) or "one process"
                found[name + (" virtual" if virtual > 1 else "")] = ParallelConfig(
                    tensor, pipeline, virtual, context_parallel_size=context
                )
    if world == 2:
        found |= {
            "TP2 without SP": ParallelConfig(2, sequence_parallel=False),
            "TP2 recompute full": ParallelConfig(2, recompute="full"),
            "CP2 recompute selective": ParallelConfig(context_parallel_size=2, recompute="selective"),
            "DP2 overlap": ParallelConfig(overlap="on"),
            "CP2 sdpa": ParallelConfig(context_parallel_size=2, attention="sdpa"),
        }
    return found


def run(out: Path, folder: Path, steps: int) -> None:
    """All layouts of this many processes; each reads what the one before it saved, the first what `folder` already holds."""
    torch.set_num_threads(1)
    expected = {"text": plain(TEXT, steps), "classes": plain(CLASSES, 2)}
    results: dict[str, dict[str, Any]] = {}
    for name, parallel in layouts(int(os.environ.get("WORLD_SIZE", "1"))).items():
        started, saved = time.monotonic(), folder / name.replace(" ", "-")
        before = json.loads((folder / "last.json").read_text()) if (folder / "last.json").is_file() else None
        numbers = {
            "text": train(TEXT, parallel, expected["text"], saved, None),
            "classes": train(CLASSES, parallel, expected["classes"], None, None),
        }
        if before is not None:
            numbers["resumed"] = train(TEXT, parallel, expected["text"], None, Path(before["folder"]))
        dist.barrier()
        if dist.get_rank() == 0:
            results[name] = {
                **numbers,
                "from": before and before["name"],
                "seconds": time.monotonic() - started,
            }
            (folder / "last.json").write_text(json.dumps({"name": name, "folder": str(saved / f"step-{SAVED}")}))
        dist.barrier()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    destroy()


def launch(out: Path, folder: Path, processes: int, steps: int) -> dict[str, dict[str, Any]]:
    """`run` under torchrun."""
    done = torchrun(Path(__file__).resolve(), processes, out, folder, steps)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(out.read_text())


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line a layout: the largest differences from the plain model."""
    lines = [
        "| layout | gradients (worst tensor) | loss | gradient norm | classes: gradients, loss | resumed from | loss | gradient norm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        text, classes, resumed = one["text"], one["classes"], one.get("resumed")
        after = (one["from"], f"{resumed['loss']:.0e}", f"{resumed['norm']:.0e}") if resumed else ("", "", "")
        cells = [name, f"{text['gradients']:.0e}", f"{text['loss']:.0e}", f"{text['norm']:.0e}"]
        cells += [f"{classes['gradients']:.0e}, {classes['loss']:.0e}", *after]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def everything(folder: Path) -> dict[str, dict[str, Any]]:
    """All layouts of one, two and four processes, each after the other; those of two train for 20 steps."""
    results: dict[str, dict[str, Any]] = {}
    for processes, steps in ((1, 5), (2, 20), (4, 5)):
        results |= launch(folder / "out.json", folder, processes, steps)
    return results


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as name:
            print(table(everything(Path(name))))
