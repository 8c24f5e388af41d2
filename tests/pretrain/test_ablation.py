"""`videoar ablate` on tiny runs with all real commands: refused before it starts, killed, resumed, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import videoar
from data_pipelines.moving_shapes import write_corpus
from pretrain.ablation import steps
from pretrain.ablation_config import AblationConfig, Row, changed_recipe
from pretrain.config import PretrainConfig
from tests.pretrain.tiny import ROOT, stage, write_run
from tokenizer import settings
from tokenizer.errors import UserError

CONFIGS = ROOT / "pretrain" / "configs"
ROWS = [
    {"name": "flat", "overrides": ["network.rope=flat", "stages.error_correction.p_max=0"]},
    {"name": "full", "title": "all on", "paper": "FVD 92.50"},
]


def _write(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> Path:
    """An ablation on random codes of 9 frames at 32x32; its YAML file."""
    network = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "max_text_length": 6}
    one = stage(folder / "codes", 4, validation=str(folder / "codes"))
    base = write_run(
        folder, tokenizer="tokenizer", network=network, stages=[one], validate_every=4, validation_batches=1, save_in_background=False
    )  # fmt: skip
    write_corpus(folder / "corpus", clips=1, seed=0, size=32, frames=9, validation=2)
    (folder / "few.csv").write_text("caption\na red circle moving left slowly\na blue square moving up quickly\n")
    evaluation = {"prompts": "few.csv", "samples": 1, "frames": 9, "guidance": "2.0", "windows": ["0:9"]}
    content = {"base": str(base), "root": str(folder), "seeds": [0], "rows": rows, "evaluation": evaluation} | changes
    file = folder / "ablation.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def _start(file: Path, out: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "videoar", "ablate", "--config", str(file), "--out", str(out)]
    with open(log, "ab") as stream:
        return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)


def _steps(out: Path, row: str) -> dict[str, Any]:
    file = out / "runs" / row / "seed-0" / "steps.json"
    return json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.timeout(1200)
def test_a_killed_ablation_goes_on_and_ends_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, log = _write(tmp_path), tmp_path / "out", tmp_path / "log"
    first = _start(file, out, log)
    try:
        deadline = time.monotonic() + 500
        while not _steps(out, "flat").get("pretrain", {}).get("done"):
            assert first.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        children = psutil.Process(first.pid).children(recursive=True)
    finally:
        first.kill()
        first.wait()
    gone, alive = psutil.wait_procs(children, timeout=100)
    assert len(children) >= 2 and not alive
    trained = (out / "runs" / "flat" / "seed-0" / "pretrain" / "metrics.jsonl").read_text()

    assert videoar.main(["ablate", "--out", str(out), "--table"]) == 0
    partial = capsys.readouterr().out
    assert partial.startswith("0 of 2 runs are finished") and "Missing: flat, seed 0; full, seed 0." in partial

    assert videoar.main(["ablate", "--config", str(file), "--out", str(out)]) == 0
    assert "2 of 2 runs are finished" in capsys.readouterr().out
    entries = _steps(out, "flat")
    assert entries["pretrain"]["attempts"] == 1 and all(entry["done"] for entry in entries.values())
    assert (out / "runs" / "flat" / "seed-0" / "pretrain" / "metrics.jsonl").read_text() == trained
    result = json.loads((out / "ablation.json").read_text())
    flat, full = (row["runs"]["0"] for row in result["rows"])
    assert not result["missing"] and flat["videos"] == 2 and flat["steps"] == 4
    for key in ("validation/loss", "validation/bit_accuracy"):
        assert flat[key] != full[key]
        assert result["rows"][1]["differences"]["flat"][key]["mean"] == pytest.approx(full[key] - flat[key])
    text = (out / "ablation.md").read_text()
    assert "2 of 2 runs are finished" in text and "FVD 92.50" in text and "all on - (flat)" in text
    assert (out / "ablation.png").stat().st_size > 5000

    # another recipe in the same folder is refused; another seed is not (but here nothing more is run)
    assert videoar.main(["ablate", "--config", str(file), "--out", str(out), "--evaluation.samples", "2"]) == 2
    assert "other settings (row 'flat', seed 0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"name": "a", "overrides": ["network.rop=flat"]}], "unknown key 'network.rop': the nearest known key is 'network.rope'"),
        ([{"name": "a", "overrides": ["network.rope=round"]}], "row 'a' of the ablation: the settings do not fit PretrainConfig"),
        ([{"name": "a", "overrides": ["stages.p_mask=7"]}], "p_mask is 7"),
        ([{"name": "a", "overrides": ["stages.validation=null"]}], "no validation"),
        ([{"name": "a", "overrides": ["seed"]}], "KEY=VALUE"),
        ([{"name": "a/b"}], "no plain name"),
        ([{"name": "a"}, {"name": "a"}], "each once"),
        ([{"name": "a"}, {"name": "b", "against": ["c"]}], "rows above it"),
        ([{"name": "a"}, {"name": "b", "overrides": ["stages.codes.dir=none"]}], "row 'b' of the ablation: "),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], sentence: str
) -> None:
    file = _write(tmp_path, rows)
    assert videoar.main(["ablate", "--config", str(file), "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("videoar ablate: ") and sentence in last
    assert not (tmp_path / "out").exists()


def test_an_override_of_the_stages_changes_every_stage() -> None:
    base = settings.load(PretrainConfig, CONFIGS / "demo" / "pretrain.yaml")
    row = Row("a", overrides=("stages.error_correction.inherit=false", "stages.codes.num_frames=2", "network.window=3"))
    content = changed_recipe(base, row)
    assert [stage["error_correction"]["inherit"] for stage in content["stages"]] == [False] * 3
    assert {source["num_frames"] for stage in content["stages"] for source in stage["codes"]} == {2}
    assert content["network"]["window"] == 3 and base.network.window is None
    assert settings.from_dict(PretrainConfig, content).stages[2].error_correction.inherit is False


@pytest.mark.parametrize("file", sorted((CONFIGS / "ablation").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_ablations_load_and_each_row_is_another_recipe(file: Path) -> None:
    if "rows:" not in file.read_text():
        return
    config = settings.load(AblationConfig, file)
    base = settings.load(PretrainConfig, ROOT / config.base)
    recipes = [settings.from_dict(PretrainConfig, changed_recipe(base, row)) for row in config.rows]
    assert len({json.dumps(settings.to_dict(recipe)) for recipe in recipes}) == len(recipes) >= 4
    full = next(recipe for row, recipe in zip(config.rows, recipes) if row.name == "inheritance")
    correction = full.stages[-1].error_correction
    assert (correction.p_max, correction.delta, correction.inherit, full.network.rope) == (
        0.25,
        0.01,
        True,
        "multiscale",
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--evaluation.prompts", "none.csv"], "none.csv"),
        (["--evaluation.continuation", "none.csv"], "none.csv"),
        (["--evaluation.guidance", "much"], "evaluation.guidance is 'much'"),
        (["--evaluation.windows", '["9:3"]'], "'9:3' is no range of frames"),
        (["--evaluation.i3d", "i3d.pt"], "belong together"),
        (["--evaluation.device", "gpu"], "no device 'gpu'"),
        (["--base", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_an_evaluation_that_could_not_run_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    file = _write(tmp_path)
    assert videoar.main(["ablate", "--config", str(file), "--out", str(tmp_path / "out"), *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("videoar ablate: ") and sentence in last
    assert not (tmp_path / "out").exists()


def test_rows_must_be_there() -> None:
    with pytest.raises(UserError, match="at least one"):
        AblationConfig(rows=())


def test_each_command_of_a_run_is_one_that_can_be_typed(tmp_path: Path) -> None:
    file = _write(tmp_path)
    words = ["--evaluation.continuation", "few.csv", "--evaluation.fvd_real", "videos", "--evaluation.i3d", "i3d.pt"]
    config = settings.load(AblationConfig, file, words)
    typed = [command for step in steps(config, tmp_path / "run", 3) for command in step.commands]
    verbs = []
    for command in typed:
        arguments = command[command.index("videoar") + 1 :]
        args, rest = videoar._parser().parse_known_args(list(arguments))
        assert not rest, arguments
        verbs.append(args.handler.__name__)
    expected = ["pretrain", "export", "generate", "evaluate_shapes", "evaluate_continuation", "evaluate_fvd"]
    assert verbs == expected and sum("30000" in command for command in typed) == 2
    fewer = settings.load(AblationConfig, file, ["--evaluation.windows", "[]"])
    assert [step.name for step in steps(fewer, tmp_path / "run", 3)] == ["pretrain"]
