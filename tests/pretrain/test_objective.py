"""What preparation draws or leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data_pipelines.code_stream import CodeBatch
from pretrain.error_correction import ErrorCorrectionConfig
from pretrain.objective import ObjectiveConfig, prepare
from pretrain.randomness import Purpose, Randomness
from pretrain.schedule import learning_rate
from tokenizer.codes import Codes
from tokenizer.errors import UserError
from tokenizer.quantizer import MultiScaleQuantizer
from tokenizer.scales import ScaleSchedule
from tokenizer.sequence import SequenceLayout, video_inputs

SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (2, 3), (3, 5)))
BATCH, FRAMES, DIM, TEXT = 5, 2, 8, 4


def _batch() -> CodeBatch:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(BATCH, DIM, FRAMES, *SCHEDULE.grid, generator=generator)
    return CodeBatch(
        tokens=MultiScaleQuantizer(DIM).quantize(latent, SCHEDULE).tokens(),
        latents=latent.movedim(1, 2),
        text=torch.randn(BATCH, TEXT, 6, generator=generator),
        text_lengths=torch.tensor([4, 0, 2, 1, 3]),
        class_ids=torch.tensor([3, 0, 1, 2, 1]),
        sample_index=torch.tensor([40, 3, 17, 22, 8]),
        epoch=torch.tensor([0, 0, 1, 1, 0]),
        schedule=SCHEDULE,
    )


def _config(**changes) -> ObjectiveConfig:
    values = dict(randomness=Randomness(3), error_correction=ErrorCorrectionConfig(), p_mask=0.5, condition_dropout=0.5)
    return ObjectiveConfig(**(values | changes))


def _plain(batch: CodeBatch, layout: SequenceLayout) -> Tensor:
    return video_inputs(batch.codes, layout)


def test_validation_draws_nothing() -> None:
    batch, layout = _batch(), SequenceLayout(SCHEDULE, FRAMES, TEXT)
    ready = prepare(batch, _config(), layout, training=False)
    assert torch.equal(ready.inputs, _plain(batch, layout)) and torch.equal(ready.targets, batch.tokens)
    assert ready.frame_mask is None and ready.drop_condition is None


def test_training_with_everything_at_zero_is_validation_bit_for_bit() -> None:
    batch, layout = _batch(), SequenceLayout(SCHEDULE, FRAMES, TEXT)
    off = _config(error_correction=ErrorCorrectionConfig(0, 0), p_mask=0.0, condition_dropout=0.0)
    ready = prepare(batch, off, layout, training=True)
    assert torch.equal(ready.inputs, _plain(batch, layout)) and torch.equal(ready.targets, batch.tokens)
    assert ready.frame_mask is None and ready.drop_condition is None


def test_a_clip_is_prepared_alike_in_any_microbatch() -> None:
    batch, layout, config = _batch(), SequenceLayout(SCHEDULE, FRAMES, TEXT), _config()
    together = prepare(batch, config, layout, training=True)
    assert not torch.equal(together.inputs, _plain(batch, layout))
    assert together.frame_mask is not None and together.drop_condition is not None
    for start, stop in ((0, 2), (2, 5)):
        part = prepare(batch.rows(start, stop), config, layout, training=True)
        for name in ("inputs", "targets", "text", "frame_mask", "drop_condition"):
            assert torch.equal(getattr(part, name), getattr(together, name)[start:stop]), name


def test_another_epoch_stage_or_seed_draws_anew() -> None:
    batch, layout = _batch(), SequenceLayout(SCHEDULE, FRAMES, TEXT)
    base = prepare(batch, _config(), layout, training=True)
    later = prepare(replace(batch, epoch=batch.epoch + 1), _config(), layout, training=True)
    stage = prepare(batch, _config(randomness=Randomness(3, stage=1)), layout, training=True)
    for other in (later, stage):
        assert not torch.equal(other.inputs, base.inputs)


def test_condition_dropout_drops_the_drawn_clips() -> None:
    batch, layout = _batch(), SequenceLayout(SCHEDULE, FRAMES, TEXT)
    draws = Randomness(3).uniform(Purpose.CONDITION, batch.sample_index, batch.epoch, ())
    for probability in (0.2, 0.5, 1.0):
        ready = prepare(batch, _config(condition_dropout=probability), layout, training=True)
        assert ready.drop_condition is not None
        assert ready.drop_condition.tolist() == [draw < probability for draw in draws.tolist()]
    many = Randomness(0).uniform(Purpose.CONDITION, torch.arange(5000), torch.zeros(5000, dtype=torch.int64), ())
    assert abs((many < 0.1).float().mean() - 0.1) < 0.015


def test_class_conditional_batches() -> None:
    batch, layout = _batch(), SequenceLayout(SCHEDULE, FRAMES, 1)
    ready = prepare(batch, _config(class_conditional=True), layout, training=False)
    assert torch.equal(ready.text, batch.class_ids) and ready.text_lengths.tolist() == [1] * BATCH
    with pytest.raises(UserError, match="no class"):
        prepare(replace(batch, class_ids=batch.class_ids - 1), _config(class_conditional=True), layout, training=False)


def test_down_modes_reach_the_inputs_and_targets() -> None:
    batch, layout = _batch(), SequenceLayout(SCHEDULE, FRAMES, TEXT)
    base = prepare(batch, _config(), layout, training=True)
    assert not torch.equal(base.targets, prepare(batch, _config(residual_down="bilinear"), layout, True).targets)
    assert not torch.equal(base.inputs, prepare(batch, _config(input_down="area"), layout, True).inputs)


def test_inputs_of_one_frame_equal_those_within_the_clip() -> None:
    """Images are the first frame of a clip."""
    batch, layout = _batch(), SequenceLayout(SCHEDULE, FRAMES, TEXT)
    image = Codes.from_tokens(batch.tokens[:, :1], SCHEDULE)
    alone = video_inputs(image, SequenceLayout(SCHEDULE, 1, TEXT))
    assert torch.equal(alone, _plain(batch, layout)[:, : SCHEDULE.tokens_per_frame])


def test_learning_rate_by_hand() -> None:
    rates = [learning_rate(step, 11, 1.0, 2, 0.1) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half of the cosine
    assert rates[10] == pytest.approx(0.1)
    assert learning_rate(0, 1, 2.0, 0, 0.1) == 2.0
