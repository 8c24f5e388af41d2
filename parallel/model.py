"""One pipeline stage of the VideoAR transformer on megatron-core: the same function as `inference.model.VideoARTransformer`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from inference.config import ModelConfig
from inference.embedding import InputEmbedding
from parallel.attention import AttentionContext, choose_backend
from parallel.context import Shares, split_tokens, visible_keys
from parallel.cpu import cuda_redirected
from parallel.layers import block_spec, transformer_config, use_transformer_engine
from parallel.setup import ParallelConfig, context_group, tensor_group
from tokenizer.sequence import SequenceLayout


class VideoARMegatron(MegatronModule):
    """The layers of this process's pipeline stage; the first stage also embeds, the last one also predicts.

    Weights are not initialised here: `parallel.convert.load_reference` brings them in.

    Args:
        model: the network.
        parallel: its layout over the processes that `parallel.setup.initialize` laid.
        virtual_stage: which of the stage's pieces of the depth, with `virtual_pipeline_size` above 1.
    """

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, virtual_stage: int | None = None):
        config = transformer_config(model, parallel)
        super().__init__(config)
        self.model_config, self.parallel = model, parallel
        # the attributes that megatron's schedules and gradient reductions read
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = virtual_stage
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage)
        self.share_embeddings_and_output_weights = False
        self.tp_group = tensor_group()

        if self.pre_process:
            self.embedding = InputEmbedding(model)
        self.decoder = TransformerBlock(
            config,
            block_spec(config, use_transformer_engine(parallel.transformer_engine, parallel.fp8), virtual_stage),
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=virtual_stage,
        )
        if self.post_process:
            self.head = torch.nn.Linear(model.hidden_size, model.bits, bias=False)
        self.to(dtype=parallel.dtype)
        for module in (getattr(self, "embedding", None), getattr(self, "head", None)):
            for parameter in module.parameters() if module is not None else ():
                # each rank sees its own tokens only: finalize_model_grads sums these gradients over the tensor-parallel ranks
                parameter.sequence_parallel = parallel.shares_sequence  # type: ignore[attr-defined]

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None]) -> None:
        """Takes the hidden states of the stage before (called by megatron's schedules)."""
        # megatron passes None to the first stage, which its annotation does not say
        first = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(first)  # type: ignore[arg-type]

    def layer_index(self, local: int) -> int:
        """The index within the whole network of this stage's layer `local`."""
        return int(self.decoder.layers[local].layer_number) - 1  # type: ignore[arg-type]

    def forward(
        self,
        inputs: Tensor,
        layout: SequenceLayout,
        text: Tensor,
        text_lengths: Tensor,
        frame_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
    ) -> Tensor:
        """Teacher-forced logits, as the reference's `forward`.

        Args:
            inputs: block inputs, [B, V, d].
            layout: the sequence; its length is a multiple of `ParallelConfig.sequence_multiple`.
            text: features [B, L, text_dim], or class ids, long [B].
            text_lengths: |text| of each clip, [B].
            frame_mask: random frame mask m, bool [B, T, T]; None: all frames visible.
            drop_condition: clips without their condition, bool [B].

        Returns:
            On the last stage float32 [B, V, d], whole on every tensor- and context-parallel rank; before it the hidden states
            [S (this rank's share), B, h].

        Raises:
            ValueError: the sequence does not divide over the ranks.
        """
        if layout.length % self.parallel.sequence_multiple:
            raise ValueError(f"sequence length {layout.length} is no multiple of {self.parallel.sequence_multiple}")
        backend = choose_backend(self.parallel.attention, inputs.device.type)
        shares = self._shares(layout, text_lengths, frame_mask)
        context = AttentionContext.build(
            self.model_config, layout, text_lengths, frame_mask, self.parallel.dtype, backend, shares
        )
        hidden = None
        if self.pre_process:
            if drop_condition is None and self.training:
                # the null text is part of every backward pass: gradients that are reduced as they come must all come
                drop_condition = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
            places = self._own_places(layout, shares, inputs.device)
            hidden = self.embedding(inputs, layout, text, text_lengths, drop_condition, places)  # [B, S / CP / TP, h]
            hidden = hidden.transpose(0, 1).contiguous()
        hidden = self.decoder(hidden, attention_mask=None, attention_bias=context)
        if not self.post_process:
            return hidden
        logits = self.head(hidden)
        if self.parallel.shares_sequence:
            # every rank computes the same loss, so each keeps its own part of the gradient: nothing to be summed
            logits = gather_from_sequence_parallel_region(logits, tensor_parallel_output_grad=False)
        if shares is not None:
            logits = shares.gather(logits, sum_gradients=False)
        logits = logits[layout.text_length : layout.text_length + layout.video_tokens]  # [V, B, d]
        return logits.transpose(0, 1).float()

    def _shares(self, layout: SequenceLayout, text_lengths: Tensor, frame_mask: Tensor | None) -> Shares | None:
        """Who holds which tokens of this microbatch: the same on all ranks and stages, which know its masks."""
        if self.parallel.context_parallel_size == 1:
            return None
        costs = visible_keys(layout, text_lengths, frame_mask, self.model_config.window)
        return Shares(split_tokens(costs, self.parallel.context_parallel_size), context_group())

    def _own_places(self, layout: SequenceLayout, shares: Shares | None, device: torch.device) -> Tensor | None:
        """The places of the tokens that this rank embeds, [S / CP / TP]; None: all."""
        if not self.parallel.shares_sequence:
            return None if shares is None else shares.own
        held = torch.arange(layout.length, device=device) if shares is None else shares.own
        return held.chunk(self.parallel.tensor_parallel_size)[self.tp_group.rank()]


def unwrap(chunk: torch.nn.Module) -> VideoARMegatron:
    """The stage inside its data-parallel wrapper, or itself."""
    module = getattr(chunk, "module", chunk)
    assert isinstance(module, VideoARMegatron)
    return module


def settle(chunks: Sequence[torch.nn.Module]) -> None:
    """Brings the last update to all data-parallel ranks, if that was left to the next forward pass: before weights are read otherwise."""
    if unwrap(chunks[0]).parallel.overlaps:
        with cuda_redirected():
            for chunk in chunks:
                if isinstance(chunk, DistributedDataParallel):
                    chunk.start_param_sync(force_sync=True)
