"""Steps that are captured once and replayed give what plain ones give. Here a replay runs the captured work again, on the CPU."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inference.fast import compile_small, prepare
from inference.sampler import sample, sample_frames
from inference.steps import CudaCapture, StepGraphs
from tests.inference.tiny import random_text, tiny_model
from tokenizer import UserError


class Rerun:
    """A capture without a GPU: the same fixed tensors in, and out into the same place."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        with torch.inference_mode(False):
            result = torch.full_like(work(), torch.nan)

        def replay() -> None:
            result.copy_(work())

        return replay, result


def graphed(model, most: int = 2) -> Rerun:
    capture = Rerun()
    model.graphs = StepGraphs(most, capture)
    return capture


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("lengths", [[3, 3], [5, 2]], ids=["equal", "unequal"])
def test_replayed_clips_are_the_plain_ones(window: int | None, lengths: list[int]):
    model = tiny_model()
    text = random_text(2, model.config)
    arguments = (text, torch.tensor(lengths))
    options = {"num_frames": 7, "window": window}
    expected = [sample(model, *arguments, [seed, 9], **options).tokens() for seed in (0, 1)]
    capture = graphed(model)
    for seed, tokens in enumerate(expected):
        assert torch.equal(sample(model, *arguments, [seed, 9], **options).tokens(), tokens)
        if seed == 0:
            first = capture.captures
    scales = model.config.schedule.num_scales
    # the 7 frames are more than the trained ones, so a window of 2 bounds the lengths in any case
    assert first == capture.captures == scales * ((window or 2) + 1)


def test_a_clip_decoded_in_inference_mode_may_be_followed_by_one_outside_of_it():
    model = tiny_model()
    text, lengths = random_text(1, model.config), torch.tensor([3])
    expected = sample(model, text, lengths, [0]).tokens()
    graphed(model)
    with torch.inference_mode():
        assert torch.equal(sample(model, text, lengths, [0]).tokens(), expected)
    assert torch.equal(sample(model, text, lengths, [0]).tokens(), expected)


def test_clips_that_are_decoded_at_once_do_not_share_a_cache():
    model = tiny_model()
    text, lengths = random_text(1, model.config), torch.tensor([3])
    expected = [list(sample_frames(model, text, lengths, [seed])) for seed in (0, 1)]
    capture = graphed(model)
    both = zip(*(sample_frames(model, text, lengths, [seed]) for seed in (0, 1)))
    for made, wanted in zip(both, zip(*expected), strict=True):
        for one, other in zip(made, wanted):
            assert all(torch.equal(a, b) for a, b in zip(one, other))
    captures = capture.captures
    gc.collect()
    sample(model, text, lengths, [2])
    assert capture.captures == captures  # one of the two was free again


def test_prompts_of_unlike_lengths_share_the_graphs():
    model = tiny_model(max_text_length=70)
    text = random_text(2, model.config)
    lengths = [torch.tensor(pair) for pair in ([3, 3], [1, 9], [65, 2], [2, 70])]
    options = {"num_frames": 4, "window": 1}
    expected = [sample(model, text, length, [5, 6], **options).tokens() for length in lengths]
    capture, captures = graphed(model), []
    for length, tokens in zip(lengths, expected):
        assert torch.equal(sample(model, text, length, [5, 6], **options).tokens(), tokens)
        captures.append(capture.captures)
    once = captures[0]
    assert captures == [once, once, 2 * once, 2 * once]  # up to 64 tokens, and up to the model's 70


def test_caches_of_shapes_that_are_no_longer_decoded_go():
    model = tiny_model()
    text = random_text(1, model.config)
    graphed(model, most=1)
    for count in (1, 2, 3):
        sample(model, text, torch.tensor([3]), [0], num_frames=count)
        gc.collect()
    assert model.graphs is not None and len(model.graphs._free) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_small_operations_compiled_into_one_give_the_same_clips():
    model = tiny_model()
    arguments = (random_text(2, model.config), torch.tensor([5, 3]), [0, 1])
    expected = sample(model, *arguments).tokens()
    prepare(model, "fast")
    compile_small(model)
    assert torch.equal(sample(model, *arguments).tokens(), expected)


def test_compiling_asks_for_a_gpu():
    with pytest.raises(UserError, match="compiling is for a GPU"):
        prepare(tiny_model(), "fast", compiled=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 2])
def test_on_a_gpu_graphs_draw_the_bits_of_plain_steps(window: int | None):
    model = tiny_model().cuda()
    text, lengths = random_text(2, model.config).cuda(), torch.tensor([5, 3]).cuda()
    expected = [sample(model, text, lengths, [seed, 9], num_frames=7, window=window).tokens() for seed in (0, 1)]
    prepare(model, "fast", compiled=True)
    assert model.graphs is not None and isinstance(model.graphs._capture, CudaCapture)
    for seed, tokens in enumerate(expected):
        made = sample(model, text, lengths, [seed, 9], num_frames=7, window=window).tokens()
        # fused kernels round otherwise: a bit whose noise lies at its probability may differ
        assert float((made == tokens).float().mean()) > 0.999
