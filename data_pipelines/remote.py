"""Files of remote storage, fetched whole and within a limit of time, or not at all.

The clients are streaming's (`CloudDownloader`), one for every kind of URL. What they lack is a bound. The one for S3 sets
botocore's `read_timeout` only: three attempts of botocore, five of s3transfer around them, 60 s to connect in each, and no end
at all with a server that sends a byte now and then; the one for SFTP has no timeout. Neither environment variables
(AWS_MAX_ATTEMPTS) nor the constructor change that for all of them. So each attempt runs in a thread of its own, which is left
behind when the time is up: it writes under a name that nobody reads, and as a daemon it does not keep the process alive.
`read_timeout` is kept so short that a connection that died without a word is tried anew while there is time.
"""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from glob import escape
from http import HTTPStatus
from http.client import responses
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import botocore.exceptions as aws
import filelock
from streaming.base.storage import CloudDownloader

from tokenizer.errors import Fault, UserError
from tokenizer.files import sync

TIMEOUT = 600.0
"""Seconds that fetching may take, where nothing else is asked for."""
SILENCE = 60.0
"""Seconds without a byte after which a connection is given up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between attempts; each pause is twice the one before."""
PART = ".part"
FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITTEN = FULL | {errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG}
"""Errors of the disk, not of the network."""
FINAL = (
    ValueError, TypeError, ImportError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError,
    aws.NoCredentialsError, aws.PartialCredentialsError, aws.ParamValidationError,
)  # fmt: skip
"""What no later attempt would mend."""
LATER = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
"""Of the answers that refuse, those that a later attempt may not get."""


class TimeLimit:
    """What is left of so many seconds that began with this object."""

    def __init__(self, seconds: float):
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; 0 if there are none."""
        return max(0.0, self._end - time.monotonic())


@contextmanager
def locked(file: Path, limit: TimeLimit) -> Iterator[None]:
    """One process or thread at a time fetches a file; the lock ends with its process.

    Raises:
        Fault: somebody held it until the limit.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file.with_name(f".{file.name}.lock"))
    try:
        lock.acquire(timeout=limit.left())
    except filelock.Timeout as error:
        raise Fault(
            f"another process was still fetching {file} after {limit.seconds:g} s: see what it says, or allow more time (data_timeout)."
        ) from error
    try:
        yield
    finally:
        lock.release()


