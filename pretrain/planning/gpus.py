"""Kinds of GPUs: what they can do at best, and the shares of it that a training reaches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from tokenizer import settings
from tokenizer.errors import UserError, check_each

KINDS = Path(__file__).with_name("gpus.yaml")


@dataclass(frozen=True)
class Gpu:
    """A GPU, its node and its network. The shares are assumptions (docs/planning.md says where each comes from); measure your own.

    Args:
        bf16_tflops, fp8_tflops: of dense matrix products, 10^12 a second; fp8_tflops null: it has none.
        memory_gb: 10^9 bytes.
        memory_gb_per_second: of its own memory.
        nvlink_gb_per_second: one way, to the other GPUs of a node.
        network_gb_per_second: one way, of each GPU's link to other nodes.
        gpus_per_node: GPUs that share NVLink.
        matmul_share: of bf16_tflops, that the products with weights reach.
        fp8_matmul_share: of fp8_tflops.
        half_tokens: rows of a microbatch at which products reach only half of these shares; n rows reach n / (n + half_tokens).
        attention_share: of bf16_tflops, that attention over visible pairs reaches.
        passes_forward: reads and writes of a hidden state a token and layer outside of the products, forward; backward are twice as many.
        memory_share: of memory_gb_per_second, that norms, rotations, activations, sums and the optimizer reach.
        link_share: of NVLink and network, that collectives reach.
        tensor_hidden: share of the tensor-parallel collectives that products hide; nothing here switches such an overlap on.
        latency_us: of each hop of a collective, and of each message between pipeline stages, in microseconds.
        encode_share: of bf16_tflops, that the tokenizer's convolutions reach, decoding videos included.
        reserved_gb: that libraries and the driver take.
        usable_share: of the rest, that the allocator can fill.
    """

    bf16_tflops: float
    memory_gb: float
    memory_gb_per_second: float
    nvlink_gb_per_second: float
    network_gb_per_second: float
    fp8_tflops: float | None = None
    gpus_per_node: int = 8
    matmul_share: float = 0.60
    fp8_matmul_share: float = 0.42
    half_tokens: float = 256.0
    attention_share: float = 0.25
    passes_forward: float = 70.0
    memory_share: float = 0.75
    link_share: float = 0.80
    tensor_hidden: float = 0.0
    latency_us: float = 5.0
    encode_share: float = 0.25
    reserved_gb: float = 2.0
    usable_share: float = 0.95

    def __post_init__(self) -> None:
        rates = (
            "bf16_tflops",
            "memory_gb",
            "memory_gb_per_second",
            "nvlink_gb_per_second",
            "network_gb_per_second",
            "gpus_per_node",
        )
        check_each(self, rates, lambda value: value > 0, "be above 0", "the GPU's ")
        check_each(self, ("fp8_tflops",), lambda value: value is None or value > 0, "be above 0", "the GPU's ")
        shares = [name for name in self.__dataclass_fields__ if name.endswith("_share")]
        check_each(self, shares, lambda value: 0 < value <= 1, "be above 0 and at most 1", "the GPU's ")
        amounts = ("latency_us", "reserved_gb", "passes_forward", "half_tokens")
        check_each(self, amounts, lambda value: value >= 0, "be at least 0", "the GPU's ")
        check_each(self, ("tensor_hidden",), lambda value: 0 <= value <= 1, "be from 0 to 1", "the GPU's ")

    @property
    def usable_bytes(self) -> float:
        """What a training's tensors may take."""
        return (self.memory_gb - self.reserved_gb) * 1e9 * self.usable_share

    def group_rate(self, size: int, stride: int) -> float:
        """Bytes a second that each GPU of a group sends in a ring, in bytes.

        Args:
            size: GPUs of the group.
            stride: between the ranks of neighbours; ranks fill node after node.
        """
        together = min(size, max(1, self.gpus_per_node // stride))  # of the group in one node
        if size * stride <= self.gpus_per_node:
            return 1e9 * self.nvlink_gb_per_second * self.link_share
        # as many rings as there are links of the group in a node, and each ring goes through the node once
        return 1e9 * min(self.nvlink_gb_per_second, together * self.network_gb_per_second) * self.link_share


def load_gpu(kind: str) -> Gpu:
    """A kind of `gpus.yaml`, or a file of your own.

    Raises:
        UserError: neither.
    """
    kinds = yaml.safe_load(KINDS.read_text())
    if kind in kinds:
        return Gpu(**kinds[kind])
    if not Path(kind).is_file():
        raise UserError(
            f"there is no GPU kind '{kind}': choose {', '.join(kinds)}, or a YAML file with the fields of an entry in {KINDS.name}."
        )
    return settings.load(Gpu, kind)
