"""How long a training step takes on a layout, predicted from FLOPs, bytes and messages, and the shares that a GPU is assumed to reach.

What adds up is the slowest pipeline stage: its products, attention and passes over memory for each microbatch, the messages that nothing
hides, the pipeline's bubble, what of the gradients' and weights' exchange the passes do not hide, and the optimizer. Loading data, saving,
validating, stragglers and failures are not part of it. All frames count as visible: a frame mask only saves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from inference.config import ModelConfig
from parallel.memory import parameters
from parallel.setup import ParallelConfig
from pretrain.planning.flops import Flops
from pretrain.planning.gpus import Gpu

MEGATRON_BUCKET = 40e6
"""Fewest gradients that megatron-core exchanges at a time; it takes 10^6 for each rank where that is more."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go to.

    Args:
        matmul: products with weights, with what is computed again.
        attention: scores and sums of values.
        elementwise: norms, rotations, activations and residuals (weights' gradients are added up within the products).
        tensor: collectives among tensor-parallel ranks.
        context: among context-parallel ranks.
        messages: between pipeline stages.
        bubble: waiting for the pipeline to fill and to empty.
        data: gradients and weights between data-parallel ranks, as far as no pass hides them.
        optimizer: the update.
    """

    matmul: float
    attention: float
    elementwise: float
    tensor: float
    context: float
    messages: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Work:
    """What a microbatch asks of a network.

    Args:
        model: the network.
        tokens: of all clips, padding included.
        flops: of all clips.
    """

    model: ModelConfig
    tokens: int
    flops: Flops


def step_time(work: Work, parallel: ParallelConfig, world: int, microbatches: int, gpu: Gpu) -> StepTime:
    """The time of one optimizer step.

    Args:
        work: of a microbatch.
        parallel: the layout; a `precision` of auto is taken for bfloat16.
        world: GPUs.
        microbatches: of a step, on each data-parallel rank.
        gpu: each of them.
    """
    model, flops = work.model, work.flops
    tp, cp, pp, vpp = (
        parallel.tensor_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.virtual_pipeline_size,
    )
    copies = world // (tp * pp)  # data times context parallel
    element = 4 if parallel.precision == "float32" else 2
    memory_rate = 1e9 * gpu.memory_gb_per_second * gpu.memory_share
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[parallel.recompute]
    ranks = tp * cp

    # products and attention, of this stage's layers; both ends weigh on the last stage
    layers = (flops.attention_matrices + flops.feed_forward) / pp * (3 + again)
    layers += flops.feed_forward / pp if parallel.recompute == "selective" else 0.0
    low = parallel.fp8 != "none" and gpu.fp8_tflops is not None
    filled = 1 / (1 + gpu.half_tokens * cp / work.tokens)
    fast = (
        filled
        * 1e12
        * (gpu.fp8_tflops * gpu.fp8_matmul_share if low and gpu.fp8_tflops else gpu.bf16_tflops * gpu.matmul_share)
    )
    plain = filled * 1e12 * gpu.bf16_tflops * gpu.matmul_share
    matmul = layers / ranks / fast + (3 * flops.ends + 2 * flops.inputs) / ranks / plain
    # a head's width is padded to a power of two
    padded = 2 ** math.ceil(math.log2(model.head_dim)) / model.head_dim
    attention = padded * flops.attention * (3.5 + again) / pp / ranks / (1e12 * gpu.bf16_tflops * gpu.attention_share)

    outside = work.tokens / (ranks if parallel.shares_sequence else cp)
    # a feed-forward network's share of them, by the widths of what it reads and writes
    passes = gpu.passes_forward * (3 + again + (0.3 if parallel.recompute == "selective" else 0.0))
    stage_layers = model.num_layers / pp
    # most passes are over what the ranks share anyhow: heads and feed-forward rows; without sequence parallelism the rest is not
    wide = 0.75 * work.tokens / ranks + 0.25 * outside
    held = max(parameters(model, parallel, stage) for stage in {0, pp - 1})
    elementwise = passes * element * model.hidden_size * stage_layers * wide / memory_rate

    # two gathers and two scatters forward, as many backward and two gathers again for the weights' gradients
    hidden = work.tokens / cp * model.hidden_size * element
    collectives = (10 + 4 * again) * stage_layers
    tensor = (1 - gpu.tensor_hidden) * _ring(hidden, tp, gpu.group_rate(tp, 1), gpu, collectives) if tp > 1 else 0.0
    # keys and values gathered forward, their gradients scattered backward
    shared = 2 * work.tokens * model.hidden_size / tp * element
    context = _ring(shared, cp, gpu.group_rate(cp, tp), gpu, (2 + again) * stage_layers) if cp > 1 else 0.0
    sent = work.tokens / (ranks if parallel.shares_sequence else cp) * model.hidden_size * element
    stage_rate = gpu.group_rate(pp, world // pp)
    messages = 2 * vpp * (sent / stage_rate + 1e-6 * gpu.latency_us) if pp > 1 else 0.0

    microbatch = matmul + attention + elementwise + tensor + context + messages
    rate = gpu.group_rate(copies, tp)
    buckets = max(1, math.ceil(held / max(MEGATRON_BUCKET, 1e6 * copies)))
    gradients = _ring(4 * held / buckets, copies, rate, gpu, buckets) if copies > 1 else 0.0
    weights = _ring(element * held / buckets, copies, rate, gpu, buckets) if copies > 1 else 0.0
    if parallel.overlap != "off":
        # behind the last backward and the first forward pass; interleaved, a piece's last microbatches are done while other pieces go on
        forward = microbatch / (3 + again)
        window = pp * (vpp - 1) / vpp + 1 / vpp
        gradients = max(0.0, gradients - window * (microbatch - forward))
        weights = max(0.0, weights - window * forward)
    # gradients, main copies and two moments are read, all but the gradients written, and gradients cleared
    optimizer = (held / copies * (4 + 12 + 12 + element) + 4 * held) / memory_rate
    return StepTime(
        matmul=microbatches * matmul,
        attention=microbatches * attention,
        elementwise=microbatches * elementwise,
        tensor=microbatches * tensor,
        context=microbatches * context,
        messages=microbatches * messages,
        bubble=(pp - 1) / vpp * microbatch,
        data=gradients + weights,
        optimizer=optimizer,
    )


def _ring(size: float, ranks: int, rate: float, gpu: Gpu, times: float) -> float:
    """Seconds of so many gathers or scatters of `size` bytes over all ranks."""
    return times * ((ranks - 1) / ranks * size / rate + 1e-6 * gpu.latency_us * (ranks - 1))
