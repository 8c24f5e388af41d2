"""Ablations: a recipe, some changes of it and some seeds, each trained and measured by the real commands, and one table of all.

videoar ablate --config pretrain/configs/ablation/shapes.yaml --out runs/ablation             goes on after a kill
videoar ablate --out runs/ablation --table                                                  what is there so far
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import yaml

from cluster.chains import Chain, run_chains
from cluster.local import videoar_command
from cluster.steps import Ledger, Step
from evaluation.ablation import TableRow, write_table
from evaluation.videos import read_table
from inference.prompt_file import read_prompts
from pretrain.ablation_config import AblationConfig, Row, changed_recipe
from pretrain.config import PretrainConfig
from pretrain.stages import make_plan
from tokenizer import settings
from tokenizer.device import check_device
from tokenizer.errors import UserError
from tokenizer.files import write_whole

HOUSE = Path(__file__).resolve().parents[1]
CONFIG = "config.yaml"


def ablate(config: AblationConfig, out: Path) -> None:
    """Runs what is not done yet, seed by seed, and writes `ablation.json`, `ablation.md` and `ablation.png` into `out` after each run.

    Rows and seeds may be added to a finished ablation; the runs that are there are kept.

    Args:
        config: the ablation.
        out: its folder.

    Raises:
        UserError: a row does not fit (before anything runs), `out` holds runs with other settings, or a run failed.
    """
    _check_evaluation(config)
    recipes = {(row.name, seed): recipe(config, row, seed, out) for seed in config.seeds for row in config.rows}
    for row in config.rows:
        _check(recipes[row.name, config.seeds[0]], row)
    texts = {key: yaml.safe_dump(settings.to_dict(one), sort_keys=False) for key, one in recipes.items()}
    for key, text in texts.items():
        file = run_folder(out, *key) / "pretrain.yaml"
        if file.exists() and file.read_text() != text:
            raise _other_settings(out, *key)
    chains = []
    for key, text in texts.items():
        folder = run_folder(out, *key)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "pretrain.yaml", text)
        chains.append(Chain(f"{key[0]}, seed {key[1]}", folder, tuple(steps(config, folder, key[1]))))
        if Ledger(folder).changed(chains[-1].steps):
            raise _other_settings(out, *key)
    settings.save(config, out / CONFIG)
    failed: list[str] = []

    def ended(chain: Chain, done: bool) -> None:
        failed.extend([] if done else [chain.name])
        _write(config, out)

    # leaves through `run_chains`, which ends the runs
    before = {name: signal.signal(name, lambda *_: sys.exit(143)) for name in (signal.SIGTERM, signal.SIGHUP)}
    try:
        run_chains(chains, config.at_once, ended)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(chains)} runs failed, the first: {failed[0]}; see the logs below {out / 'runs'} and run it again."
        )


def table(out: Path) -> str:
    """Writes the table of what is finished so far again, and returns it as Markdown.

    Raises:
        UserError: `out` holds no ablation.
    """
    if not (out / CONFIG).is_file():
        raise UserError(f"{out} holds no ablation ({CONFIG} is missing): name the folder that `videoar ablate` writes.")
    config = settings.load(AblationConfig, out / CONFIG)
    return _write(config, out)


def run_folder(out: Path, row: str, seed: int) -> Path:
    """Where a row's run with a seed is."""
    return out / "runs" / row / f"seed-{seed}"


def recipe(config: AblationConfig, row: Row, seed: int, out: Path) -> PretrainConfig:
    """A run's recipe.

    Raises:
        UserError: the base recipe is missing, or an override does not fit it.
    """
    base = settings.load(PretrainConfig, HOUSE / config.base)
    folder = run_folder(out, row.name, seed).resolve()
    content = changed_recipe(base, row) | {"seed": seed, "root": config.root, "out": str(folder / "pretrain")}
    try:
        return settings.from_dict(PretrainConfig, content)
    except UserError as error:
        raise UserError(f"row '{row.name}' of the ablation: {error}") from error


