"""The one exception for mistakes that a user can mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """One sentence: what was wrong, where, and what to do. The command line prints it and exits with status 2."""


def check_each(settings: Any, names: Iterable[str], fits: Callable[[Any], bool], must: str, where: str = "") -> None:
    """Raises UserError for the first of these fields whose value does not fit.

    Args:
        settings: what holds the fields.
        names: the fields.
        fits: of a value; a comparison, so that NaN fits nothing.
        must: ends "it must ...".
        where: stands before the field's name.
    """
    for name in names:
        if not fits(value := getattr(settings, name)):
            raise UserError(f"{where}{name} is {value}: it must {must}.")
