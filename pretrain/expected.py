"""What a run expects of its codes, for planning it before they exist.

The training reads nothing of this: where a folder of codes is there, its manifest says what it holds, and `videoar plan` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizer.errors import UserError, check_each


@dataclass(frozen=True)
class ExpectedClips:
    """Clips of one shape that a folder of codes will hold.

    Args:
        variant: as of `videoar encode`, with one length: HEIGHTxWIDTHxFRAMES, or SIDExFRAMES with `aspect`.
        clips: how many.
        aspect: width over height of the videos, for SIDExFRAMES.
        raw_megabytes: of each clip's video file in the raw shards; 0 where another source's clips come from the same files.
    """

    variant: str
    clips: int
    aspect: float = 1.0
    raw_megabytes: float = 0.0

    def __post_init__(self) -> None:
        check_each(self, ("clips",), lambda value: value >= 1, "be at least 1", "expected ")
        check_each(self, ("aspect",), lambda value: 0 < value < 100, "be above 0", "expected ")
        check_each(self, ("raw_megabytes",), lambda value: value >= 0, "be at least 0", "expected ")
        if "+" in self.variant:
            raise UserError(
                f"the expected variant '{self.variant}' lists several lengths: give each an entry of its own."
            )


@dataclass(frozen=True)
class ExpectedCodes:
    """What all codes of a run will have in common.

    Args:
        tokenizer: recipe of the tokenizer (tokenizer/configs/), from this folder or the project's root; where the run's own tokenizer is
            there, that one counts.
        text_dim: width of the text features; "bytes" has 64.
        text_tokens: valid text tokens of a clip, on average.
        classes: how many, for a class-conditional network.
        latents: whether records hold latents.
        fps: frames a second of the clips.
    """

    tokenizer: str = "tokenizer/configs/ucf101.yaml"
    text_dim: int = 64
    text_tokens: int = 16
    classes: int = 0
    latents: bool = False
    fps: float = 8.0

    def __post_init__(self) -> None:
        check_each(self, ("text_dim", "text_tokens"), lambda value: value >= 1, "be at least 1", "expected.")
        check_each(self, ("classes",), lambda value: value >= 0, "be at least 0", "expected.")
        check_each(self, ("fps",), lambda value: value > 0, "be above 0", "expected.")
