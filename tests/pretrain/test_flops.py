"""The two halves of MFU: model FLOPs, against torch's own counter of what the plain network does, and the device's peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from inference.config import ModelConfig
from inference.model import VideoARTransformer
from parallel.peak import device_peak, published_peak
from pretrain.planning.flops import count
from pretrain.planning.gpus import KINDS, load_gpu

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=2, scales=((1, 1), (2, 2)), num_frames=3, bits=8, num_classes=4
)


@torch.no_grad()
@pytest.mark.parametrize("context_block", [False, True])
def test_model_flops_are_those_that_torch_counts_with_the_hidden_pairs_taken_out(context_block: bool) -> None:
    config = replace(CONFIG, context_block=context_block, window=2)
    layout, lengths = config.layout(), torch.ones(5, dtype=torch.long)
    model = VideoARTransformer(config).eval()
    inputs = torch.randn(5, layout.video_tokens, config.bits)
    with FlopCounterMode(display=False) as counter:
        model(inputs, layout, torch.zeros(5, dtype=torch.long), lengths)
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(flops for name, flops in counts.items() if str(name).rsplit(".")[-1] in ("mm", "addmm", "bmm"))
    visible = int(layout.attention_mask(lengths, None, config.window).sum())
    attention = 4 * config.hidden_size * config.num_layers * visible
    flops = count(config, layout, lengths)
    assert (flops.matrices, flops.attention) == (matrices, attention)
    # what goes into the projection of the inputs has no gradient
    assert flops.model == 3 * (matrices + attention) - flops.inputs


def test_the_peak_is_configured_published_or_measured() -> None:
    assert published_peak("NVIDIA H100 80GB HBM3") == 989e12 and published_peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert published_peak("NVIDIA H100 PCIe") == 756e12 and published_peak("Some GPU") is None
    # what MFU is held against is what the planner reckons with
    for kind in yaml.safe_load(KINDS.read_text()):
        assert published_peak(f"NVIDIA {kind.upper()}") == 1e12 * load_gpu(kind).bf16_tflops
    cpu = torch.device("cpu")
    assert device_peak(cpu, torch.float32, 5e9) == (5e9, "configured")
    rate, source = device_peak(cpu, torch.float32)
    assert source == "measured" and rate > 1e8
