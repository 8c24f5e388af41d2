"""The inference format: whole or refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference import weight_files
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

    monkeypatch.setattr(weight_files, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_model(tiny_model(seed=1), tmp_path)
    with pytest.raises(UserError, match="holds no config.json"):
        load_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


SHARD = 60_000  # bytes: the tiny network then has several files


def test_a_model_in_several_files_is_the_same_model(tmp_path):
    model = tiny_model()
    save_model(model, tmp_path)
    save_weights(model.config, model.state_dict(), tmp_path, max_shard_size=SHARD)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count >= 3 and files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    # the single file of the first save is gone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", *files, "model.safetensors.index.json"]
    state = model.state_dict()
    assert index["metadata"]["total_size"] == sum(value.numel() * 4 for value in state.values())
    largest = max(value.numel() * 4 for value in state.values())
    for file in files:
        assert (tmp_path / file).stat().st_size <= max(SHARD, largest) + 8192  # and the header
        assert all(index["weight_map"][name] == file for name in load_file(tmp_path / file))
    again = load_model(tmp_path).state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], value) for name, value in state.items())
    save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_hugging_face_reads_the_same_index(tmp_path):
    """Their own splitter puts the same tensors into the same files."""
    hub = pytest.importorskip("huggingface_hub")
    model = tiny_model()
    save_weights(model.config, model.state_dict(), tmp_path, max_shard_size=SHARD)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    theirs = hub.split_torch_state_dict_into_shards(model.state_dict(), max_shard_size=SHARD)
    assert theirs.is_sharded and theirs.metadata["total_size"] == index["metadata"]["total_size"]
    assert len(theirs.filename_to_tensors) <= len(set(index["weight_map"].values()))
    assert theirs.tensor_to_filename.keys() == index["weight_map"].keys()


def index_with(folder, **changes):
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    content["weight_map"] |= changes
    file.write_text(json.dumps(content))


def shard_twice(folder):
    first, second = sorted(folder.glob("model-0*"))[:2]
    save_file({**load_file(second), next(iter(load_file(first))): torch.zeros(1)}, second)


def not_listed(folder):
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text())
    del content["weight_map"]["head.weight"]
    file.write_text(json.dumps(content))


def listed_twice(folder):
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text().replace('"weight_map": {', '"weight_map": {"head.weight": "x.safetensors",'))


def other_file(folder):
    content = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    index_with(folder, **{"head.weight": next(file for file in content.values() if file != content["head.weight"])})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: next(folder.glob("model-0*")).unlink(), "which is missing"),
        (lambda folder: spoil_cut(next(folder.glob("model-0*"))), "damaged"),
        (shard_twice, "is in model-00001-.* and in model-00002-"),
        (not_listed, "does not list 'head.weight'"),
        (listed_twice, "lists 'head.weight' twice"),
        (other_file, "puts 'head.weight' into .* which does not hold it"),
        (lambda folder: index_with(folder, surplus="model-00001-of-00009.safetensors"), "which is missing"),
        (lambda folder: index_with(folder, **{"head.weight": "../x.safetensors"}), "no file name of its own folder"),
        (lambda folder: index_with(folder, **{"head.weight": "/etc/x.safetensors"}), "no file name of its own folder"),
        (lambda folder: index_with(folder, **{"head.weight": "a\\x.safetensors"}), "no file name of its own folder"),
        (lambda folder: index_with(folder, **{"head.weight": ".x.safetensors"}), "no file name of its own folder"),
        (lambda folder: index_with(folder, **{"head.weight": "x.bin"}), "no file name of its own folder"),
        (lambda folder: index_with(folder, **{"head.weight": 3}), "no file name of its own folder"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 10**5), "no index of weights"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}'), "no index"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "lists no weights"),
        (lambda folder: save_file({"a": torch.zeros(1)}, folder / "model.safetensors"), "holds both"),
    ],
)
def test_broken_and_malicious_indexes_are_refused(tmp_path, spoil, words: str):
    model = tiny_model()
    save_weights(model.config, model.state_dict(), tmp_path, max_shard_size=SHARD)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


def test_sizes():
    assert [weight_files.parse_size(text) for text in ("5gb", "1.5 MB", "700000", "2TB")] == [
        5 * 10**9, 1_500_000, 700_000, 2 * 10**12,
    ]  # fmt: skip
    for text in ("", "gb", "-5gb", "0", "5 eb", "nan"):
        with pytest.raises(UserError, match="such as 5gb"):
            weight_files.parse_size(text)
    assert weight_files.split({"a": 4, "b": 9, "c": 1, "d": 4}, 5) == [["a"], ["b"], ["c", "d"]]
