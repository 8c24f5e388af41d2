"""What only a GPU can show: FlexAttention's gradients, Transformer Engine's layers, FP8, and checkpoints that go between them."""

import dataclasses
import importlib.util

import pytest
import torch

from inference.config import ModelConfig
from parallel import checkpoint
from parallel.attention import AttentionContext, BlockCausalAttention
from parallel.saving import Saver
from parallel.setup import ParallelConfig
from parallel.train_step import Microbatch, build_model, build_optimizer, forward_backward, update
from tests.parallel.single import loss, random_clips

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
needs_te = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs transformer-engine")
MODEL = ModelConfig(
    num_layers=2, hidden_size=256, num_attention_heads=4, scales=((1, 1), (2, 2), (4, 4)), num_frames=3, bits=16, text_dim=32,
    max_text_length=16,
)  # fmt: skip


def clips(parallel: ParallelConfig) -> Microbatch:
    return random_clips(MODEL, 0, 8, parallel.sequence_multiple).to("cuda")


def train(chunks, optimizer, parallel: ParallelConfig, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(forward_backward(chunks, [clips(parallel)], loss).loss)
        update(optimizer, 1e-3)
    return losses


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("hidden", [False, True])
def test_flex_attention_equals_the_dense_one_in_output_and_gradients(window, hidden):
    config = dataclasses.replace(MODEL, window=window, context_block=True)
    layout, lengths = config.layout(multiple=32), torch.tensor([1, 16], device="cuda")
    draw = torch.Generator(device="cuda").manual_seed(0)
    frame_mask = torch.rand(2, 3, 3, generator=draw, device="cuda") > 0.5 if hidden else None
    tensors = torch.randn(3, layout.length, 2, 4, 64, generator=draw, device="cuda")
    mix, core, seen = (
        torch.randn(layout.length, 2, 256, generator=draw, device="cuda"),
        BlockCausalAttention(None, 1),
        {},
    )
    for name in ("sdpa", "flex"):
        q, k, v = (one.clone().requires_grad_() for one in tensors)
        context = AttentionContext.build(config, layout, lengths, frame_mask, torch.float32, name)
        out = core(q, k, v, attention_bias=context)
        seen[name] = (out.detach(), *torch.autograd.grad((out * mix).sum(), (q, k, v)))
    for dense, ours in zip(seen["sdpa"], seen["flex"], strict=True):
        assert float((dense - ours).norm() / dense.norm()) < 1e-3  # TF32 products within the kernel


@needs_te
def test_transformer_engine_s_layers_follow_megatron_s_own_and_take_their_checkpoints(info, tmp_path):
    losses, folder = {}, None
    for engine in ("off", "on"):
        parallel = ParallelConfig(precision="bfloat16", transformer_engine=engine)
        chunks = build_model(MODEL, parallel, info, seed=1)
        optimizer = build_optimizer(chunks, 1e-3)
        losses[engine] = train(chunks, optimizer, parallel, 5)
        if folder is None:
            folder = Saver(tmp_path).save(5, chunks, optimizer, {})
            expected = train(chunks, optimizer, parallel, 2)
    assert losses["on"] == pytest.approx(losses["off"], rel=2e-2)
    chunks = build_model(MODEL, parallel, info)
    optimizer = build_optimizer(chunks, 1e-3)
    checkpoint.load(folder, chunks, optimizer)
    assert train(chunks, optimizer, parallel, 2) == pytest.approx(expected, rel=2e-2)


@needs_te
@pytest.mark.parametrize("fp8", ["delayed", "current"])
def test_fp8_follows_bfloat16_and_each_goes_on_from_the_other(info, tmp_path, fp8):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    settings = {"bf16": ParallelConfig(precision="bfloat16"), "fp8": ParallelConfig(precision="bfloat16", fp8=fp8)}
    losses, folders = {}, {}
    for name, parallel in settings.items():
        chunks = build_model(MODEL, parallel, info, seed=1)
        optimizer = build_optimizer(chunks, 1e-3)
        losses[name] = train(chunks, optimizer, parallel, 6)
        folders[name] = Saver(tmp_path / name).save(6, chunks, optimizer, {})
        losses[name] += train(chunks, optimizer, parallel, 2)
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=5e-2) and losses["fp8"] != losses["bf16"]
    for name, other in (("bf16", "fp8"), ("fp8", "bf16"), ("fp8", "fp8")):
        chunks = build_model(MODEL, settings[other], info)
        optimizer = build_optimizer(chunks, 1e-3)
        checkpoint.load(folders[name], chunks, optimizer)
        assert train(chunks, optimizer, settings[other], 2) == pytest.approx(losses[name][6:], rel=5e-2), (name, other)
