"""From text features and block inputs to the transformer's hidden states (DESIGN section 2, Sequence)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inference.config import ModelConfig
from tokenizer.sequence import SequenceLayout


class InputEmbedding(nn.Module):
    """Text, start token and block inputs as hidden states. Only the parameters that the configuration uses exist.

    Learnt tokens are empty until weights are loaded or drawn (`inference.initial`).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = config.hidden_size
        self.num_classes = config.num_classes
        if config.num_classes:
            # the last row is the null class
            self.class_embedding = nn.Parameter(torch.empty(config.num_classes + 1, hidden))
        else:
            self.text_norm = nn.RMSNorm(config.text_dim, eps=config.norm_eps)
            self.text_mlp = nn.Sequential(nn.Linear(config.text_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            self.null_text = nn.Parameter(torch.empty(config.max_text_length, config.text_dim))
        # no bias: the scale embedding is one already, and the zero rows of block (0, 0) leave the start token alone
        self.input_proj = nn.Linear(config.bits, hidden, bias=False)
        self.start_token = nn.Parameter(torch.empty(hidden))
        self.scale_embedding = nn.Parameter(torch.empty(config.max_scales, hidden))
        if config.context_block:
            self.context_embedding = nn.Parameter(torch.empty(hidden))

    def forward(
        self,
        inputs: Tensor,
        layout: SequenceLayout,
        text: Tensor,
        text_lengths: Tensor,
        drop_condition: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """The whole sequence, or a part of it.

        Args:
            inputs: teacher-forced block inputs, [B, V, d] (`tokenizer.sequence.video_inputs`).
            layout: the sequence.
            text: features [B, L, text_dim], or class ids, long [B].
            text_lengths: |text| of each clip, [B].
            drop_condition: the clips whose text becomes the null sequence, bool [B]; None: none of them.
            places: of the tokens that are wanted, ascending, int64 [P]; None: all S.

        Returns:
            [B, P, h]; end padding is zero.
        """
        device, text_tokens, end = inputs.device, layout.text_length, layout.text_length + layout.video_tokens
        frame, scale = layout.frame.to(device), layout.scale.to(device)
        condition = self.embed_text(text, drop_condition)
        if places is None:
            video = self.embed_video(inputs, frame, scale, layout.schedule.num_scales)
            padding = video.new_zeros(len(inputs), layout.length - end, video.shape[2])
            return torch.cat([condition, video, padding], dim=1)
        # no shape depends on the places: a GPU need not tell the processor how many of them are text
        rows = (places - text_tokens).clamp(0, layout.video_tokens - 1)
        video = self.embed_video(inputs[:, rows], frame[rows], scale[rows], layout.schedule.num_scales)
        condition = condition[:, places.clamp(max=text_tokens - 1)]
        hidden = torch.where((places < text_tokens)[:, None], condition, video)
        return hidden.masked_fill((places >= end)[:, None], 0)

    def embed_text(self, text: Tensor, drop_condition: Tensor | None = None) -> Tensor:
        """Features [B, L, text_dim] or class ids [B] -> [B, L, h]. A dropped clip takes the null text's rows."""
        if self.num_classes:
            ids = text if drop_condition is None else torch.where(drop_condition, self.num_classes, text)
            return self.class_embedding[ids][:, None]  # [B, h] -> [B, 1, h]
        text = text.to(self.null_text.dtype)
        if drop_condition is not None:
            text = torch.where(drop_condition[:, None, None], self.null_text[: text.shape[1]], text)
        return self.text_mlp(self.text_norm(text))

    def embed_video(self, inputs: Tensor, frame: Tensor, scale: Tensor, num_scales: int) -> Tensor:
        """Inputs [B, n, d] of tokens with frame and scale indices [n] -> [B, n, h] (scale = K: the context block)."""
        hidden = self.input_proj(inputs.to(self.input_proj.weight.dtype))
        start = (frame == 0) & (scale == 0)
        scales = self.scale_embedding[:num_scales]
        if hasattr(self, "context_embedding"):
            scales = torch.cat([scales, self.context_embedding[None]])
        return hidden + start[:, None] * self.start_token + scales[scale]
