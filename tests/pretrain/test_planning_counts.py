"""The planner's counts against real steps of small networks: weights exactly, FLOPs as torch counts them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.memory import SMALL
from benchmarks.training import Training, clips
from inference.config import ModelConfig
from inference.model import VideoARTransformer
from parallel.frame_attention import Visibility
from parallel.setup import ParallelConfig, destroy, initialize
from pretrain.bitwise_loss import bitwise_loss
from pretrain.planning.flops import count
from tests.parallel.torchrun import torchrun

# what torch's counter has no formula for: the product that adds into a gradient, and the attention kernel of CPUs
aten = torch.ops.aten
FORMULAS: dict[Any, Any] = {
    aten.addmm_: lambda into, a, b, *rest, **more: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *rest, **more: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}
CLIPS = 2
MODEL = replace(SMALL, num_layers=2, hidden_size=128, num_attention_heads=2)
BY_CLASS = replace(MODEL, num_classes=7, window=1, context_block=True)


def counted(step) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", [MODEL, BY_CLASS], ids=["text", "class"])
def test_flops_of_the_plain_network(model: ModelConfig) -> None:
    """Its attention works on all pairs, so that all pairs are what is asked for."""
    layout, network = model.layout(), VideoARTransformer(model)
    batch = clips(replace(model, context_block=False), CLIPS, replace(layout, context_block=False))
    inputs = torch.randn(CLIPS, layout.video_tokens, model.bits)

    def step() -> None:
        logits = network(inputs, layout, batch.text, batch.text_lengths, None, None)
        bitwise_loss(logits.float(), batch.targets, layout)[0].backward()

    planned = count(model, layout, batch.text_lengths, CLIPS * layout.length**2)
    assert planned.executed() == pytest.approx(counted(step), rel=0.02)
    assert planned.model < planned.executed()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_flops_of_a_training_step(recompute: Any) -> None:
    """On megatron-core, whose attention goes frame by frame: the pairs of its rectangles, some of them hidden, are asked for."""
    model, parallel = MODEL, ParallelConfig(recompute=recompute)
    layout, info = model.layout(), initialize(parallel, 0)
    batch = clips(model, CLIPS, layout)
    done = counted(Training(model, parallel, info, [batch, batch]).step)
    destroy()
    seen = layout.frames_visible(CLIPS, None, None, torch.device("cpu"))
    hidden = [group.hidden for group in Visibility(layout, batch.text_lengths, seen).groups(torch.float32)]
    planned = count(model, layout, batch.text_lengths, sum(one.numel() for one in hidden))
    assert 2 * planned.executed(recompute) == pytest.approx(done, rel=0.02)
    # the visible ones alone are what MFU divides
    visible = count(model, layout, batch.text_lengths)
    assert visible.attention == 4 * model.num_layers * model.hidden_size * sum(int((one == 0).sum()) for one in hidden)
    assert visible.matrices == planned.matrices and visible.attention < planned.attention


def test_each_process_holds_the_weights_that_were_planned(tmp_path: Path) -> None:
    done = torchrun(Path(__file__).with_name("held_weights.py"), 2, tmp_path / "held.json")
    assert done.returncode == 0, done.stderr[-4000:]
    layouts = json.loads((tmp_path / "held.json").read_text())
    assert len(layouts) == 3
    for ranks in layouts:
        assert len(ranks) == 2 and all(held == planned > 0 for held, planned in ranks)
