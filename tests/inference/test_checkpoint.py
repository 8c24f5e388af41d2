"""The inference format: whole or refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference import checkpoint
from inference.checkpoint import load_model, read_config, save_model, save_weights
from tests.inference.tiny import random_codes, random_text, tiny_config, tiny_model
from tokenizer.errors import UserError
from tokenizer.sequence import video_inputs


def test_a_saved_model_keeps_its_logits(tmp_path):
    model = tiny_model(context_block=True)
    save_model(model, tmp_path / "model", {"text_encoder": "bytes"})
    again = load_model(tmp_path / "model")
    layout = model.config.layout()
    batch = video_inputs(random_codes(2, 3), layout), layout, random_text(2, model.config), torch.tensor([3, 5])
    assert torch.equal(model(*batch), again(*batch))
    assert read_config(tmp_path / "model")["text_encoder"] == "bytes"
    assert load_model(tmp_path / "model", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_the_format_has_plain_names(tmp_path):
    save_model(tiny_model(), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"layers.0.attention.q_proj.weight", "layers.1.feed_forward.down_proj.weight", "head.weight"} <= names
    assert {"embedding.start_token", "embedding.null_text", "final_norm.weight"} <= names


def spoil_missing(path):
    weights = load_file(path)
    del weights["layers.1.attention.k_proj.weight"]
    save_file(weights, path)


def spoil_surplus(path):
    save_file({**load_file(path), "layers.2.attention.k_proj.weight": torch.zeros(2)}, path)


def spoil_shape(path):
    save_file({**load_file(path), "head.weight": torch.zeros(3, 64)}, path)


def spoil_cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_missing, "lacks 1 weights .* 'layers.1.attention.k_proj.weight'"),
        (spoil_surplus, "'layers.2.attention.k_proj.weight'"),
        (spoil_shape, r"'head.weight' .* shape \(3, 64\)"),
        (spoil_cut, "damaged"),
        (lambda path: path.unlink(), "holds no model.safetensors"),
        (lambda path: path.with_name("config.json").unlink(), "holds no config.json"),
        (lambda path: path.with_name("config.json").write_text("{"), "not valid JSON"),
        (lambda path: path.with_name("config.json").write_text(json.dumps({"d": 1})), "describes no transformer"),
    ],
)
def test_incomplete_models_are_refused(tmp_path, spoil, words: str):
    save_model(tiny_model(), tmp_path)
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


def test_weights_of_another_configuration_are_not_written(tmp_path):
    with pytest.raises(UserError, match="layers.2"):
        save_weights(tiny_config(num_layers=3), tiny_model().state_dict(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_failed_write_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    save_model(tiny_model(), tmp_path)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_model(tiny_model(seed=1), tmp_path)
    with pytest.raises(UserError, match="holds no config.json"):
        load_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
