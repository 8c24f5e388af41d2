"""One index over the parts of a folder of shards."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizer.files import write_whole

INDEX = "index.json"


def merge_indexes(folder: Path, parts: Iterable[str]) -> list[dict[str, Any]]:
    """Writes the folder's `index.json`.

    streaming's own `merge_index` takes paths for URLs: what stands behind a `#` or `?` is lost, and relative paths are copied to places
    where a later call finds them again.

    Args:
        folder: that holds the parts.
        parts: folders in it that `MDSWriter` has finished, in their order.

    Returns:
        The entries of all shards.
    """
    shards: list[dict[str, Any]] = []
    for part in parts:
        for shard in json.loads((folder / part / INDEX).read_text())["shards"]:
            for data in (shard["raw_data"], shard["zip_data"]):
                if data is not None:
                    data["basename"] = f"{part}/{data['basename']}"
            shards.append(shard)
    write_whole(folder / INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    return shards
