"""The small pieces of HTML that every section of a report is made of."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np

from evaluation.media import data_image, data_video


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its title, and all of its HTML."""

    anchor: str
    title: str
    html: str


def section(anchor: str, title: str, body: str) -> Section:
    """A section with its heading."""
    return Section(anchor, title, f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>')


def missing(text: str) -> str:
    """What stands where a part has not been made."""
    return f'<div class="missing"><span class="chip none">not run</span> {escape(text)}</div>'


def verdict(met: bool | None) -> str:
    """A chip that says whether a target is met."""
    kind, text = {True: ("yes", "met"), False: ("no", "not met"), None: ("none", "not run")}[met]
    return f'<span class="chip {kind}">{text}</span>'


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "–" if share is None else f"{100 * share:.1f}<small>%</small>"


def number(value: float | None, digits: int, unit: str) -> str:
    """A value with its unit."""
    return "–" if value is None else f"{value:.{digits}f}<small> {unit}</small>"


def video(frames: np.ndarray, fps: float, label: str) -> str:
    """A clip, uint8 [T, H, W, 3], that plays by itself, again and again."""
    return (
        f'<video src="{data_video(frames, fps)}" width="{frames.shape[2]}" height="{frames.shape[1]}" '
        f'aria-label="{escape(label)}" autoplay loop muted playsinline controls></video>'
    )


def image(pixels: np.ndarray, label: str) -> str:
    """A picture, uint8 [H, W, 3]."""
    return (
        f'<img src="{data_image(pixels)}" width="{pixels.shape[1]}" height="{pixels.shape[0]}" alt="{escape(label)}">'
    )