class Remote:
    """A folder of a remote storage, or a local one that is treated like it.

    Threads and processes may share the object; none of them ever shares a connection.

    Args:
        url: what streaming can download from, or a local path.
    """

    def __init__(self, url: str | Path):
        self.url = str(url).rstrip("/")
        self._idle: list[tuple[int, float, CloudDownloader]] = []  # process, read timeout, client

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_idle": []}

    def fetch(self, name: str, file: Path, limit: TimeLimit, fault: Callable[[Path], str | None]) -> None:
        """Downloads a file, which takes its name when it is whole; to be called under its `locked`.

        Args:
            name: in the folder.
            file: where to.
            limit: of the download and its retries, with growing pauses between them.
            fault: says what is wrong with a downloaded file, or None.

        Raises:
            UserError: it can't be had or is damaged (it names the URL), or the disk is full (it names the folder); a Fault where it
                could not be had in time.
        """
        url = f"{self.url}/{name}"
        _remove(file.parent, f".{escape(file.name)}.*{PART}*")  # what a process that was killed has left
        part = file.with_name(f".{file.name}.{uuid.uuid4().hex}{PART}")
        try:
            self._download(url, part, limit)
            if (wrong := fault(part)) is not None:
                raise UserError(f"{url} is damaged ({wrong}): write or upload it again.")
            sync(part)
            os.replace(part, file)
        except OSError as error:
            raise _not_stored(error, url, file.parent) from error
        finally:
            _remove(file.parent, f"{escape(part.name)}*")  # the clients add endings of their own while they write

    def fetch_index(self, name: str, cache: Path, limit: TimeLimit) -> None:
        """Downloads a JSON file that says what a set of shards holds: always anew, so that a cache does not answer for another set.

        Args:
            name: in the folder.
            cache: the local folder.
            limit: as in `fetch`.

        Raises:
            UserError: as in `fetch`, or the cache has been filled from another set.
        """
        file, known = cache / name, None

        def fault(part: Path) -> str | None:
            content = part.read_bytes()
            try:
                json.loads(content)
            except ValueError as error:
                return short(error)
            if known is not None and content != known:
                raise UserError(
                    f"the cache {cache} holds other codes or clips than {self.url}: empty it or name another cache folder."
                )
            return None

        with storing(f"{self.url}/{name}", cache), locked(file, limit):
            known = file.read_bytes() if file.is_file() else None
            self.fetch(name, file, limit, fault)

    def _download(self, url: str, part: Path, limit: TimeLimit) -> None:
        failure = "no answer"
        for attempt in count():
            if not limit.left():
                break
            result: Future[None] = Future()
            Thread(target=self._attempt, args=(url, part, limit, result), daemon=True).start()
            try:
                return result.result(timeout=limit.left())
            except Exception as error:
                if not result.done():  # the time is up
                    break
                if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
                    raise
                failure = short(error)
                status = _status(error)
                if status is not None and 400 <= status < 500 and status not in LATER:
                    raise UserError(
                        f"{url} can't be fetched, the storage answers {status} {responses.get(status, '')}: "
                        "check the address and your credentials, and that it has been written."
                    ) from error
                if isinstance(error, FINAL):
                    raise UserError(
                        f"{url} can't be fetched ({failure}): check the address and your credentials, and that it has been written."
                    ) from error
            if not attempt:
                print(f"{url}: {failure}; tried again for up to {limit.left():.0f} s", file=sys.stderr, flush=True)
            time.sleep(_pause(attempt, limit.left()))
        raise Fault(
            f"{url} could not be fetched within {limit.seconds:g} s ({failure}): check that the storage is up and the address right, "
            "or allow more time (data_timeout)."
        )

    def _attempt(self, url: str, part: Path, limit: TimeLimit, result: Future[None]) -> None:
        """One download. Its client is its own while it lasts: a connection must be shared neither by threads nor with a process that was
        forked. Making one takes some 0.1 s of computing."""
        kind, client = (os.getpid(), min(SILENCE, limit.seconds / 4)), None
        try:
            while client is None and self._idle:
                with suppress(IndexError):  # another thread was faster
                    *other, client = self._idle.pop()
                    client = client if tuple(other) == kind else None
            client = client or CloudDownloader.get(url)
            client.download(url, str(part), kind[1])
            self._idle.append((*kind, client))
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)


@contextmanager
def storing(url: str, folder: Path) -> Iterator[None]:
    """Says which folder can't be written while `url` is fetched."""
    try:
        yield
    except OSError as error:
        raise _not_stored(error, url, folder) from error


def short(error: BaseException) -> str:
    """An error in a few words of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(". ")


def _not_stored(error: OSError, url: str, folder: Path) -> UserError:
    """What to tell when a cache can't be written."""
    if error.errno in FULL:
        return UserError(
            f"the disk of the cache {folder} is full ({url} does not fit): make room or name another cache folder; "
            "what it holds already is kept."
        )
    return UserError(
        f"{url} can't be kept in {folder} ({short(error)}): make that folder writable or name another cache."
    )


def _pause(attempt: int, left: float) -> float:
    """Seconds between an attempt, counted from 0, and the next one."""
    pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.8, 1.2)  # not all processes at once
    return min(pause, max(FIRST_PAUSE, left / 2), left)  # an outage may end late: time must be left for a last attempt


def _remove(folder: Path, pattern: str) -> None:
    for left in folder.glob(pattern):
        left.unlink(missing_ok=True)


def _status(error: BaseException) -> int | None:
    """What a server has answered in place of the file; where that stands differs between the clients."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    told = [getattr(error, name, None) for name in ("code", "status_code", "status")]  # Google, Azure, OCI
    told.append(getattr(response, "status_code", None))  # requests
    return next((status for status in told if isinstance(status, int)), None)
