"""One layer specification with two back ends (Transformer Engine or megatron's own modules), and the configuration's translation."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from inference.config import ModelConfig
from parallel.attention import BlockCausalAttention
from parallel.setup import ParallelConfig
from tokenizer.errors import UserError

log = logging.getLogger(__name__)

FP8_HISTORY = 1024
"""Steps whose largest values set the scales of delayed FP8 (Transformer Engine's own default)."""


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight in float32, with a backward pass of few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = wide * inverse
        ctx.save_for_backward(normal, weight, inverse)
        return (normal * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normal, weight, inverse = ctx.saved_tensors
        wide, gain = grad.float(), weight.float()
        product = wide * normal
        grad_weight = product.flatten(0, -2).sum(0)
        mean = (product @ gain).unsqueeze(-1).div_(normal.shape[-1])  # [..., 1]
        grad_x = torch.mul(wide, gain).addcmul_(normal, mean, value=-1).mul_(inverse)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """The norm of the local back end. Under sequence parallelism its weight's gradient is summed over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad, out=grad_up)
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up: [..., gate | up] -> [..., f]. Both gradients go into one tensor. For CPUs: on a GPU megatron's kernel fuses it."""
    return _SwiGLU.apply(x)


@functools.cache
def use_transformer_engine(wanted: str, fp8: str = "none") -> bool:
    """Whether the layers come from Transformer Engine, with the reason in the log.

    Args:
        wanted: "auto", "on" or "off".
        fp8: `ParallelConfig.fp8`, which needs it.

    Raises:
        UserError: it is demanded without Transformer Engine or without a GPU, or FP8 without it.
    """
    present, has_cuda = importlib.util.find_spec("transformer_engine") is not None, torch.cuda.is_available()
    if fp8 != "none" and wanted == "off":
        raise UserError(f"fp8: {fp8} needs transformer_engine: set it to auto or on, or fp8 to none.")
    if (wanted == "on" or fp8 != "none") and not (present and has_cuda):
        missing = "the package transformer-engine" if not present else "a GPU"
        demanded, instead = (f"fp8: {fp8}", "fp8 to none") if fp8 != "none" else ("transformer_engine: on", "auto")
        raise UserError(f"{demanded} needs {missing}: install requirements-gpu.txt on a GPU node, or set {instead}.")
    chosen = wanted != "off" and present and has_cuda
    found = f"package {'there' if present else 'not installed'}, GPU {'there' if has_cuda else 'not there'}"
    reason = found if wanted == "auto" else "as configured"
    log.info("layers: %s (%s)", "Transformer Engine" if chosen else "megatron-core's own", reason)
    return chosen


def fuses_weight_gradients(parallel: ParallelConfig) -> bool:
    """Whether weights' gradients go straight into their accumulators: by Transformer Engine, by Apex, or on a CPU by `parallel.cpu`."""
    if not torch.cuda.is_available() or use_transformer_engine(parallel.transformer_engine, parallel.fp8):
        return True
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def block_spec(
    config: TransformerConfig, transformer_engine: bool, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of one of its virtual stages.

    Both back ends have the same modules and parameter names, so checkpoints fit both.
    """
    if transformer_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend: Any = TESpecProvider()
        norm = backend.layer_norm(rms_norm=True)
    else:
        backend = LocalSpecProvider()
        norm = RMSNorm
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=BlockCausalAttention,  # type: ignore[arg-type]
                    linear_proj=backend.row_parallel_linear(),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=backend.column_parallel_linear(),
                    linear_fc2=backend.row_parallel_linear(),
                    activation_func=swiglu,  # type: ignore[arg-type]
                ),
            ),
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
        ),
    )
    count = get_num_layers_to_build(config, virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)  # type: ignore[arg-type]


def _leave_empty(weight: Tensor) -> None:
    """megatron's initialisation also marks the sharded parameters, so it can't be turned off."""


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """megatron-core's configuration of this network. The loss is summed over clips and divided by their global number."""
    has_cuda = torch.cuda.is_available()
    recompute: dict[str, Any] = {}
    fp8: dict[str, Any] = {}
    if parallel.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    if parallel.fp8 != "none":
        if parallel.dtype != torch.bfloat16:
            raise UserError(f"fp8: {parallel.fp8} needs precision: bfloat16 (or auto), not {parallel.precision}.")
        recipe = "delayed" if parallel.fp8 == "delayed" else "tensorwise"
        fp8 = {
            "fp8": "hybrid",
            "fp8_recipe": recipe,
            "fp8_amax_history_len": FP8_HISTORY,
            "fp8_amax_compute_algo": "max",
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.feed_forward_size,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_rope_fusion=False,
        # the one rule of initialisation is the reference's: parallel.convert.load_reference brings its weights in
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        use_cpu_initialization=not has_cuda,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.shares_sequence,
        params_dtype=parallel.dtype,
        pipeline_dtype=parallel.dtype,
        # interleaved, two stages are each other's neighbour on both sides: a batch of messages would cross over
        batch_p2p_comm=parallel.virtual_stages is None,
        bf16=parallel.dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fuses_weight_gradients(parallel),
        masked_softmax_fusion=False,
        bias_activation_fusion=has_cuda,
        # megatron's name for "the layer specification says which activation": swiglu above
        use_te_activation_func=not has_cuda,
        bias_dropout_fusion=False,
        deallocate_pipeline_outputs=True,
        deterministic_mode=parallel.deterministic,
        **recompute,
        **fp8,
    )