def _check_evaluation(config: AblationConfig) -> None:
    """Raises UserError if what the evaluation needs is not there: better before the training than after it."""
    measure, root = config.evaluation, Path(config.root)
    check_device(measure.device)
    if "generate" in step_names(config):
        read_prompts(root / measure.prompts)
    if measure.continuation is not None:
        read_table(root / measure.continuation)
    if measure.fvd_real is not None and measure.i3d is not None:
        for path in (root / measure.fvd_real, root / measure.i3d):
            if not path.exists():
                raise UserError(f"the ablation's evaluation needs {path}, which does not exist: correct its settings.")


def _check(one: PretrainConfig, row: Row) -> None:
    """Raises UserError if a run could not start, or would not say how good it is."""
    if one.stages[-1].validation is None or not one.validate_every:
        raise UserError(
            f"row '{row.name}' of the ablation has no validation: set `validate_every`, and `validation` in the last stage."
        )
    try:
        make_plan(one.rooted())
    except UserError as error:
        raise UserError(f"row '{row.name}' of the ablation: {error}") from error


def step_names(config: AblationConfig) -> tuple[str, ...]:
    """The steps of each run: those that nothing asks for are left out."""
    measure = config.evaluation
    videos = bool(measure.windows) or measure.fvd_real is not None
    asked = {"pretrain": True, "export": videos or measure.continuation is not None, "generate": videos}
    return tuple(name for name, wanted in (asked | {"evaluate": asked["export"]}).items() if wanted)


def steps(config: AblationConfig, folder: Path, seed: int) -> list[Step]:
    """A run's steps."""
    root, measure = Path(config.root), config.evaluation
    device = ("--device", measure.device)
    drawn = ("--seed", 10_000 * seed, "--guidance", measure.guidance, "--temperature", measure.temperature, *device)
    model, videos, scores = folder / "model", folder / "videos", folder / "scores"

    def videoar(*words: object, processes: int = 1) -> tuple[str, ...]:
        return tuple(videoar_command(*map(str, words), processes=processes))

    evaluations = [
        videoar(
            "evaluate", "shapes", "--videos", videos / "prompts.csv", "--frames", window,
            "--out", scores / f"shapes-{window.replace(':', '-')}.json",
        )
        for window in measure.windows
    ]  # fmt: skip
    if measure.continuation is not None:
        evaluations.append(
            videoar(
                "evaluate", "continuation", "--model", model, "--videos", root / measure.continuation,
                "--out", scores / "continuation.json", "--clips", measure.continuation_clips,
                "--given-frames", measure.given_frames, *drawn,
            )
        )  # fmt: skip
    if measure.fvd_real is not None and measure.i3d is not None:
        evaluations.append(
            videoar(
                "evaluate", "fvd", "--real", root / measure.fvd_real, "--generated", videos, "--i3d", root / measure.i3d,
                "--shape", measure.fvd_shape, "--seed", 0, "--out", scores / "fvd.json", *device,
            )
        )  # fmt: skip
    commands = {
        "pretrain": [videoar("pretrain", "--config", folder / "pretrain.yaml", processes=config.processes)],
        "export": [
            videoar("export", "--checkpoint", folder / "pretrain", "--out", model, "--sample", "no", "--verify")
        ],
        "generate": [
            videoar(
                "generate", "--model", model, "--prompt-file", root / measure.prompts, "--samples", measure.samples,
                "--frames", measure.frames, "--out", videos, *drawn,
            )
        ],
        "evaluate": evaluations,
    }  # fmt: skip
    inputs = {"pretrain": (folder / "pretrain.yaml",)}
    return [Step(name, tuple(commands[name]), inputs.get(name, ()), config.threads) for name in step_names(config)]


def _write(config: AblationConfig, out: Path) -> str:
    rows = [
        TableRow(
            row.name, row.title or row.name, row.overrides, row.paper, config.compared(number),
            {seed: run_folder(out, row.name, seed) for seed in config.seeds}, step_names(config),
        )
        for number, row in enumerate(config.rows)
    ]  # fmt: skip
    return write_table(rows, settings.to_dict(config.evaluation), out)


def _other_settings(out: Path, row: str, seed: int) -> UserError:
    return UserError(
        f"{out} holds an ablation with other settings (row '{row}', seed {seed}): delete it or name another folder with --out."
    )
