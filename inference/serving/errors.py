"""What clients are told when something is wrong: {"error": {"message", "type", "code"}}."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

log = logging.getLogger("videoar.serve")


class ErrorDetail(BaseModel):
    """One sentence that says what to do, a kind, and a word for programs."""

    message: str
    type: str
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer to the client.

    Args:
        status: of HTTP.
        code: a word for programs.
        message: one sentence that says what to do.
        headers: of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers

    def response(self) -> JSONResponse:
        """The answer."""
        detail = {"message": self.message, "type": _type(self.status), "code": self.code}
        return JSONResponse({"error": detail}, self.status, self.headers)


def refused(code: str, message: str) -> ApiError:
    """422: the request can't be carried out as it is."""
    return ApiError(422, code, message)


DISK_FULL = ("disk_full", "the server's disk is full: try again later, or tell its owner.")
"""Code and message."""


def disk_is_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of space (FFmpeg's errors name the number, too)."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def is_the_servers(error: BaseException) -> bool:
    """Whether the server's means are at an end, whatever the client sent."""
    return isinstance(error, MemoryError) or disk_is_full(error)


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")


async def on_api_error(_: Request, error: Exception) -> Response:
    """FastAPI's handler of `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """FastAPI's handler of its own errors: unknown paths and methods, bodies that are no form."""
    assert isinstance(error, HTTPException)
    known = {
        404: ("not_found", "there is nothing at this path: see /openapi.json for what there is."),
        405: ("method_not_allowed", "this path does not take that method: see /openapi.json for those it takes."),
    }
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the framework names those of the first route of this path only
        paths = request.app.openapi()["paths"]
        known_methods = paths.get(getattr(request.scope.get("route"), "path", None), {"get": None})
        headers["allow"] = ", ".join(sorted(method.upper() for method in known_methods))
    code, message = known.get(
        error.status_code,
        ("bad_request", f"the request can't be read ({error.detail}): send it as /openapi.json says."),
    )
    return ApiError(error.status_code, code, message, headers).response()


async def on_invalid(_: Request, error: Exception) -> Response:
    """FastAPI's handler of parameters that do not fit."""
    assert isinstance(error, RequestValidationError)
    return refused(*first_problem(error.errors())).response()


async def on_vanished(_: Request, error: Exception) -> Response:
    """A client that went away while it sent its request; nobody reads this answer."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=400)


async def on_os_error(request: Request, error: Exception) -> Response:
    """A full disk, which is neither the client's fault nor a defect; other errors of the system are `on_crash`'s."""
    if not disk_is_full(error):
        raise error
    log.error("%s %s: the disk is full", request.method, request.url.path, exc_info=error)
    return ApiError(507, *DISK_FULL).response()


async def on_no_memory(request: Request, error: Exception) -> Response:
    """Too little memory for what was asked just now."""
    log.error("%s %s: too little memory", request.method, request.url.path, exc_info=error)
    message = "the server has too little memory for this now: try again later, or send something smaller."
    return ApiError(503, "out_of_memory", message, {"Retry-After": "60"}).response()


async def on_crash(_: Request, error: Exception) -> Response:
    """Anything else; the server logs it and lives on."""
    return ApiError(
        500, "server_error", "the server failed at this request: tell its owner, whose log says why."
    ).response()


def first_problem(problems: Sequence[Any], meanings: Mapping[str, str | None] | None = None) -> tuple[str, str]:
    """Code and message for the first of pydantic's error descriptions.

    Args:
        problems: the descriptions.
        meanings: what fields are for.
    """
    problem = problems[0]
    where = ".".join(str(part) for part in problem["loc"] if part not in ("query", "path", "body") and _is_field(part))
    if problem["type"] == "extra_forbidden":
        name = str(problem["loc"][-1])[:100]
        return "unknown_field", f"the field '{name}' is unknown: leave it out, or see /openapi.json for the names."
    if problem["type"] == "missing":
        return "missing_field", f"the field '{where[:100]}' is missing: give it."
    reason = problem["msg"][:1].lower() + problem["msg"][1:]
    what = f"the field '{where[:100]}' does not fit" if where else "the request does not fit"
    meaning = (meanings or {}).get(where)
    return "invalid_value", f"{what}: {reason}" + (f" (it means: {meaning.rstrip('.')})." if meaning else ".")


def _is_field(part: object) -> bool:
    # pydantic names the tried members of a union, such as function-before[...] or constrained-str
    return isinstance(part, str) and part.isidentifier() and part not in ("float", "int", "str", "literal")
