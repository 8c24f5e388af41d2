"""The training step: model FLOPs over the machine's matmul rate, megatron's overhead, attention's work, cost against length.

    python -m benchmarks.train_step --keep                    one core, some five minutes
    python -m benchmarks.train_step --threads 2
    python -m benchmarks.train_step --device cuda --keep      on a GPU: the last three lines below instead

All ratios are measured by turns in this process, from the best of their repetitions.

gemm_fraction            (model FLOPs of a step / its time) / (rate of one large matmul), same dtype and threads; width 1024, 4 layers, 666
                         tokens. Model FLOPs as `pretrain.planning.flops` counts them, over visible pairs, forward and backward,
                         recomputation not counted; the step with its loss and AdamW timed
overhead_vs_reference    time of the megatron-core step over that of the plain model of `inference/` with torch's AdamW (in bfloat16 the
                         plain step lacks the float32 main copies and gradients, so that it does less)
attention_work_ratio     query-key pairs worked on over visible ones, 24x42 tokens, 17 latent frames, p_mask 0.5
length_cost_spread       largest over smallest time a token at 5, 9 and 17 latent frames of 8x8 tokens with a window of 4
save_stall_steps         what a checkpoint that is saved in the background delays the training by, in steps: the time of the steps from its
                         beginning until it is complete, less as many ordinary ones; the worst of the second and third save
loss_memory_ratio        memory of the loss and its gradient above the logits, over the logits' size
mfu_bfloat16             model FLOPs of L's step at 17x256x256 clips over its time, over the GPU's published peak without sparsity
fp8_speedup              time of that step in bfloat16 over that in FP8 (delayed scaling)
flex_over_flash_80       time of FlexAttention over FlashAttention's, one frame's queries against an unmasked prefix, 4B's head width 80
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.report import hardware, peak_memory, report
from benchmarks.timing import best, by_turns
from benchmarks.training import Training, clips, network
from inference.config import ModelConfig
from inference.model import VideoARTransformer
from parallel.attention import AttentionContext
from parallel.frame_attention import Visibility
from parallel.peak import published_peak
from parallel.saving import Saver
from parallel.setup import ParallelConfig, ProcessInfo, destroy, initialize
from parallel.train_step import Microbatch
from pretrain.bitwise_loss import bitwise_loss
from pretrain.planning.flops import count
from tokenizer.errors import UserError
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout

WIDE = ModelConfig(
    num_layers=4, hidden_size=1024, num_attention_heads=16, scales=ScaleSchedule.square(8, 6).scales, num_frames=5, bits=32, text_dim=64,
    max_text_length=16,
)  # fmt: skip
MATMUL = 2048


def main() -> None:
    """Runs all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        report("train_step_gpu", hardware("cuda", 1), on_gpu(args.repeat), args.keep)
        return
    results: dict[str, Any] = {"loss_memory_ratio": loss_memory()}
    info = initialize(ParallelConfig(), 0)
    for precision in ("float32", "bfloat16"):
        results |= {
            name if precision == "float32" else f"{name}_{precision}": value
            for name, value in against_matmul(ParallelConfig(precision=precision), info, args.repeat).items()
        }
    results["attention_work_ratio"] = attention_work()
    results |= cost_by_length(info, args.repeat)
    results |= save_stall(info)
    destroy()
    report("train_step", hardware("cpu", args.threads), results, args.keep)


def plain_step(config: ModelConfig, dtype: torch.dtype, batch: Microbatch) -> Callable[[], None]:
    """The same step on the plain model."""
    model = VideoARTransformer(config).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step() -> None:
        logits = model(batch.inputs, batch.layout, batch.text, batch.text_lengths, None, None)
        bitwise_loss(logits.float(), batch.targets, batch.layout)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def against_matmul(parallel: ParallelConfig, info: ProcessInfo, repeat: int) -> dict[str, float]:
    """`gemm_fraction` and `overhead_vs_reference` at one precision."""
    layout, dtype = WIDE.layout(), parallel.dtype
    batch = clips(WIDE, 1, layout)
    a, b = (torch.randn(MATMUL, MATMUL).to(dtype) for _ in range(2))
    steps = (Training(WIDE, parallel, info, [batch]).step, plain_step(WIDE, dtype, batch), lambda: torch.mm(a, b))
    ours, plain, matmul = by_turns(steps, repeat)
    rate = 2 * MATMUL**3 / matmul
    return {
        "gemm_fraction": round(count(WIDE, layout, batch.text_lengths).model / ours / rate, 3),
        "overhead_vs_reference": round(ours / plain, 3),
        "step_seconds": round(ours, 3),
        "matmul_gflops_per_second": round(rate / 1e9, 1),
    }


