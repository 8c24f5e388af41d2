"""The sampler: draws the bits of a clip frame by frame and scale by scale (DESIGN section 2, Decoding)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from inference.decoder import CachedDecoder
from inference.guidance import Guidance, guidance_table, needs_unconditional
from inference.model import VideoARTransformer
from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.resample import to_values, up
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout, block_input, input_scales


def sample_frames(
    model: VideoARTransformer,
    text: Tensor,
    text_lengths: Tensor,
    seeds: Sequence[int],
    num_frames: int | None = None,
    schedule: ScaleSchedule | None = None,
    guidance: Guidance = "t2v",
    temperature: float = 1.0,
    given: Codes | None = None,
    window: int | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """Yields latent frame after latent frame as soon as its bits are drawn. Wrong arguments are refused by the call itself.

    Args:
        model: the network.
        text: features [B, L, text_dim], or class ids [B].
        text_lengths: |text| of each clip, [B].
        seeds: one a clip. A clip draws from a generator of its own, so that its noise does not depend on the batch.
        num_frames: T, latent frames, given ones included; None: as trained.
        schedule: the grids; None: the finest trained ones.
        guidance: see `guidance_table`.
        temperature: divides the logits; 0: the likelier bit.
        given: codes of the first frames, which are forced (image-to-video, continuation).
        window: earlier frames that a frame sees; None: the model's own limit.

    Yields:
        For each latent frame one bool [B, H_k, W_k, d] a scale.

    Raises:
        UserError: arguments that do not fit each other.
    """
    layout = model.config.layout(num_frames, schedule)
    _check(layout.num_frames, layout.schedule, text, seeds, temperature, given, window)
    gammas = guidance_table(guidance, layout.num_frames, model.config.num_frames, layout.schedule.num_scales)
    return _frames(model, text, text_lengths, seeds, layout, gammas, temperature, given, window)


@torch.no_grad()
def _frames(
    model: VideoARTransformer,
    text: Tensor,
    text_lengths: Tensor,
    seeds: Sequence[int],
    layout: SequenceLayout,
    gammas: list[list[float]],
    temperature: float,
    given: Codes | None,
    window: int | None,
) -> Iterator[tuple[Tensor, ...]]:
    """What `sample_frames` yields."""
    config, batch, device = model.config, len(seeds), text.device
    schedule, count = layout.schedule, layout.num_frames
    branches = 2 if needs_unconditional(gammas) else 1
    drop = torch.arange(branches, device=device).repeat_interleave(batch) == 1
    both = [torch.cat([value] * branches) for value in (text, text_lengths)]
    decoder = CachedDecoder(model, layout, both[0], both[1], drop, window)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    scales = input_scales(schedule, config.bits, config.input_down)

    def step(total: Tensor, block: int) -> Tensor:
        inputs = block_input(total, block, layout, scales, config.input_down)  # [B, n, d]
        return decoder.step(inputs.repeat(branches, 1, 1))

    total = torch.zeros(batch, config.bits, *schedule.grid, device=device)  # the frame before; none before the first
    for t in range(count):
        frame: list[Tensor] = []
        for k, grid in enumerate(schedule.scales):
            logits = step(total, k)  # [branches * B, n, d]
            if given is not None and t < given.num_frames:
                bits = given.bits[k][:, t].to(device)
            else:
                bits = _draw(_guide(logits, gammas[t][k], branches), temperature, generators).unflatten(1, grid)
            value = up(to_values(bits).movedim(-1, -3), schedule.grid)  # [B, d, H, W]
            total = value if k == 0 else total + value
            frame.append(bits)
        if layout.context_block and t + 1 < count:
            step(total, schedule.num_scales)
        yield tuple(frame)


def sample(model: VideoARTransformer, text: Tensor, text_lengths: Tensor, seeds: Sequence[int], **options) -> Codes:
    """All frames at once: see `sample_frames` -> Codes of B clips."""
    frames = list(sample_frames(model, text, text_lengths, seeds, **options))
    schedule = options.get("schedule") or model.config.schedule
    return Codes(tuple(torch.stack(scale, dim=1) for scale in zip(*frames)), schedule)  # [B, T, H_k, W_k, d]


def _guide(logits: Tensor, gamma: float, branches: int) -> Tensor:
    """logits = uncond + gamma (cond - uncond): [branches * B, n, d] -> [B, n, d]."""
    if branches == 1:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + gamma * (conditional - unconditional)


def _draw(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Bits of one block: logits [B, n, d] -> bool [B, n, d]."""
    if temperature == 0:
        return logits > 0
    # the noise is made on the CPU: a seed means the same on every device
    noise = torch.stack([torch.rand(logits.shape[1:], generator=generator) for generator in generators])
    return noise.to(logits.device) < torch.sigmoid(logits / temperature)


def _check(
    num_frames: int,
    schedule: ScaleSchedule,
    text: Tensor,
    seeds: Sequence[int],
    temperature: float,
    given: Codes | None,
    window: int | None,
) -> None:
    if len(seeds) != text.shape[0]:
        raise UserError(f"{len(seeds)} seeds were given for {text.shape[0]} clips: give one seed a clip.")
    for seed in seeds:
        if not -(2**63) <= seed < 2**64:
            raise UserError(f"the seed is {seed}: give one from 0 to 2^62 - 1.")
    if not temperature >= 0:  # NaN is no temperature either
        raise UserError(f"the temperature is {temperature}: use 0 (the likelier bit) or more.")
    if num_frames < 1:
        raise UserError(f"{num_frames} latent frames were asked for: ask for at least 1.")
    if window is not None and window < 1:
        raise UserError(f"the window is {window} frames: use at least 1.")
    if given is None:
        return
    if given.schedule != schedule:
        raise UserError(
            f"the given frames have the grids {given.schedule.scales}, the video {schedule.scales}: use one size."
        )
    if given.num_frames > num_frames:
        raise UserError(
            f"{given.num_frames} latent frames are given but only {num_frames} asked for: ask for a longer video."
        )
