"""What one process can show: precision, recomputation, masks, checkpoint folders, and refusals that name the numbers."""

import dataclasses
import json
import os
from functools import partial

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.nn.attention.flex_attention import flex_attention

from inference.config import ModelConfig
from parallel import attention, checkpoint
from parallel.attention import AttentionContext, BlockCausalAttention, choose_backend
from parallel.convert import gather_reference, load_reference
from parallel.cpu import cuda_redirected
from parallel.ema import Ema
from parallel.frame_attention import Visibility
from parallel.layers import RMSNorm, swiglu, transformer_config, use_transformer_engine
from parallel.saving import Saver
from parallel.setup import ParallelConfig, check_layout, make_deterministic
from parallel.train_step import build_model, build_optimizer, forward_backward, update
from tests.parallel.single import loss, random_clips
from tokenizer.errors import UserError

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=2, scales=((1, 1), (2, 2)), num_frames=3, bits=8, text_dim=6,
    max_text_length=4,
)  # fmt: skip


clips = partial(random_clips, MODEL)


def gradients(chunks):
    return [parameter.main_grad for parameter in chunks[0].parameters()]


def test_bfloat16_follows_float32_with_float32_gradients_and_optimizer(info):
    losses = {}
    for precision in ("float32", "bfloat16"):
        parallel = ParallelConfig(precision=precision)
        chunks = build_model(MODEL, parallel, info, seed=1)
        optimizer = build_optimizer(chunks, 1e-3)
        assert {grad.dtype for grad in gradients(chunks)} == {torch.float32}
        assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.float32}
        losses[precision] = []
        for _ in range(5):
            losses[precision].append(forward_backward(chunks, [clips(1)], loss).loss)
            update(optimizer, 1e-3)
    assert losses["float32"][-1] < 0.99 * losses["float32"][0]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["bfloat16"] != losses["float32"]


def test_recomputation_changes_no_gradient(info):
    seen, kept = [], []
    for recompute in ("none", "selective", "full"):
        chunks = build_model(MODEL, ParallelConfig(recompute=recompute), info, seed=1)
        forward_backward(chunks, [clips(1), clips(2)], loss)
        seen.append(torch.cat([grad.flatten() for grad in gradients(chunks)]))
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        batch = clips(1)
        with cuda_redirected(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chunks[0](batch.inputs, batch.layout, batch.text, batch.text_lengths)
        kept.append(sum(sizes))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]) and seen[0].norm() > 0
    assert kept[0] > kept[1] > kept[2], kept


def test_unequal_microbatches_are_refused(info):
    chunks = build_model(MODEL, ParallelConfig(), info, seed=1)
    with pytest.raises(ValueError, match="one layout and one number of clips"):
        forward_backward(chunks, [clips(1), clips(2, number=3)], loss)