def attention_work() -> float:
    """Pairs of the CPU's frame-by-frame attention; padding of a GPU's blocks is not part of it."""
    config = replace(WIDE, scales=ScaleSchedule.for_grid(24, 42, 10).scales, num_frames=17)
    layout, lengths = config.layout(), torch.tensor([config.max_text_length])
    seen = torch.rand(1, 17, 17, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = AttentionContext.build(config, layout, lengths, seen, torch.float32, "frames").mask
    assert isinstance(mask, Visibility)
    done = needed = 0
    for group in mask.groups(torch.float32):
        done += group.hidden.numel()
        needed += int((group.hidden == 0).sum())
    return round(done / needed, 3)


def cost_by_length(info: ProcessInfo, repeat: int) -> dict[str, float]:
    """Time a token against the number of frames."""
    config = replace(WIDE, num_layers=2, hidden_size=512, num_attention_heads=8, num_frames=17, window=4)
    batches = [clips(config, 1, replace(config.layout(), num_frames=frames)) for frames in (5, 9, 17)]
    times = by_turns([Training(config, ParallelConfig(), info, [batch]).step for batch in batches], repeat + 2)
    each = [seconds / batch.layout.length for seconds, batch in zip(times, batches)]
    return {"length_cost_spread": round(max(each) / min(each), 3)} | {
        f"microseconds_a_token_{batch.layout.num_frames}_frames": round(1e6 * one, 1)
        for one, batch in zip(each, batches)
    }


def save_stall(info: ProcessInfo) -> dict[str, float]:
    """Of the network that `gemm_fraction` is measured on."""
    training = Training(WIDE, ParallelConfig(), info, [clips(WIDE, 1, WIDE.layout())])
    delays, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(folder, keep=1)
        for number in range(3):
            ordinary = statistics.median(best(training.step) for _ in range(5))
            started, steps = time.perf_counter(), 0
            saver.save(number, training.chunks, training.optimizer, {}, background=True)
            while True:
                training.step()
                steps += 1
                if saver.poll():
                    break
            passed = time.perf_counter() - started
            seconds.append(passed)
            delays.append((passed - steps * ordinary) / ordinary)
    return {"save_stall_steps": round(max(delays[1:]), 2), "save_seconds": round(max(seconds[1:]), 1)}


def on_gpu(repeat: int) -> dict[str, float]:
    """L on one GPU, and the two attention kernels."""
    name = torch.cuda.get_device_name()
    peak = published_peak(name)
    if peak is None:
        raise UserError(f"the peak of '{name}' is not known: add it to PEAKS in parallel/peak.py.")
    config = network("ucf101-l", ScaleSchedule.for_grid(16, 16, 10), 5)
    times = {}
    for fp8 in ("none", "delayed"):
        parallel = ParallelConfig(precision="bfloat16", fp8=fp8)  # type: ignore[arg-type]
        info = initialize(parallel, 0)
        batch = clips(config, 8, config.layout(multiple=parallel.sequence_multiple)).to("cuda")
        (times[fp8],) = by_turns([Training(config, parallel, info, [batch]).step], repeat, "cuda")
        destroy()
    flops = count(config, config.layout(), torch.ones(8, dtype=torch.long)).model
    query = torch.randn(1, 32, 1024, 80, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(1, 32, 8192, 80, device="cuda", dtype=torch.bfloat16)
    flex = torch.compile(flex_attention, dynamic=False)
    runs = (lambda: flex(query, key, key), lambda: F.scaled_dot_product_attention(query, key, key))
    with torch.no_grad():
        flexible, flash = by_turns(runs, repeat, "cuda")
    return {
        "mfu_bfloat16": round(flops / times["none"] / peak, 3),
        "step_seconds_bfloat16": round(times["none"], 4),
        "fp8_speedup": round(times["none"] / times["delayed"], 3),
        "flex_over_flash_80": round(flexible / flash, 3),
    }


def loss_memory() -> float:
    """Must run first: it reads the process's peak."""
    layout = SequenceLayout(ScaleSchedule.square(4, 4), 5, 0)

    def run(number: int) -> float:
        logits = torch.randn(layout.video_tokens, number, 48).transpose(0, 1).requires_grad_()
        targets = torch.randint(0, 2, (number, 5, layout.schedule.tokens_per_frame, 48), dtype=torch.bool)
        before = peak_memory()
        bitwise_loss(logits, targets, layout)[0].backward()
        return (peak_memory() - before) / (4 * logits.numel())

    run(8)
    return round(run(20000), 3)


if __name__ == "__main__":
    main()
