"""How much memory a layout takes on each process, computed from shapes: before anyone books a GPU.

estimate(model, parallel, world_size, layout, micro_batch_size, microbatches) -> Memory of the fullest pipeline stage

What is counted are tensors, and NCCL's buffers. On top come a GPU's context and libraries (about a gigabyte), what its allocator can't
use, FP8 copies of weights and inputs, FlexAttention's block masks, and what gathering the optimizer's states for a checkpoint takes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

from inference.config import ModelConfig
from inference.model import VideoARTransformer
from parallel.setup import ParallelConfig, check_layout
from tokenizer.sequence import SequenceLayout

FLOAT32 = 4
"""Bytes of a gradient, of a main copy, and of each of AdamW's two moments."""
NCCL_GROUP = 2 * 16 * 4 * 2**20
"""Bytes that NCCL keeps for a group: a buffer of 4 MiB (NCCL_BUFFSIZE's default) each way on 16 channels. Stated, not measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one process.

    Args:
        parameters: this process's shard of the weights.
        gradients: float32, one for each parameter.
        optimizer: main copies (with bfloat16 parameters) and moments, sharded over the data- and context-parallel ranks.
        ema: the running mean of the weights.
        activations: what the forward passes in flight keep for their backward passes.
        working: the most that one layer's backward pass takes for a moment.
        communication: hidden states on their way between pipeline stages, and on GPUs what NCCL keeps for each group of processes.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    working: int
    communication: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate(
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    layout: SequenceLayout,
    micro_batch_size: int,
    microbatches: int,
    ema: bool = False,
    gpu: bool = True,
) -> Memory:
    """The memory of the pipeline stage that takes the most.

    Args:
        model: the network.
        parallel: its layout; a `precision` of auto is taken for bfloat16.
        world_size: processes.
        layout: the sequence, of any multiple.
        micro_batch_size: clips a forward pass.
        microbatches: of a step, on each data-parallel rank.
        ema: whether a running mean is kept.
        gpu: Transformer Engine's norms and FlexAttention, not the CPU's own.

    Raises:
        UserError: the layout does not divide.
    """
    check_layout(model, parallel, world_size)
    stages = [
        _stage(model, parallel, world_size, layout, micro_batch_size, microbatches, ema, gpu, stage)
        for stage in range(parallel.pipeline_parallel_size)
    ]
    return max(stages, key=lambda memory: memory.total)


def parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """How many weights each process of a pipeline stage holds."""
    sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.virtual_pipeline_size)
    return _parameters(model, *sizes, stage)


@lru_cache(maxsize=8)
def _shapes(model: ModelConfig) -> dict[str, torch.Size]:
    return VideoARTransformer.shapes(model)


@lru_cache(maxsize=1024)  # a search of layouts asks for the same ones again and again
def _parameters(model: ModelConfig, tensor: int, pipeline: int, virtual: int, stage: int) -> int:
    pieces = pipeline * virtual
    count = 0
    for name, shape in _shapes(model).items():
        sharded = 1
        if name.startswith("layers."):
            piece = int(name.split(".")[1]) // (model.num_layers // pieces)
            sharded = tensor if len(shape) > 1 else 1  # norms are whole on every rank
        else:
            piece = 0 if name.startswith("embedding.") else pieces - 1
        if piece % pipeline == stage:
            count += shape.numel() // sharded
    return count


def _stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    layout: SequenceLayout,
    clips: int,
    microbatches: int,
    ema: bool,
    gpu: bool,
    stage: int,
) -> Memory:
    tensor, pipeline, virtual = (
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.virtual_pipeline_size,
    )
    element = FLOAT32 if parallel.precision == "float32" else 2
    count = parameters(model, parallel, stage)
    copies = world_size // (tensor * pipeline)  # data times context parallel
    states = 2 * FLOAT32 + (FLOAT32 if element == 2 else 0)

    layers = _Layer(model, parallel, layout, clips, element, gpu)
    # 1F1B: the first stage has the most microbatches on their way; interleaving adds the warm-up of the further pieces
    flying = min(pipeline - stage, microbatches) * virtual
    if virtual > 1:
        flying = min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, microbatches * virtual)
    held = layers.kept * (model.num_layers // (pipeline * virtual)) * flying + layers.angles * flying
    if stage == pipeline - 1:
        # logits in two precisions, and a gradient
        held += clips * layout.video_tokens * model.bits * (element + 2 * FLOAT32)
    return Memory(
        parameters=count * element,
        gradients=count * FLOAT32,
        optimizer=-(-count * states // copies),
        ema=count * FLOAT32 if ema else 0,
        activations=held,
        working=layers.working,
        communication=_communication(parallel, copies, layers, gpu),
    )


def _communication(parallel: ParallelConfig, copies: int, layers: _Layer, gpu: bool) -> int:
    pipeline, context = parallel.pipeline_parallel_size, parallel.context_parallel_size
    # a hidden state and a gradient that come in while others are at work
    waiting = 2 * layers.outside * layers.model.hidden_size * layers.element if pipeline > 1 else 0
    groups = sum(size > 1 for size in (parallel.tensor_parallel_size, pipeline, context, copies))
    return waiting + (groups * NCCL_GROUP if gpu else 0)


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer for one microbatch on one process."""

    model: ModelConfig
    parallel: ParallelConfig
    layout: SequenceLayout
    clips: int
    element: int
    gpu: bool

    @property
    def tokens(self) -> int:
        """This process's tokens of all clips, inside the matrices."""
        length = replace(self.layout, multiple=self.parallel.sequence_multiple).length
        return self.clips * length // self.parallel.context_parallel_size

    @property
    def keys(self) -> int:
        """The tokens that attention sees, of all clips."""
        return self.tokens * self.parallel.context_parallel_size

    @property
    def outside(self) -> int:
        """Those of them that it holds outside the matrices."""
        return self.tokens // (self.parallel.tensor_parallel_size if self.parallel.shares_sequence else 1)

    @property
    def width(self) -> int:
        """Of this rank's heads together."""
        return self.model.hidden_size // self.parallel.tensor_parallel_size

    @property
    def inner(self) -> int:
        """This rank's rows of the feed-forward network."""
        return self.model.feed_forward_size // self.parallel.tensor_parallel_size

    @property
    def attention(self) -> int:
        """Kept by norm and attention: the norm's own, its output, queries, keys, values, and the attention's output."""
        # a GPU's norm keeps its input, ours the normalised one in float32
        norm = self.model.hidden_size * ((self.element if self.gpu else FLOAT32) + self.element)
        keys, shared = self.keys, self.parallel.context_parallel_size > 1
        # a view of queries, keys or values keeps all three; gathered keys and values are one tensor
        own = 3 if not shared or not self.gpu else 0
        gathered = 2 if shared else 0
        if self.gpu:  # turned queries and keys, FlexAttention's output, and the same as the projection takes it
            return self.outside * norm + self.element * self.width * ((own + 3) * self.tokens + (gathered + 1) * keys)
        return self.outside * norm + self.element * self.width * ((own + 1) * self.tokens + gathered * keys)

    @property
    def feed_forward(self) -> int:
        """Kept by norm and feed-forward network: the norm's own, its output, gate and up, and their product."""
        norm = self.model.hidden_size * ((self.element if self.gpu else FLOAT32) + self.element)
        return self.outside * norm + self.tokens * 3 * self.inner * self.element

    @property
    def kept(self) -> int:
        """By each layer, until its backward pass."""
        if self.parallel.recompute == "full":
            return self.outside * self.model.hidden_size * self.element
        if self.parallel.recompute == "selective":
            return self.attention + self.feed_forward - self.tokens * 3 * self.inner * self.element
        return self.attention + self.feed_forward

    @property
    def angles(self) -> int:
        """cos and sin of a microbatch, shared by a stage's layers."""
        return 2 * self.keys * self.model.head_dim * FLOAT32

    @property
    def working(self) -> int:
        """The larger of the two backward passes, with what is computed again."""
        hidden = self.model.hidden_size * self.element
        again = {
            "none": 0,
            "selective": self.tokens * 3 * self.inner * self.element,
            "full": self.attention + self.feed_forward,
        }
        # gradients of the product, of gate and up, and of both sides of the norm, with the gathered input
        feed_forward = self.tokens * (3 * self.inner * self.element + 3 * hidden)
        wide = self.element if self.gpu else FLOAT32
        attention = self.width * wide * (3 * self.tokens + 5 * self.keys) + self.tokens * hidden
        return again[self.parallel.recompute] + max(feed_forward, attention)
