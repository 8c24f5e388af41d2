"""What a generated file says about itself: JSON in an mp4's comment, a GIF's comment, or a PNG's text chunk.

videoar info clip.mp4
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
from PIL import Image

from tokenizer.errors import UserError

KEY = "videoar"
"""Of the JSON object that holds everything, and of the PNG's text chunk."""
LARGEST = 4 * 10**6
"""Characters of JSON that are read: a damaged or foreign file must not fill the memory."""


def to_text(metadata: Mapping[str, Any]) -> str:
    """As ASCII, which every container takes as it is."""
    return json.dumps({KEY: metadata}, sort_keys=True)


def read_metadata(file: str | Path) -> dict[str, Any]:
    """What `tokenizer.video_file.write_video` embedded.

    Args:
        file: an .mp4, .gif, .webp or .png, or a folder of frames.

    Raises:
        UserError: the file is missing or unreadable, or holds no such metadata.
    """
    file = Path(file)
    if file.is_dir():
        frames = sorted(file.glob("*.png"))
        if not frames:
            raise UserError(f"{file} holds no .png frames: name a file or folder that `videoar generate` wrote.")
        file = frames[0]
    if not file.is_file():
        raise UserError(f"the file {file} does not exist: check the path.")
    text = _stored(file)
    if text is not None and len(text) <= LARGEST:
        try:
            content = json.loads(text)
            if isinstance(content, dict) and isinstance(content.get(KEY), dict):
                return content[KEY]
        except (ValueError, RecursionError):  # a comment of another program
            pass
    raise UserError(f"{file} holds no metadata of videoar: name a file that `videoar generate` wrote.")


def _stored(file: Path) -> str | None:
    try:
        if file.suffix.lower() == ".mp4":
            with av.open(str(file)) as container:
                return container.metadata.get("comment")
        with Image.open(file) as image:
            text = image.info.get({"GIF": "comment", "WEBP": "xmp"}.get(image.format or "", KEY))
            return text.decode("ascii", "replace") if isinstance(text, bytes) else text
    except (av.FFmpegError, OSError, ValueError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file} can't be read ({reason}): name an intact .mp4, .gif or .png.") from error
