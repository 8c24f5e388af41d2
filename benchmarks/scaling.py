"""The planner at scale: the 4B recipe on 64 to 4,096 GPUs, and the same arithmetic against what Megatron-LM publishes. Nothing is run.

    python -m benchmarks.scaling                 half a minute on one core
    python -m benchmarks.scaling --keep          writes benchmarks/results/scaling.json and docs/scaling.png
    python -m benchmarks.scaling --table         the tables of docs/planning.md, in Markdown

weak_mfu_N          predicted MFU of the 4B recipe's whole run on N H100s, the batch of each stage growing with N (as many clips a GPU
                    as the recipe has on 128), on the fastest layout that fits
weak_efficiency_N   tokens a second and GPU over those on 64
strong_mfu_N        the same with the recipe's own batches
gpt_mfu_N           GPT-3 175B on N H100s, 1,152 sequences of 4,096 tokens as in Megatron-LM's README, by the same arithmetic with the
                    shares of `MEGATRON`; its matmul_share is the one number that is fitted, to the 47% published for 96 GPUs
loss_per_doubling   what the published point of 4,608 GPUs lacks of that prediction, for each doubling from 96 on: stragglers,
                    contention and whatever else the arithmetic leaves out
weak_mfu_N_lossy    weak_mfu_N with this loss for each doubling from 64 GPUs on
gpt_ours_mfu_N      GPT-3 with the shares that our own step was measured to have
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import report
from inference.config import ModelConfig
from parallel.memory import estimate
from parallel.setup import ParallelConfig
from pretrain.config import PretrainConfig
from pretrain.planning.flops import Flops
from pretrain.planning.gpus import Gpu, load_gpu
from pretrain.planning.loads import stage_loads
from pretrain.planning.search import DAY, Search, layout_name
from pretrain.planning.shapes import read_shapes
from pretrain.planning.step_time import StepTime, Work, step_time
from tokenizer import settings
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout

HOUSE = Path(__file__).parents[1]
COUNTS = (64, 128, 256, 512, 1024, 2048, 4096)
AT_RECIPE = 128
"""GPUs on which the recipe's own batch is the weak series' one."""

# Megatron-LM, README.md, "Training Speed and Scalability": the points that its text gives of the strong scaling of GPT-3
PUBLISHED = {96: 0.47, 4608: 0.42}
GPT_COUNTS = (96, 192, 384, 768, 1536, 3072, 4608)
SEQUENCES, LENGTH, VOCABULARY = 1152, 4096, 131072
# 96 layers, width 12,288, 96 heads (Brown et al., 2020). A gated feed-forward network of 8/3 the width has as many weights as GPT's of
# 4 times; frames of one token each make attention causal; the vocabulary is counted apart
GPT = ModelConfig(
    num_layers=96, hidden_size=12288, num_attention_heads=96, ffn_hidden_size=32768, scales=((1, 1),), num_frames=LENGTH - 1, bits=64,
    num_classes=1,
)  # fmt: skip
# what the README says that it overlaps, and fused kernels: ours to state, none of it published as such
MEGATRON = {"passes_forward": 35.0, "attention_share": 0.45, "tensor_hidden": 0.5}


def main() -> None:
    """Predicts all series."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print Markdown tables before the line of JSON")
    parser.add_argument("--keep", action="store_true", help="write the results and the picture")
    args = parser.parse_args()
    gpu = load_gpu("h100")
    weak, strong = ({count: recipe(count, gpu, grows) for count in COUNTS} for grows in (True, False))
    fitted = fit(gpu)
    theirs, ours = ({count: gpt(count, one) for count in GPT_COUNTS} for one in (fitted, gpu))
    loss = 1 - (PUBLISHED[4608] / theirs[4608]["mfu"]) ** (1 / math.log2(4608 / 96))
    for count, one in weak.items():
        one["lossy"] = one["mfu"] * (1 - loss) ** math.log2(count / COUNTS[0])
    if args.table:
        print(tables(weak, strong, theirs, ours))
        print(
            f"matmul_share fitted to 96 GPUs: {fitted.matmul_share:.3f}; loss for each doubling fitted to 4,608: {100 * loss:.1f}%\n"
        )
    results: dict[str, Any] = {}
    for count in COUNTS:
        results[f"weak_mfu_{count}"] = round(weak[count]["mfu"], 4)
        results[f"weak_mfu_{count}_lossy"] = round(weak[count]["lossy"], 4)
        results[f"weak_efficiency_{count}"] = round(weak[count]["rate"] / weak[64]["rate"], 4)
        results[f"strong_mfu_{count}"] = round(strong[count]["mfu"], 4)
    results |= {"megatron_matmul_share": round(fitted.matmul_share, 4), "loss_per_doubling": round(loss, 4)}
    for count in GPT_COUNTS:
        results[f"gpt_mfu_{count}"] = round(theirs[count]["mfu"], 4)
        results[f"gpt_ours_mfu_{count}"] = round(ours[count]["mfu"], 4)
    if args.keep:
        picture(weak, strong, theirs, HOUSE / "docs" / "scaling.png")
    report("scaling", "H100s, predicted: nothing was run", results, args.keep)