def test_loading_needs_only_its_own_shards_and_validation_leaves_gradients_alone(info):
    chunks = build_model(MODEL, ParallelConfig(), info, seed=1)
    forward_backward(chunks, [clips(1)], loss)
    before = [grad.clone() for grad in gradients(chunks)]
    state = gather_reference(chunks)
    load_reference(chunks, {name: value * 2 for name, value in state.items()})
    assert all(torch.equal(value, 2 * state[name]) for name, value in gather_reference(chunks).items())
    forward_backward(chunks, [clips(2)], loss, training=False)
    assert all(torch.equal(old, new) for old, new in zip(before, gradients(chunks)))


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("share_hidden", [None, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["frames", "flex"])
def test_attention_back_ends_equal_the_dense_one_in_output_and_gradients(backend, share_hidden, window):
    config = dataclasses.replace(MODEL, window=window, context_block=True, num_frames=4)
    layout, lengths = config.layout(multiple=16), torch.tensor([1, 4])
    assert layout.length > layout.text_length + layout.video_tokens  # there is end padding
    draw = torch.Generator().manual_seed(0)
    frame_mask = None if share_hidden is None else torch.rand(2, 4, 4, generator=draw) >= share_hidden
    tensors = torch.randn(3, layout.length, 2, 2, 16, generator=draw)
    mix = torch.randn(layout.length, 2, 32, generator=draw)
    core, seen = BlockCausalAttention(None, 1), {}
    for name in ("sdpa", backend):
        q, k, v = (one.clone().requires_grad_(backend != "flex") for one in tensors)
        context = AttentionContext.build(config, layout, lengths, frame_mask, torch.float32, name)
        out = core(q, k, v, attention_bias=context)
        # FlexAttention has no backward pass on a CPU
        gradients = () if backend == "flex" else torch.autograd.grad((out * mix).sum(), (q, k, v))
        seen[name] = (out.detach(), *gradients)
    for dense, ours in zip(seen["sdpa"], seen[backend], strict=True):
        assert torch.allclose(dense, ours, atol=2e-6)


def test_flex_attention_is_compiled_once_for_all_steps(monkeypatch):
    layout, draw, core = MODEL.layout(), torch.Generator().manual_seed(0), BlockCausalAttention(None, 1)
    tensors = torch.randn(3, layout.length, 2, 2, 16, generator=draw)
    compiled = torch.compile(flex_attention, dynamic=False)  # as on a GPU; a CPU compiles the forward pass
    monkeypatch.setattr(attention, "_flex", lambda device_type: compiled)
    for lengths in ([1, 4], [3, 2], [4, 4]):
        frame_mask = torch.rand(2, 3, 3, generator=draw) > 0.5
        seen = []
        for backend in ("sdpa", "flex"):
            context = AttentionContext.build(MODEL, layout, torch.tensor(lengths), frame_mask, torch.float32, backend)
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
                seen.append(core(*tensors, attention_bias=context))
        assert torch.allclose(*seen, atol=2e-6)


def test_frame_by_frame_attention_works_on_visible_pairs_only():
    config = dataclasses.replace(MODEL, num_frames=9)
    layout, lengths = config.layout(), torch.tensor([4])
    frame_mask = torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = AttentionContext.build(config, layout, lengths, frame_mask, torch.float32, "frames").mask
    assert isinstance(mask, Visibility)
    done = sum(group.hidden.numel() for group in mask.groups(torch.float32))
    largest = max(group.hidden.numel() for group in mask.groups(torch.float32))
    needed = int(layout.attention_mask(lengths, frame_mask).sum())
    own = layout.frame_tokens**2 * 9  # the steps within a frame are masked, not skipped
    assert needed < done <= needed + own and largest <= layout.frame_tokens * layout.length


def test_own_gradients_equal_autograd_s():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, x)
    norm = RMSNorm(transformer_config(MODEL, ParallelConfig()), 8)
    with torch.no_grad():
        norm.weight.normal_(generator=draw)
    wide = x.detach().float().requires_grad_()
    plain = torch.nn.functional.rms_norm(wide, (8,), norm.weight, 1e-6)
    mix = torch.randn(5, 3, 8, generator=draw)
    expected = torch.autograd.grad((plain * mix).sum(), (wide, norm.weight))
    ours = norm(wide)
    assert torch.allclose(ours, plain, atol=1e-6)
    for got, want in zip(torch.autograd.grad((ours * mix).sum(), (wide, norm.weight)), expected):
        assert torch.allclose(got, want, atol=1e-5)


