"""Every setting that should change a run's numbers does, and those that should not don't. Runs are deterministic."""

from __future__ import annotations

from pathlib import Path

import pytest

from inference.config import ModelConfig
from inference.model import VideoARTransformer
from parallel import checkpoint
from pretrain.config import PretrainConfig
from pretrain.train import main_entry
from tests.pretrain.tiny import metrics, stage, write_codes, write_run, write_tokenizer
from tokenizer import settings

BASE = {"global_batch_size": 4, "micro_batch_size": 4, "p_mask": 0.3}

# each with a value that is not the base run's
RUN = {
    "seed": "3",
    "network.num_layers": "1",
    "network.hidden_size": "48",
    "network.num_attention_heads": "1",
    "network.ffn_hidden_size": "40",
    "network.condition": "class",
    "network.max_text_length": "1",
    "network.rope": "flat",
    "network.rope_theta": "100",
    "network.rope_scaled_spatial": "true",
    "network.norm_eps": "0.1",
    "network.window": "1",
    "network.context_block": "true",
    "network.input_down": "area",
    "optimizer.lr": "0.01",
    "optimizer.warmup_steps": "3",
    "optimizer.min_lr_ratio": "0.9",
    "optimizer.betas": "[0.5, 0.6]",
    "optimizer.eps": "0.1",
    "optimizer.weight_decay": "10",
    "optimizer.clip_grad": "0.0001",
    "parallel.precision": "bfloat16",
}
STAGE = {
    "window": 1,
    "p_mask": 0.9,
    "condition_dropout": 0.9,
    "token_weight": "scale",
    "error_correction": {"p_max": 0.0},
    "lr": 0.02,
    "warmup_steps": 3,
    "codes": 2,
    "token_budget": 30,
}
SAME = {"data_workers": "1", "log_every": "2", "checkpoint_every": "1", "parallel.recompute": "full", "save_in_background": "false",
        "parallel.deterministic": "true"}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A folder with tokenizer and codes on four scales, and the loss of its run."""
    folder = tmp_path_factory.mktemp("base")
    write_codes(folder / "codes", write_tokenizer(folder / "tokenizer"), side=4, clips=12, scales=4)
    return folder, _loss(folder, "base", BASE)


def _loss(folder: Path, name: str, changes: dict, *overrides: str, line: int = -1) -> float:
    """The loss of the fourth step, which what the first three did has changed."""
    codes = [{"dir": str(folder / "codes"), "num_frames": changes.get("codes", 3)}]
    out = folder / name
    optimizer = {"lr": 0.003, "warmup_steps": 1}
    file = write_run(
        folder,
        out=str(out),
        optimizer=optimizer,
        stages=[stage(folder / "codes", 4, **(BASE | changes | {"codes": codes}))],
    )
    main_entry(settings.load(PretrainConfig, file, list(overrides)))
    return metrics(out)[line]["loss"]


@pytest.mark.parametrize("name", RUN)
def test_a_run_setting_has_an_effect(base: tuple[Path, float], name: str) -> None:
    folder, loss = base
    assert _loss(folder, name, {}, f"--{name}", RUN[name]) != loss


def test_scale_embeddings_are_allocated_as_set(base: tuple[Path, float]) -> None:
    folder, loss = base
    # a weight's draw depends on its name alone, and the scales in use are the first ones
    assert _loss(folder, "few scales", {}, "--network.max_scales", "4") == loss
    model = checkpoint.load_common(checkpoint.latest(folder / "few scales" / "checkpoints") or "")["model"]
    assert VideoARTransformer.shapes(ModelConfig.from_dict(model))["embedding.scale_embedding"][0] == 4


@pytest.mark.parametrize("name", STAGE)
def test_a_stage_setting_has_an_effect(base: tuple[Path, float], name: str) -> None:
    folder, loss = base
    assert _loss(folder, name, {name: STAGE[name]}) != loss


def test_error_correction_settings_have_an_effect(base: tuple[Path, float]) -> None:
    folder, loss = base
    for number, correction in enumerate(({"p_min": 0.2}, {"p_max": 0.2}, {"delta": 0.1}, {"inherit": False})):
        assert _loss(folder, f"correction {number}", {"error_correction": correction}) != loss


@pytest.mark.parametrize("name", SAME)
def test_a_setting_of_speed_or_logging_changes_no_number(base: tuple[Path, float], name: str) -> None:
    folder, loss = base
    assert _loss(folder, name, {}, f"--{name}", SAME[name]) == loss


def test_as_many_batches_are_validated_as_set(base: tuple[Path, float]) -> None:
    folder, loss = base
    validated = {}
    for number in ("1", "2"):
        changes = {"validation": str(folder / "codes")}
        words = ["--validate_every", "4", "--validation_batches", number]
        assert _loss(folder, f"validation {number}", changes, *words, line=-2) == loss
        validated[number] = metrics(folder / f"validation {number}")[-1]["validation/loss"]
    assert validated["1"] != validated["2"]


def test_microbatches_add_up_to_the_batch(base: tuple[Path, float]) -> None:
    folder, loss = base
    for size in (1, 2):
        assert _loss(folder, f"micro {size}", {"micro_batch_size": size}) == pytest.approx(loss, abs=1e-6)
