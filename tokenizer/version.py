"""The program's version, for what it writes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def program_version() -> str:
    """Such as "videoar 0.1.0"; without a number where the package is not installed."""
    try:
        return f"videoar {version('videoar')}"
    except PackageNotFoundError:
        return "videoar"
