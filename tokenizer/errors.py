"""The exceptions that a user reads as one sentence: mistakes, and faults that a later start may not meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """One sentence: what was wrong, where, and what to do. The command line prints it and exits with its status.

    Attributes:
        status: 2: nothing but another setting mends it, so that a scheduler need not try again.
    """

    status = 2


class Fault(UserError):
    """No mistake: a process was lost, data came late, a storage does not answer. Status 1: a scheduler tries again, a few times."""

    status = 1


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
