"""One temporary folder for all that a test session and the processes it starts leave behind; it goes when the session ends."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

_OWN: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Set before xdist starts its workers, which inherit it, as does every process that a test starts."""
    if not hasattr(config, "workerinput"):
        # short: sockets in it have paths of at most 107 characters
        _OWN.append(tempfile.mkdtemp(prefix="vt-"))
        os.environ["TMPDIR"] = tempfile.tempdir = _OWN[0]


def pytest_unconfigure(config: pytest.Config) -> None:
    """The session that made it removes it; pytest's own folders of failed tests go with it."""
    if not hasattr(config, "workerinput") and _OWN:
        shutil.rmtree(_OWN.pop(), ignore_errors=True)
