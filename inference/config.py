"""The network's configuration: everything that fixes the shapes and the meaning of its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tokenizer.errors import UserError, check_each
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout


@dataclass(frozen=True)
class ModelConfig:
    """A VideoAR transformer.

    Args:
        num_layers: blocks.
        hidden_size: the width h.
        num_attention_heads: heads; they divide the width into even parts.
        scales: the grids of the finest trained schedule, coarse to fine.
        num_frames: T, the latent frames trained on.
        ffn_hidden_size: width of the gated feed-forward; None: 4 h.
        bits: d, bits a token.
        text_dim: width of the text features.
        max_text_length: text tokens a clip has at most; longer texts are cut.
        num_classes: above 0: one class token takes the text's place.
        max_scales: scale embeddings allocated, so that later stages can add scales.
        rope: "multiscale" (time, height and width, Eq. 7) or "flat" (1-D over the sequence, the ablation's baseline).
        rope_theta: base of the rotary frequencies.
        rope_scaled_spatial: spatial positions are scaled to the finest grid.
        norm_eps: RMSNorm's epsilon.
        window: w, earlier frames that a frame sees; None: all.
        context_block: each finished frame enters the context once more as its full sum.
        input_down: how accumulated features come to a scale's grid (Eq. 2).
        fps: frames a second of the training clips.

    Raises:
        UserError: values that do not fit together.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    scales: tuple[tuple[int, int], ...]
    num_frames: int
    ffn_hidden_size: int | None = None
    bits: int = 48
    text_dim: int = 64
    max_text_length: int = 16
    num_classes: int = 0
    max_scales: int = 16
    rope: Literal["multiscale", "flat"] = "multiscale"
    rope_theta: float = 10000.0
    rope_scaled_spatial: bool = False
    norm_eps: float = 1e-6
    window: int | None = None
    context_block: bool = False
    input_down: Literal["bilinear", "area"] = "bilinear"
    fps: float = 8.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", ScaleSchedule(tuple(self.scales)).scales)
        counts = (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "num_frames",
            "bits",
            "text_dim",
            "max_text_length",
        )
        check_each(self, counts, lambda value: value >= 1, "be at least 1", "the model's ")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads of even width: "
                f"choose a multiple of {2 * self.num_attention_heads}."
            )
        if len(self.scales) > self.max_scales:
            raise UserError(
                f"{len(self.scales)} scales exceed max_scales = {self.max_scales}: raise it or use fewer scales."
            )
        if self.num_classes < 0:
            raise UserError(f"num_classes is {self.num_classes}: use 0 for text or the number of classes.")
        if self.window is not None and self.window < 1:
            raise UserError(f"window is {self.window}: use at least 1 frame, or null for no limit.")
        check_each(self, ("fps", "rope_theta", "norm_eps"), lambda value: value > 0, "be above 0", "the model's ")
        for name, allowed in (("rope", ("multiscale", "flat")), ("input_down", ("bilinear", "area"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"the model's {name} is '{getattr(self, name)}': choose one of {', '.join(allowed)}.")

    @property
    def schedule(self) -> ScaleSchedule:
        """The finest trained schedule."""
        return ScaleSchedule(self.scales)

    @property
    def head_dim(self) -> int:
        """D, a head's width."""
        return self.hidden_size // self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """The feed-forward's width."""
        return 4 * self.hidden_size if self.ffn_hidden_size is None else self.ffn_hidden_size

    @property
    def text_length(self) -> int:
        """L, the padded text's length: 1 for a class token."""
        return 1 if self.num_classes else self.max_text_length

    def layout(
        self, num_frames: int | None = None, schedule: ScaleSchedule | None = None, multiple: int = 1
    ) -> SequenceLayout:
        """The sequence of a clip.

        Args:
            num_frames: latent frames; None: the trained number.
            schedule: the grids; None: the finest trained ones.
            multiple: the sequence is padded at its end to a multiple of this.

        Raises:
            UserError: the schedule has more scales than there are scale embeddings.
        """
        schedule = self.schedule if schedule is None else schedule
        if schedule.num_scales > self.max_scales:
            raise UserError(
                f"a schedule of {schedule.num_scales} scales exceeds max_scales = {self.max_scales}: use fewer."
            )
        frames = self.num_frames if num_frames is None else num_frames
        return SequenceLayout(schedule, frames, self.text_length, self.context_block, multiple)

    def parameter_count(self) -> int:
        """The number of parameters of the network."""
        hidden, feed_forward = self.hidden_size, self.feed_forward_size
        block = 4 * hidden**2 + 3 * hidden * feed_forward + 2 * hidden
        if self.num_classes:
            condition = (self.num_classes + 1) * hidden
        else:
            mlp = self.text_dim * hidden + hidden + hidden**2 + hidden
            condition = self.text_dim + mlp + self.max_text_length * self.text_dim
        video = self.bits * hidden + hidden * (1 + self.max_scales + int(self.context_block))
        return condition + video + self.num_layers * block + hidden + hidden * self.bits

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**dataclasses.asdict(self), "scales": self.schedule.to_list()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            UserError: an unknown or a missing key.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"the model configuration has an unknown key '{unknown[0]}': export it again.")
        try:
            return cls(**{**values, "scales": tuple(tuple(grid) for grid in values["scales"])})
        except (KeyError, TypeError) as error:
            raise UserError(f"the model configuration is incomplete ({error}): export the checkpoint again.") from error
