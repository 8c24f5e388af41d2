"""The shortcuts of the building blocks compute what the plain operations do, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from tokenizer.causal_conv import CausalConv3d, ResidualBlock


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_silu_behind_zeros_is_silu_then_padding():
    conv = CausalConv3d(4, 6)
    torch.nn.init.normal_(conv.weight)
    input = random(2, 4, 5, 6, 7)
    found, expected = conv.after_silu(input), conv(F.silu(input))
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((one * weight).sum(), [input, conv.weight, conv.bias]) for one in (found, expected)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_a_pointwise_kernel_is_the_convolution():
    conv = CausalConv3d(4, 6, kernel=1, temporal_kernel=1)
    torch.nn.init.normal_(conv.weight)
    input = random(2, 4, 3, 5, 6)
    torch.testing.assert_close(conv(input), F.conv3d(input, conv.weight, conv.bias))


def test_a_residual_block_is_its_formula():
    block = ResidualBlock(32, 64)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    features = random(1, 32, 3, 4, 4)

    def norm(values, layer):
        frames = [F.group_norm(values[:, :, t], 32, layer.weight, layer.bias, 1e-6) for t in range(values.shape[2])]
        return torch.stack(frames, dim=2)

    def conv(values, layer):
        return F.conv3d(F.pad(values, (1, 1, 1, 1, 2, 0)), layer.weight, layer.bias)

    hidden = conv(F.silu(norm(features, block.norm1)), block.conv1)
    hidden = conv(F.silu(norm(hidden, block.norm2)), block.conv2)
    expected = hidden + F.conv3d(features, block.nin_shortcut.weight, block.nin_shortcut.bias)
    found = block(features)
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(value.square().sum(), features)[0] for value in (found, expected))
    torch.testing.assert_close(one, other)
