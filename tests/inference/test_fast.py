"""Weights laid out for speed give the same clips."""

import pytest
import torch

from inference.fast import Product, prepare
from inference.sampler import sample
from tests.inference.tiny import random_text, tiny_config, tiny_model
from tokenizer import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_network_draws_the_same_bits(dtype):
    config = tiny_config()
    arguments = (random_text(2, config).to(dtype), torch.tensor([5, 3]), [0, 1])
    model = tiny_model().to(dtype)
    expected = sample(model, *arguments)
    prepare(model, "fast")
    assert sum(isinstance(part, Product) for part in model.modules()) == 4 * config.num_layers
    assert [part.packed for part in model.modules() if isinstance(part, Product)][0] == (dtype == torch.bfloat16)
    assert torch.equal(sample(model, *arguments).tokens(), expected.tokens())


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
