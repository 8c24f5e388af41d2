"""VBench's total, quality and semantic score out of the scores of its 16 dimensions, and the tables that show them.

Weights, ranges and the formula are facts of the public benchmark: Huang et al., "VBench: Comprehensive Benchmark Suite for Video Generative
Models" (CVPR 2024), as published in scripts/constant.py and scripts/cal_final_score.py of github.com/Vchitect/VBench (Apache-2.0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evaluation.tables import markdown_table
from tokenizer.errors import UserError


@dataclass(frozen=True)
class Dimension:
    """One of the 16.

    Attributes:
        least, most: the raw scores that become 0 and 1.
        weight: within the quality or the semantic score.
        semantic: whether it is about the prompt, or about the picture's and motion's quality.
    """

    least: float
    most: float
    weight: float = 1.0
    semantic: bool = False


DIMENSIONS = {
    "subject_consistency": Dimension(0.1462, 1.0),
    "background_consistency": Dimension(0.2615, 1.0),
    "temporal_flickering": Dimension(0.6293, 1.0),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "dynamic_degree": Dimension(0.0, 1.0, weight=0.5),
    "aesthetic_quality": Dimension(0.0, 1.0),
    "imaging_quality": Dimension(0.0, 1.0),
    "object_class": Dimension(0.0, 1.0, semantic=True),
    "multiple_objects": Dimension(0.0, 1.0, semantic=True),
    "human_action": Dimension(0.0, 1.0, semantic=True),
    "color": Dimension(0.0, 1.0, semantic=True),
    "spatial_relationship": Dimension(0.0, 1.0, semantic=True),
    "scene": Dimension(0.0, 0.8222, semantic=True),
    "appearance_style": Dimension(0.0009, 0.2855, semantic=True),
    "temporal_style": Dimension(0.0, 0.364, semantic=True),
    "overall_consistency": Dimension(0.0, 0.364, semantic=True),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
PAPER = {"total": 0.8174, "quality": 0.8288, "semantic": 0.7715}
"""VideoAR-4B in the paper's Table 1."""


def summarise(scores: Mapping[str, float]) -> dict[str, float | None]:
    """{"total", "quality", "semantic"}, 0 to 1; None where a dimension that it needs is missing.

    VBench's own script counts a missing dimension as 0; a table should rather say that it was not measured.

    Args:
        scores: raw, by dimension.
    """
    quality, semantic = (_mean(scores, wanted) for wanted in (False, True))
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {"total": total, "quality": quality, "semantic": semantic}


def _mean(scores: Mapping[str, float], semantic: bool) -> float | None:
    own = {name: one for name, one in DIMENSIONS.items() if one.semantic == semantic}
    if not own.keys() <= scores.keys():
        return None
    summed = sum(one.weight * (scores[name] - one.least) / (one.most - one.least) for name, one in own.items())
    return summed / sum(one.weight for one in own.values())


def read_results(folder: Path) -> dict[str, float]:
    """Scores by dimension of the *_eval_results.json files that VBench has written to a folder.

    Raises:
        UserError: a file is none of VBench's.
    """
    scores: dict[str, float] = {}
    for file in sorted(folder.glob("*_eval_results.json")):
        try:
            for name, result in json.loads(file.read_text(encoding="utf-8")).items():
                scores[name] = float(result[0])  # the score, then each video's
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{file} is no result of VBench ({error!r}): delete it and measure again.") from error
    unknown = sorted(scores.keys() - DIMENSIONS.keys())
    if unknown:
        raise UserError(f"{folder} has scores of '{unknown[0]}', which VBench's table does not know: take them away.")
    return scores


def tables(name: str, scores: Mapping[str, float]) -> str:
    """Markdown: the three scores beside the paper's, and every dimension, in per cent."""
    summary = summarise(scores)
    head = markdown_table(
        ("model", "total", "quality", "semantic"),
        [
            (f"{title}", *(_percent(row[key]) for key in summary))
            for title, row in (("VideoAR-4B (paper)", PAPER), (f"{name} (measured)", summary))
        ],
    )
    rows = [
        (one.replace("_", " "), "semantic" if DIMENSIONS[one].semantic else "quality", _percent(scores.get(one)))
        for one in DIMENSIONS
    ]
    return head + "\n" + markdown_table(("dimension", "part of", "score"), rows)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f}"
