"""Output folders that are whole or absent: written beside their final name, then renamed with a receipt inside."""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tokenizer.errors import UserError

RECEIPT = "receipt.json"


def read_receipt(folder: str | Path) -> dict[str, Any] | None:
    """The receipt of a finished folder, or None where there is none: such a folder is not whole."""
    try:
        return json.loads((Path(folder) / RECEIPT).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def finished(out: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The receipt of `out` if it was finished with these arguments, None if `out` has still to be written.

    Raises:
        UserError: `out` holds something else, which is never overwritten.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    receipt = read_receipt(out)
    if receipt is None:
        raise UserError(
            f"{out} exists and was not written by this command: move it away or name another output folder."
        )
    if receipt["arguments"] == json.loads(json.dumps(arguments)):
        return receipt
    differing = sorted(
        key for key in {*receipt["arguments"], *arguments} if receipt["arguments"].get(key) != arguments.get(key)
    )
    raise UserError(
        f"{out} was written with other arguments ({', '.join(differing)}): delete it or name another output folder."
    )


@contextmanager
def new_folder(out: Path, arguments: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Gives a temporary folder and an empty receipt to fill; on success the folder becomes `out`, on failure it goes.

    Args:
        out: the final name, absent or an empty folder.
        arguments: what `finished` compares in a later run; JSON values.
    """
    temporary = temporary_folder(out)
    receipt: dict[str, Any] = {}
    try:
        yield temporary, receipt
        with open(temporary / RECEIPT, "w") as file:
            json.dump({"arguments": arguments, **receipt}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_folder(out: Path) -> Path:
    """Makes a folder beside `out` to write to and rename; those that killed processes of this machine have left there go."""
    prefix = f"{out.name}.tmp.{socket.gethostname()}."
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        if not psutil.pid_exists(int(left.name[len(prefix) :].split(".")[0])):  # killed before it could clean up
            shutil.rmtree(left, ignore_errors=True)
    temporary = out.with_name(f"{prefix}{os.getpid()}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    return temporary
