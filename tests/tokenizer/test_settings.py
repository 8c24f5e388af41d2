"""Settings: dataclasses, YAML and dotted overrides say the same; what is unknown is named."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from tokenizer import UserError, settings


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Part:
    name: str
    steps: int = 5


@dataclass(frozen=True)
class Outer:
    seed: int = 0
    window: int | None = None
    scales: tuple[tuple[int, int], ...] = ((1, 1),)
    parts: list[Part] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)


def test_file_then_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "seed: 3\nscales: [[1, 1], [2, 2]]\nparts:\n- {name: I, steps: 7}\n- name: II\ninner: {lr: 1e-3, kind: b}\n"
    )
    config = settings.load(Outer, file, ["--inner.lr", "5e-4", "--window=2"])
    assert config == Outer(3, 2, ((1, 1), (2, 2)), [Part("I", 7), Part("II")], Inner(5e-4, (0.9, 0.95), "b"))
    settings.save(config, tmp_path / "again.yaml")
    assert settings.load(Outer, tmp_path / "again.yaml") == config
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["--inner.lrr", "1"], "unknown key 'inner.lrr': the nearest known key is 'inner.lr'"),
        (["--sed", "1"], "nearest known key is 'seed'"),
        (["--seed", "x"], "seed"),
        (["--inner.kind", "c"], "inner.kind"),
        (["--inner.betas", "[1]"], "inner.betas"),
    ],
)
def test_bad_words_are_named(overrides, words):
    with pytest.raises(UserError, match=words):
        settings.load(Outer, None, overrides)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        settings.load(Outer, tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    for content, words in (
        ("inner: {lrr: 1}", "unknown key 'inner.lrr'"),
        ("parts:\n- {name: I, stepz: 3}", "unknown key 'parts.stepz': the nearest known key is 'parts.steps'"),
        ("- 1", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            settings.load(Outer, file)
