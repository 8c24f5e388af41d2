"""Weights laid out for speed give the same clips."""

import pytest
import torch
import torch.nn.functional as F

from inference.fast import Product, attend_by_products, prepare
from inference.sampler import sample
from tests.inference.tiny import random_codes, random_text, tiny_config, tiny_model
from tokenizer import UserError
from tokenizer.sequence import video_inputs


def test_a_prepared_network_draws_the_same_bits():
    config = tiny_config()
    arguments = (random_text(2, config), torch.tensor([5, 3]), [0, 1])
    model = tiny_model()
    expected = sample(model, *arguments)
    prepare(model, "fast")
    assert sum(isinstance(part, Product) for part in model.modules()) == 4 * config.num_layers
    assert torch.equal(sample(model, *arguments).tokens(), expected.tokens())


def test_in_bfloat16_a_prepared_network_is_as_close_to_float32_as_a_plain_one():
    config = tiny_config(num_frames=6)
    exact, plain, fast = (
        tiny_model(num_frames=6),
        tiny_model(num_frames=6).bfloat16(),
        tiny_model(num_frames=6).bfloat16(),
    )
    prepare(fast, "fast")
    assert all(part.packed for part in fast.modules() if isinstance(part, Product))
    layout, text, lengths = config.layout(), random_text(8, config), torch.tensor([5, 3] * 4)
    inputs = video_inputs(random_codes(8, 6), layout)
    expected = exact(inputs, layout, text, lengths)
    errors = [
        float((model(inputs, layout, text, lengths) - expected).square().mean().sqrt()) for model in (plain, fast)
    ]
    assert 0 < errors[1] < 1.25 * errors[0]


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_products_is_attention(queries: int, masked: bool):
    q, k, v = (torch.randn(2, 3, length, 16) for length in (queries, 50, 50))
    mask = torch.rand(2, 1, queries, 50) < 0.7 if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend_by_products(q, k, v, mask), expected, atol=1e-5, rtol=0)


def test_weights_of_eight_bits_are_close_and_small():
    pytest.importorskip("torchao")
    config, model = tiny_config(), tiny_model()
    arguments = (random_text(2, config), torch.tensor([5, 3]), [0, 1])
    expected = sample(model, *arguments, temperature=0).tokens()
    prepare(model, "int8")
    agree = (sample(model, *arguments, temperature=0).tokens() == expected).float().mean()
    assert 0.9 < float(agree) <= 1


def test_other_words_are_refused():
    with pytest.raises(UserError, match="weights 'int4' are unknown"):
        prepare(tiny_model(), "int4")  # type: ignore[arg-type]
