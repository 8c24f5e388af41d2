"""The reference's plain state dict <-> this process's shards, on any tensor and pipeline layout.

Per layer megatron fuses q, k and v head by head, and gate above up; tensor-parallel rank r holds the r-th share of the heads, of the
gate's and the up's rows, and of the output projections' columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from parallel.model import settle, unwrap
from parallel.setup import pipeline_group, tensor_group

# megatron's name within a layer -> the reference's
_WHOLE = {
    "input_layernorm.weight": "attention_norm.weight",
    "pre_mlp_layernorm.weight": "feed_forward_norm.weight",
}
_COLUMNS = {
    "self_attention.linear_proj.weight": "attention.o_proj.weight",
    "mlp.linear_fc2.weight": "feed_forward.down_proj.weight",
}
_QKV, _GATE_UP = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"
_QKV_PARTS = tuple(f"attention.{name}_proj.weight" for name in "qkv")
_GATE_UP_PARTS = ("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight")


@torch.no_grad()
def load_reference(chunks: Sequence[torch.nn.Module], state: Mapping[str, Tensor]) -> None:
    """Takes this process's shards from a plain state dict.

    Args:
        chunks: the model (wrapped or not).
        state: all weights under the reference's names; only the entries that this process holds are read.
    """
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in _parameters(chunks):
        prefix, inner = _split(name)
        if prefix is None:
            value = state[inner]
        elif inner in _WHOLE:
            value = state[prefix + _WHOLE[inner]]
        elif inner in _COLUMNS:
            value = state[prefix + _COLUMNS[inner]].chunk(size, dim=1)[rank]
        elif inner == _GATE_UP:
            value = torch.cat([state[prefix + part].chunk(size)[rank] for part in _GATE_UP_PARTS])
        else:
            # [heads * D, h] three times -> [heads, 3, D, h] -> rows
            parts = [state[prefix + part].unflatten(0, (_heads(chunks), -1)) for part in _QKV_PARTS]
            value = torch.stack(parts, dim=1).chunk(size)[rank].flatten(0, 2)
        parameter.copy_(value)


@torch.no_grad()
def gather_reference(chunks: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """All weights under the reference's names on rank 0 (on the CPU); an empty dictionary on the other ranks.

    Every rank must call it. One layer at a time travels, so no GPU holds more than one whole layer.
    """
    settle(chunks)
    own: dict[str, Tensor] = {}
    for name, parameter in _parameters(chunks):
        prefix, inner = _split(name)
        if prefix is None:
            own[inner] = parameter.detach().cpu().clone()
        elif inner in _WHOLE:
            own[prefix + _WHOLE[inner]] = parameter.detach().cpu().clone()
        elif inner in _COLUMNS:
            own[prefix + _COLUMNS[inner]] = torch.cat(_gather(parameter), dim=1)
        elif inner == _GATE_UP:
            halves = [shard.chunk(2) for shard in _gather(parameter)]
            for part, shards in zip(_GATE_UP_PARTS, zip(*halves)):
                own[prefix + part] = torch.cat(shards)
        else:
            heads = torch.cat(_gather(parameter)).unflatten(0, (_heads(chunks), 3, -1))  # [heads, 3, D, h]
            for part, value in zip(_QKV_PARTS, heads.unbind(1)):
                own[prefix + part] = value.flatten(0, 1).contiguous()
    return _collect(own)


def _collect(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Brings the stages' weights together on rank 0: the first tensor- and data-parallel rank of each stage sends."""
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    if pipeline == 1:
        return own if dist.get_rank() == 0 else {}
    first_copy = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    sends = first_copy and parallel_state.get_tensor_model_parallel_rank() == 0
    gathered: dict[str, Tensor] = dict(own) if dist.get_rank() == 0 else {}
    if sends:
        group = pipeline_group()
        parts: list[dict[str, Tensor]] | None = [{} for _ in range(pipeline)] if dist.get_rank() == 0 else None
        dist.gather_object(own, parts, dst=0, group=group)
        for part in parts or ():
            gathered.update(part)
    return gathered


def _gather(parameter: Tensor) -> list[Tensor]:
    """All tensor-parallel shards of a parameter, on the CPU."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return [parameter.detach().cpu().clone()]
    shards = [torch.empty_like(parameter) for _ in range(size)]
    dist.all_gather(shards, parameter.detach().contiguous(), group=tensor_group())
    return [shard.cpu() for shard in shards]


def _heads(chunks: Sequence[torch.nn.Module]) -> int:
    return unwrap(chunks[0]).model_config.num_attention_heads


def _parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of all chunks; a layer's index is counted over the whole network."""
    for chunk in chunks:
        module = unwrap(chunk)
        for name, parameter in module.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, inner = name.split(".", 3)
                yield f"layers.{module.layer_index(int(local))}.{inner}", parameter
            else:
                yield name, parameter


def _split(name: str) -> tuple[str | None, str]:
    """("layers.3.", name within the layer), or (None, the reference's name) outside the layers."""
    if name.startswith("layers."):
        _, layer, inner = name.split(".", 2)
        return f"layers.{layer}.", inner
    return None, "final_norm.weight" if name == "decoder.final_layernorm.weight" else name