def test_checkpoints_keep_the_newest_and_refuse_what_is_not_whole(info, tmp_path):
    chunks = build_model(MODEL, ParallelConfig(), info, seed=1)
    optimizer = build_optimizer(chunks, 1e-3)
    forward_backward(chunks, [clips(1)], loss)
    update(optimizer, 1e-3)
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (9, 10, 11):
        Saver(tmp_path, keep=2).save(step, chunks, optimizer, {"position": step})
    for name in (".tmp-step-12", ".tmp-old-step-9"):  # what runs leave that are killed while they write or remove one
        (tmp_path / name).mkdir()
    Saver(tmp_path, keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert json.loads((tmp_path / "step-11" / "complete.json").read_text())["step"] == 11
    assert checkpoint.load_common(tmp_path / "step-10") == {"position": 10}
    (tmp_path / "step-11" / "complete.json").unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-10"
    with pytest.raises(UserError, match="step-11 is incomplete.*use .*step-10"):
        checkpoint.load(tmp_path / "step-11", chunks, optimizer)
    with pytest.raises(UserError, match="step-12 does not exist"):
        checkpoint.load_common(tmp_path / "step-12")
    with pytest.raises(UserError, match=r"it holds checkpoints: use .*step-10"):
        checkpoint.load_common(tmp_path)
    wider = build_model(dataclasses.replace(MODEL, hidden_size=64), ParallelConfig(), info)
    with pytest.raises(UserError, match="does not fit this network .*embedding"):
        checkpoint.load(tmp_path / "step-10", wider)


def test_running_means_by_hand_and_a_checkpoint_without_them(info, tmp_path):
    chunks = build_model(MODEL, ParallelConfig(), info, seed=1)
    optimizer, ema = build_optimizer(chunks, 1e-2), Ema(chunks, 0.15)
    expected = gather_reference(chunks)
    for decay in (0.1, 0.15, 0.15):  # (1 + n) / (10 + n), at most the setting
        forward_backward(chunks, [clips(1)], loss)
        update(optimizer, 1e-2)
        ema.update()
        expected = {name: decay * expected[name] + (1 - decay) * own for name, own in gather_reference(chunks).items()}
    weights = gather_reference(chunks)
    with ema.applied():
        means = gather_reference(chunks)
    for name, value in gather_reference(chunks).items():
        assert torch.equal(value, weights[name]) and torch.allclose(means[name], expected[name], atol=1e-6)
    assert not torch.equal(means["head.weight"], weights["head.weight"])

    folder = Saver(tmp_path).save(3, chunks, optimizer, {})
    checkpoint.load(folder, chunks, optimizer, ema)  # they begin at the weights
    with ema.applied():
        assert torch.equal(gather_reference(chunks)["head.weight"], weights["head.weight"])
    assert ema.updates == 0


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            3,
            "num_attention_heads 2 does not divide by tensor_parallel_size 3: choose .* 2 or num_attention_heads 3",
        ),
        ({"tensor_parallel_size": 2}, 3, "3 processes do not divide into groups of 2 .*: start 2 or 4 processes"),
        ({"pipeline_parallel_size": 4}, 4, "num_layers 2 does not divide by pipeline_parallel_size 4: choose .* 2 or"),
        (
            {"tensor_parallel_size": 2, "context_parallel_size": 2},
            6,
            "6 processes .* groups of 4 .* x context parallel 2.*: start 4 or 8",
        ),
        ({"tensor_parallel_size": 0}, 1, "must be at least 1"),
        ({"context_parallel_size": 0}, 1, "context_parallel_size .*must be at least 1"),
        (
            {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
            2,
            "num_layers 2 .* pipeline_parallel_size 2 x virtual_pipeline_size 2: choose virtual_pipeline_size 1 or num_layers 4",
        ),
        ({"virtual_pipeline_size": 2}, 1, "virtual_pipeline_size 2 needs a pipeline: .* 2 or more"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_with_the_nearest_that_does(parallel, world, message):
    with pytest.raises(UserError, match=message):
        check_layout(MODEL, ParallelConfig(**parallel), world)


@pytest.mark.parametrize(("fp8", "recipe"), [("delayed", "delayed"), ("current", "tensorwise")])
def test_fp8_in_megatron_s_words(fp8, recipe):
    parallel = ParallelConfig(2, context_parallel_size=2, precision="bfloat16", fp8=fp8)
    config = transformer_config(MODEL, parallel)
    assert (config.fp8, config.fp8_recipe, config.bf16) == ("hybrid", recipe, True)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")
    # a rank's tokens are a multiple of 16, whatever the number of clips
    assert MODEL.layout(multiple=parallel.sequence_multiple).length % (2 * 2 * 16) == 0
    assert transformer_config(MODEL, ParallelConfig(precision="bfloat16")).fp8 is None
    narrow = dataclasses.replace(MODEL, ffn_hidden_size=48)
    with pytest.raises(
        UserError, match="ffn_hidden_size 48 is no multiple of 16 x tensor_parallel_size 2.*: choose 32 or 64"
    ):
        check_layout(narrow, parallel, 4)
    with pytest.raises(UserError, match="fp8: .* needs precision: bfloat16 .*, not float32"):
        transformer_config(MODEL, ParallelConfig(fp8=fp8))


def test_fp8_scales_that_a_checkpoint_lacks_are_not_asked_for(info, tmp_path):
    chunks = build_model(MODEL, ParallelConfig(), info, seed=1)
    optimizer = build_optimizer(chunks, 1e-3)
    forward_backward(chunks, [clips(1)], loss)
    update(optimizer, 1e-3)
    folder = Saver(tmp_path).save(1, chunks, optimizer, {})
    state = checkpoint.sharded_state(chunks, None, None, loading=True)
    names = set(state["model0"])
    for name in ("decoder.layers.0.input_layernorm._extra_state", "head._extra_state"):
        state["model0"][name] = ShardedObject(name, None, (1,), (0,))
    checkpoint._leave_out_scales(state, folder)
    assert set(state["model0"]) == names
    state["model0"]["a.weight"] = ShardedObject("a.weight", None, (1,), (0,))
    checkpoint._leave_out_scales(state, folder)
    assert "a.weight" in state["model0"]  # a weight that is missing is a fault


def test_the_switch_of_determinism(info, monkeypatch):
    for variable in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(variable, "")  # and back to what it was, at the end

    def train() -> torch.Tensor:
        chunks = build_model(MODEL, ParallelConfig(deterministic=True), info, seed=1)
        optimizer = build_optimizer(chunks, 1e-2)
        for seed in range(3):
            forward_backward(chunks, [clips(seed)], loss)
            update(optimizer, 1e-2)
        return torch.cat([value.flatten() for value in gather_reference(chunks).values()])

    make_deterministic(True)
    try:
        assert torch.are_deterministic_algorithms_enabled() and os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
        assert torch.equal(train(), train())
    finally:
        make_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert transformer_config(MODEL, ParallelConfig(deterministic=True)).deterministic_mode
    assert not transformer_config(MODEL, ParallelConfig()).deterministic_mode


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_messages_overlap_as_set(info, overlap):
    chunks = build_model(MODEL, ParallelConfig(overlap=overlap), info, seed=1)
    optimizer = build_optimizer(chunks, 1e-3)
    ddp, wanted = chunks[0].ddp_config, overlap == "on"
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather, optimizer.config.overlap_param_gather) == (wanted,) * 3
    assert (chunks[0].config.no_sync_func is not None) == wanted
    losses = []
    for _ in range(2):
        losses.append(forward_backward(chunks, [clips(1)], loss).loss)
        update(optimizer, 1e-2)
    assert losses[1] < losses[0]


def test_what_needs_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="flex needs a GPU"):
        choose_backend("flex", "cpu")
    with pytest.raises(UserError, match="transformer_engine: on needs"):
        use_transformer_engine("on")
    with pytest.raises(UserError, match="fp8: delayed needs .* or set fp8 to none"):
        use_transformer_engine("auto", "delayed")
    with pytest.raises(UserError, match="fp8: current needs transformer_engine: set it to auto or on"):
        use_transformer_engine("off", "current")
    assert choose_backend("auto", "cpu") == "frames" and not use_transformer_engine("auto")
