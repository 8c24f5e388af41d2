"""VBench's prompt suite, from its VBench_full_info.json or its plain lists, and the names that it wants videos to have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.vbench_scores import DIMENSIONS
from tokenizer.errors import UserError

SHARED = {
    "subject_consistency": ("dynamic_degree", "motion_smoothness"),
    "overall_consistency": ("aesthetic_quality", "imaging_quality"),
    "scene": ("background_consistency",),
}
"""Plain lists that more than one dimension is measured on, as VBench_full_info.json has them."""


@dataclass(frozen=True)
class VBenchPrompt:
    """One prompt.

    Attributes:
        text: as VBench spells it.
        dimensions: that are measured on it.
        index: its place among the suite's different prompts, which its seeds follow from.
    """

    text: str
    dimensions: tuple[str, ...]
    index: int

    def file_name(self, sample: int) -> str:
        """VBench looks for exactly this name in its folder of videos: the prompt as it is, with nothing replaced."""
        return f"{self.text}-{sample}.mp4"


def read_suite(source: Path) -> list[VBenchPrompt]:
    """The prompts, each once.

    Args:
        source: VBench_full_info.json; a list such as prompts_per_dimension/color.txt; or the folder prompts_per_dimension.

    Raises:
        UserError: it is missing or none of these, or a prompt can't be a file's name.
    """
    if source.is_dir():
        lists = [file for file in sorted(source.glob("*.txt")) if file.stem in DIMENSIONS]
        if not lists:
            raise UserError(f"{source} holds no list of a dimension, such as color.txt: name prompts_per_dimension.")
        listed = [entry for file in lists for entry in _plain(file)]
    elif not source.is_file():
        raise UserError(f"the prompts {source} do not exist: name VBench_full_info.json or a list of VBench.")
    else:
        listed = _full_info(source) if source.suffix.lower() == ".json" else _plain(source)
    together: dict[str, list[str]] = {}
    for text, dimensions in listed:
        together.setdefault(text, []).extend(dimensions)
    if not together:
        raise UserError(f"{source} holds no prompts: name VBench_full_info.json or a list of VBench.")
    for text in together:
        if "/" in text or "\0" in text or text.startswith(".") or len(f"{text}-00.mp4".encode()) > 255:
            raise UserError(
                f"the prompt '{text[:60]}' of {source} can't be a file's name, which VBench finds videos by: take it out of the list."
            )
    return [
        VBenchPrompt(text, tuple(name for name in DIMENSIONS if name in dimensions), index)
        for index, (text, dimensions) in enumerate(together.items())
    ]


def of_dimensions(suite: Sequence[VBenchPrompt], wanted: Sequence[str]) -> list[VBenchPrompt]:
    """Those that some of the dimensions are measured on.

    Raises:
        UserError: a dimension that VBench does not have, or that no prompt has.
    """
    for name in wanted:
        if name not in DIMENSIONS:
            raise UserError(f"VBench has no dimension '{name}': choose among {', '.join(DIMENSIONS)}.")
        if not any(name in prompt.dimensions for prompt in suite):
            raise UserError(f"no prompt of the suite is for '{name}': give the suite that has them.")
    return [prompt for prompt in suite if set(prompt.dimensions) & set(wanted)]


def _full_info(file: Path) -> list[tuple[str, list[str]]]:
    try:
        listed = [(entry["prompt_en"], entry["dimension"]) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not in the layout of VBench_full_info.json ({error!r}): name VBench's own."
        ) from error
    for text, dimensions in listed:
        if not isinstance(text, str) or not text.strip() or not isinstance(dimensions, list):
            raise UserError(f"{file} has the prompt {str(text)[:60]!r} of {dimensions}: name VBench's own file.")
        unknown = [name for name in dimensions if name not in DIMENSIONS]
        if unknown:
            raise UserError(
                f"{file} has the dimension {unknown[0]!r}, which is none of VBench's 16: name VBench's own file."
            )
    return listed


def _plain(file: Path) -> list[tuple[str, list[str]]]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8 ({error}): name a list of VBench.") from error
    dimensions = [file.stem, *SHARED.get(file.stem, ())] if file.stem in DIMENSIONS else []
    return [(line, dimensions) for line in lines if line]