def recipe(count: int, gpu: Gpu, grows: bool) -> dict[str, Any]:
    """The 4B's run on so many GPUs.

    Args:
        count: GPUs.
        gpu: each of them.
        grows: the batch grows with the GPUs.
    """
    run = settings.load(PretrainConfig, HOUSE / "pretrain" / "configs" / "t2v-4b.yaml").rooted()
    if grows:
        stages = tuple(replace(one, global_batch_size=one.global_batch_size * count // AT_RECIPE) for one in run.stages)
        run = replace(run, stages=stages)
    loads = stage_loads(run, read_shapes(run))
    best = Search(loads, run.parallel, count, gpu).run(others=0).best
    flops = sum(load.flops_a_step(one.stage) * one.stage.steps for load, one in zip(loads, best.stages))
    tokens = sum(load.tokens_a_step(one.stage) * one.stage.steps for load, one in zip(loads, best.stages))
    seconds = best.days * DAY
    return {
        "layout": layout_name(best.parallel, count),
        "days": best.days,
        "mfu": flops / seconds / count / (1e12 * gpu.bf16_tflops),
        "rate": tokens / seconds / count,
        "step": [one.time.total for one in best.stages],
        "messages": sum(one.stage.steps * _messages(one.time) for one in best.stages) / seconds,
        "bubble": sum(one.stage.steps * one.time.bubble for one in best.stages) / seconds,
    }


def gpt(count: int, gpu: Gpu) -> dict[str, Any]:
    """GPT-3 on so many GPUs, on the fastest layout that fits; MFU counts all pairs of the attention, as Megatron-LM's formula does."""
    layout = SequenceLayout(ScaleSchedule(((1, 1),)), LENGTH - 1, 1)
    width, layers = GPT.hidden_size, GPT.num_layers
    one = Flops(
        attention_matrices=2.0 * layers * LENGTH * 4 * width**2,
        feed_forward=2.0 * layers * LENGTH * 8 * width**2,
        attention=4.0 * layers * width * LENGTH * (LENGTH + 1) / 2,
        ends=2.0 * LENGTH * width * VOCABULARY,
        inputs=0.0,
    )
    model = replace(one, attention=4.0 * layers * width * LENGTH**2).model * SEQUENCES
    best: dict[str, Any] = {"mfu": 0.0}
    for parallel, clips, microbatches in _gpt_layouts(count):
        work = Work(GPT, clips * LENGTH, Flops(*(clips * part for part in vars(one).values())))
        time = step_time(work, parallel, count, microbatches, gpu)
        mfu = model / time.total / count / (1e12 * gpu.bf16_tflops)
        if mfu > best["mfu"] and estimate(GPT, parallel, count, layout, clips, microbatches).total <= gpu.usable_bytes:
            best = {
                "mfu": mfu,
                "layout": layout_name(parallel, count),
                "step": time.total,
                "bubble": time.bubble / time.total,
            }
            best["messages"] = _messages(time) / time.total
    return best


def _messages(time: StepTime) -> float:
    return time.data + time.tensor + time.context + time.messages


def _gpt_layouts(count: int) -> Iterator[tuple[ParallelConfig, int, int]]:
    """Layouts, clips of a microbatch and microbatches of a rank."""
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 3, 4, 6, 8, 12, 16, 24):
            if count % (tp * pp) or SEQUENCES % (count // (tp * pp)):
                continue
            for virtual in (1, 2, 3, 4, 6, 8, 12) if pp > 1 else (1,):
                if GPT.num_layers % (pp * virtual):
                    continue
                for clips in (1, 2, 4):
                    share = SEQUENCES // (count // (tp * pp))
                    if share % clips or (virtual > 1 and share // clips % pp):
                        continue
                    for recompute in ("none", "selective", "full"):
                        parallel = ParallelConfig(
                            tensor_parallel_size=tp,
                            pipeline_parallel_size=pp,
                            virtual_pipeline_size=virtual,
                            precision="bfloat16",
                            recompute=recompute,  # type: ignore[arg-type]
                        )
                        yield parallel, clips, share // clips


def fit(gpu: Gpu) -> Gpu:
    """Megatron's shares, with the matmul_share at which 96 GPUs reach what is published; by halving."""
    low, high = 0.3, 0.9
    for _ in range(12):
        middle = (low + high) / 2
        reached = gpt(96, replace(gpu, **MEGATRON, matmul_share=middle))["mfu"]
        low, high = (middle, high) if reached < PUBLISHED[96] else (low, middle)
    return replace(gpu, **MEGATRON, matmul_share=(low + high) / 2)


def tables(weak: dict, strong: dict, theirs: dict, ours: dict) -> str:
    """Markdown."""
    head = (
        "| GPUs | batch grows: MFU | with the loss | messages, bubble | layout | recipe's batch: MFU | days | layout |"
    )
    lines = [head, "|" + "---|" * 8]
    for count in COUNTS:
        one, other = weak[count], strong[count]
        lines.append(
            f"| {count:,} | {100 * one['mfu']:.1f}% | {100 * one['lossy']:.1f}% | {100 * one['messages']:.1f}%, "
            f"{100 * one['bubble']:.1f}% | {one['layout']} | {100 * other['mfu']:.1f}% | {other['days']:.2f} | {other['layout']} |"
        )
    head = "| GPUs | published | predicted, Megatron's shares | layout | messages, bubble | predicted, our shares |"
    lines += ["", head, "|" + "---|" * 6]
    for count in GPT_COUNTS:
        one, said = theirs[count], PUBLISHED.get(count)
        lines.append(
            f"| {count:,} | {'' if said is None else f'{100 * said:.0f}%'} | {100 * one['mfu']:.1f}% | {one['layout']} | "
            f"{100 * one['messages']:.1f}%, {100 * one['bubble']:.1f}% | {100 * ours[count]['mfu']:.1f}% |"
        )
    return "\n".join(lines) + "\n"


def picture(weak: dict, strong: dict, theirs: dict, file: Path) -> None:
    """The series over the number of GPUs."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, series, style in (
        ("4B, batch grows (predicted)", {count: one["mfu"] for count, one in weak.items()}, "o-"),
        ("4B, batch grows, with the loss", {count: one["lossy"] for count, one in weak.items()}, "o:"),
        ("4B, the recipe's batch (predicted)", {count: one["mfu"] for count, one in strong.items()}, "s--"),
        ("GPT-3 175B, 1,152 sequences (predicted)", {count: one["mfu"] for count, one in theirs.items()}, "^-"),
        ("GPT-3 175B (Megatron-LM, published)", PUBLISHED, "k*"),
    ):
        axes.plot(list(series), [100 * value for value in series.values()], style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
    axes.set(xlabel="H100s", ylabel="MFU (%)", ylim=(0, 60))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
