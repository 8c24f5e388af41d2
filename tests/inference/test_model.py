"""The reference transformer: who influences whom."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from inference.config import ModelConfig
from tests.inference.tiny import random_codes, random_text, tiny_config, tiny_model
from tokenizer import settings
from tokenizer.errors import UserError
from tokenizer.sequence import video_inputs


def setup(batch: int = 3, multiple: int = 1, **changes):
    model = tiny_model(**changes)
    layout = model.config.layout(multiple=multiple)
    inputs = video_inputs(random_codes(batch, model.config.num_frames), layout)
    return model, layout, inputs, random_text(batch, model.config)


def test_padding_and_batch_mates_change_no_logit():
    model, layout, inputs, text = setup(multiple=9)
    assert layout.length > layout.text_length + layout.video_tokens
    lengths = torch.tensor([2, 5, 0])
    logits = model(inputs, layout, text, lengths)
    other = text.clone()
    for clip, length in enumerate(lengths.tolist()):
        other[clip, length:] = 100.0
    torch.testing.assert_close(model(inputs, layout, other, lengths), logits, atol=1e-6, rtol=0)
    plain = model.config.layout()
    for clip in range(3):
        row = slice(clip, clip + 1)
        alone = model(inputs[row], plain, text[row], lengths[row])
        torch.testing.assert_close(alone, logits[row], atol=2e-6, rtol=0)
    assert (model(inputs, layout, text, torch.tensor([3, 5, 0])) - logits)[0].abs().max() > 1e-3


def test_condition_dropout_replaces_exactly_the_drawn_clips():
    model, layout, inputs, text = setup()
    lengths, drop = torch.tensor([2, 5, 3]), torch.tensor([False, True, False])
    logits = model(inputs, layout, text, lengths)
    dropped = model(inputs, layout, text, lengths, drop_condition=drop)
    torch.testing.assert_close(dropped[[0, 2]], logits[[0, 2]], atol=0, rtol=0)
    null = text.clone()
    null[1] = model.embedding.null_text[:5]
    torch.testing.assert_close(dropped, model(inputs, layout, null, lengths), atol=0, rtol=0)
    assert (dropped[1] - logits[1]).abs().max() > 1e-3


def test_class_condition_and_its_null():
    model, layout, inputs, ids = setup(num_classes=4)
    lengths = torch.ones(3, dtype=torch.long)
    drop = torch.tensor([False, True, False])
    dropped = model(inputs, layout, ids, lengths, drop_condition=drop)
    null = torch.where(drop, 4, ids)
    torch.testing.assert_close(dropped, model(inputs, layout, null, lengths), atol=0, rtol=0)
    assert (dropped - model(inputs, layout, ids, lengths))[1].abs().max() > 1e-3
    assert layout.text_length == 1


@pytest.mark.parametrize("context_block", [False, True])
def test_later_inputs_change_no_earlier_logit(context_block: bool):
    model, layout, inputs, text = setup(context_block=context_block)
    lengths = torch.tensor([2, 5, 3])
    logits = model(inputs, layout, text, lengths)
    blocks = layout.frame * len(layout.blocks) + layout.scale  # the order of blocks
    for block in range(int(blocks.max()) + 1):
        changed = inputs.clone()
        changed[:, blocks >= block] += 1.0
        difference = (model(changed, layout, text, lengths) - logits).abs().amax(dim=(0, 2))
        assert difference[blocks < block].max() == 0 if block else True
        # within the block everybody sees the change
        assert difference[blocks == block].min() > 0


def test_frame_mask_drops_exactly_the_drawn_frames():
    model, layout, inputs, text = setup()
    lengths = torch.tensor([2, 5, 3])
    mask = torch.ones(3, 3, 3, dtype=torch.bool)
    logits = model(inputs, layout, text, lengths)
    torch.testing.assert_close(model(inputs, layout, text, lengths, frame_mask=mask), logits, atol=0, rtol=0)
    mask[1, 2, 0] = mask[1, 1, 0] = False  # clip 1: no frame sees frame 0
    masked = model(inputs, layout, text, lengths, frame_mask=mask)
    torch.testing.assert_close(masked[[0, 2]], logits[[0, 2]], atol=0, rtol=0)
    changed = inputs.clone()
    changed[1, layout.frame == 0] += 1.0
    difference = (model(changed, layout, text, lengths, frame_mask=mask) - masked)[1].abs().amax(dim=1)
    assert difference[layout.frame > 0].max() == 0 and difference[layout.frame == 0].min() > 0


def test_window_limits_the_view_of_a_layer():
    model, layout, inputs, text = setup(window=1, num_layers=1)
    lengths = torch.tensor([2, 5, 3])
    changed = inputs.clone()
    changed[:, layout.frame == 0] += 1.0
    difference = (model(changed, layout, text, lengths) - model(inputs, layout, text, lengths)).abs().amax(dim=(0, 2))
    assert difference[layout.frame == 2].max() == 0 and difference[layout.frame == 1].min() > 0


@pytest.mark.parametrize(
    "changes",
    [{"rope": "flat"}, {"rope_scaled_spatial": True}, {"rope_theta": 100.0}, {"norm_eps": 0.1}, {"window": 1}],
)
def test_each_option_shows_in_the_logits(changes: dict):
    # a window of one frame shows from the third frame on; the same seed gives the same weights
    plain, layout, inputs, text = setup()
    other = tiny_model(**changes)
    lengths = torch.tensor([2, 5, 3])
    difference = other(inputs, layout, text, lengths) - plain(inputs, layout, text, lengths)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"num_classes": 7}, {"context_block": True}, {"ffn_hidden_size": None}])
def test_parameter_count_and_initial_spread(changes: dict):
    from inference.model import VideoARTransformer

    config = tiny_config(**changes)
    model = VideoARTransformer(config).requires_grad_(False)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameter_count()
    assert float(model.get_parameter("layers.0.feed_forward.up_proj.weight").std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.get_parameter("layers.1.feed_forward.down_proj.weight").std()) == pytest.approx(0.01, rel=0.05)


def test_published_sizes():
    scales, shared = ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8)), {"num_frames": 5, "num_classes": 101}
    sizes = [
        ModelConfig(layers, width, heads, scales, **shared) for layers, width, heads in ((24, 1536, 12), (32, 2048, 16))
    ]
    assert [round(size.parameter_count() / 1e9, 2) for size in sizes] == [0.91, 2.15]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 66, "num_attention_heads": 4}, "multiple of 8"),
        ({"max_scales": 2}, "max_scales"),
        ({"window": 0}, "window"),
        ({"num_layers": 0}, "num_layers"),
        ({"rope": "spiral"}, "rope"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict, words: str):
    with pytest.raises(UserError, match=words):
        tiny_config(**changes)


def test_configuration_round_trips(tmp_path):
    config = tiny_config(window=2, context_block=True)
    assert ModelConfig.from_dict(config.to_dict()) == config
    settings.save(config, tmp_path / "model.yaml")
    assert settings.load(ModelConfig, tmp_path / "model.yaml", ["--window", "1"]) == tiny_config(
        window=1, context_block=True
    )
    with pytest.raises(UserError, match="unknown key 'depth'"):
        ModelConfig.from_dict({**config.to_dict(), "depth": 3})


def test_import_is_light():
    heavy = "megatron ray streaming nvidia transformers av torchvision"
    code = f"import sys, inference, inference.model; print([n for n in '{heavy}'.split() if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
