"""The settings of an ablation: a pretraining recipe, the rows as changes of it, seeds, and how each run is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from evaluation.videos import frame_range
from inference.guidance import SCHEDULES
from pretrain.config import PretrainConfig
from tokenizer import settings
from tokenizer.errors import UserError, check_each


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: short, for folders; letters, digits, "-" and "_".
        title: for the table; empty: the name.
        overrides: what it changes of the base recipe, KEY=VALUE with a dotted key; `stages.` in a key means every stage.
        against: names of the earlier rows that it is compared with, seed by seed; empty: the row before.
        paper: what the paper measured for it, such as "FVD 96.04"; only shown.
    """

    name: str
    title: str = ""
    overrides: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    paper: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise UserError(f"the row '{self.name}' has no plain name: use letters, digits, '-' and '_'.")


@dataclass(frozen=True)
class AblationEvaluation:
    """How each run is measured beside its validation.

    Args:
        prompts: a prompt file for `videoar generate`, from the ablation's root.
        samples: videos a prompt.
        frames: length of the generated videos, 1+4n; longer than trained: the end shows drift.
        guidance, temperature: of the generated videos.
        device: where videos are generated and measured: cpu or cuda.
        windows: "FIRST:LAST" frames (in quotes) of the generated videos to score as moving shapes, each by itself; none: they are not.
        continuation: a table of real videos of moving shapes whose beginnings are continued and compared; null: none.
        continuation_clips: how many of them.
        given_frames: real frames that a continuation begins with, 1+4n.
        fvd_real: real videos for the Frechet video distance of the generated ones; null: it is not measured.
        fvd_shape: HEIGHTxWIDTHxFRAMES of the clips for it.
        i3d: the torchscript file of I3D for it.
    """

    prompts: str = "corpus/prompts.csv"
    samples: int = 2
    frames: int = 33
    guidance: str = "t2v"
    temperature: float = 1.0
    device: str = "cpu"
    windows: tuple[str, ...] = ("0:17", "16:33")
    continuation: str | None = None
    continuation_clips: int = 48
    given_frames: int = 5
    fvd_real: str | None = None
    fvd_shape: str = "128x128x17"
    i3d: str | None = None

    def __post_init__(self) -> None:
        check_each(self, ("samples", "continuation_clips"), lambda value: value >= 1, "be at least 1", "evaluation.")
        for window in self.windows:
            frame_range(window)
        if self.guidance not in SCHEDULES and not re.fullmatch(r"\d+(\.\d+)?", self.guidance):
            raise UserError(
                f"evaluation.guidance is '{self.guidance}': choose {', '.join(SCHEDULES)} or a number, in quotes."
            )
        if (self.fvd_real is None) != (self.i3d is None):
            raise UserError("evaluation.fvd_real and evaluation.i3d belong together: give both or none.")


@dataclass(frozen=True)
class AblationConfig:
    """An ablation.

    Args:
        rows: of the table, in their order; a row that changes nothing of the base has no overrides.
        root: the folder of tokenizer, codes and prompts (a demo's, for instance); relative paths of the base recipe start there, too.
        base: the recipe that the rows change, from the project's root; every stage needs `validation`.
        seeds: each row is trained with each of them: the same seed means the same initial weights, order of clips and draws.
        processes: of each pretraining, under torchrun.
        threads: OMP_NUM_THREADS of each process; null: as it is.
        at_once: runs at a time.
        evaluation: see its class.
    """

    rows: tuple[Row, ...]
    root: str = "runs/demo"
    base: str = "pretrain/configs/ablation/shapes-base.yaml"
    seeds: tuple[int, ...] = (0, 1, 2)
    processes: int = 1
    threads: int | None = 1
    at_once: int = 1
    evaluation: AblationEvaluation = field(default_factory=AblationEvaluation)

    def __post_init__(self) -> None:
        check_each(self, ("processes", "at_once"), lambda value: value >= 1, "be at least 1")
        names = [row.name for row in self.rows]
        for kind, values in (("rows", names), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"the ablation's {kind} are {list(values)}: give at least one, each once.")
        for number, row in enumerate(self.rows):
            for other in row.against:
                if other not in names[:number]:
                    raise UserError(
                        f"the row '{row.name}' is to be compared with '{other}': name rows above it, {names[:number]}."
                    )

    def compared(self, number: int) -> tuple[str, ...]:
        """Names of the rows that row `number` is compared with."""
        before = (self.rows[number - 1].name,) if number else ()
        return self.rows[number].against or before


def changed_recipe(base: PretrainConfig, row: Row) -> dict[str, Any]:
    """The base recipe with a row's overrides, as `settings.to_dict` writes it.

    Raises:
        UserError: an override is not KEY=VALUE, or its key is unknown.
    """
    content = settings.to_dict(base)
    for word in row.overrides:
        key, sign, text = word.partition("=")
        where = f"row '{row.name}' of the ablation"
        if not sign:
            raise UserError(f"{where} has the override '{word}': write KEY=VALUE.")
        settings.check_key(PretrainConfig, key, where)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{where}: the value of '{word}' is not valid YAML: quote it.") from error
        _set(content, key.split("."), value)
    return content


def _set(content: Any, words: list[str], value: Any) -> None:
    """Sets content[words[0]][words[1]]...; of a list in between, in every element."""
    if isinstance(content, list):
        for element in content:
            _set(element, words, value)
    elif len(words) == 1:
        content[words[0]] = value
    else:
        _set(content[words[0]], words[1:], value)
