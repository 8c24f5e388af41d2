"""What stands before every request: limits on its body while that is read, pages of other sites, the request counter."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.serving.errors import ApiError
from inference.serving.metrics import Metrics

DRAIN_SECONDS = 2.0
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy",
     b"default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; form-action 'none'"),
]  # fmt: skip


class Guard:
    """ASGI middleware.

    Args:
        app: what answers.
        metrics: where requests are counted.
        max_bytes: of a body with a file.
        max_plain_bytes: of any other body.
        seconds: that a body may take.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_bytes: int, max_plain_bytes: int, seconds: float):
        self.app, self.metrics = app, metrics
        self.max_bytes, self.max_plain_bytes, self.seconds = max_bytes, max_plain_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = _Exchange(scope, receive, send, self)
        try:
            refusal = exchange.refusal()
            if refusal is not None:
                await refusal.response()(scope, exchange.receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)
        finally:
            if not exchange.status:  # it crashed, which is answered further out
                self.count(scope, 500)

    def count(self, scope: Scope, status: int) -> None:
        """Counts a request; before its client can see the answer."""
        # never the client's own words: labels are kept for ever
        path = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        self.metrics.requests.labels(method, path, str(status)).inc()


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, guard: Guard):
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        # the limit goes by the type: were there two, the body could be read as the other one
        self.types = sum(name == b"content-type" for name, _ in scope["headers"])
        self.scope, self.path, self._receive, self._send, self.guard = scope, scope["path"], receive, send, guard
        form = self.headers.get("content-type", "").lower().startswith("multipart/form-data")
        self.limit = guard.max_bytes if form else guard.max_plain_bytes
        self.read, self.whole, self.status = 0, False, 0
        self.deadline = asyncio.get_running_loop().time() + guard.seconds

    def refusal(self) -> ApiError | None:
        """What can be said before anything is read."""
        if self.types > 1:
            return ApiError(400, "repeated_header", "the header Content-Type was sent more than once: send it once.")
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length[:18]) > self.limit:
            return self._too_large()
        # a page of another site must not use a visitor's browser to reach a server that only this machine can
        if self.path.startswith("/v1/") and self.headers.get("sec-fetch-site") == "cross-site":
            return ApiError(
                403, "cross_site", "pages of other sites may not use this server: call it from a program instead."
            )
        return None

    async def receive(self) -> Message:
        """The body's next part, within the limits."""
        if self.whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "too_slow", f"the request took longer than {self.guard.seconds:g} s to arrive: send it faster."
            ) from None
        self._note(message)
        if self.read > self.limit:
            raise self._too_large()
        return message

    def _note(self, message: Message) -> None:
        self.read += len(message.get("body", b""))
        self.whole = message["type"] != "http.request" or not message.get("more_body", False)

    async def send(self, message: Message) -> None:
        """The answer. It is whole for the client before the rest of the body is read and dropped: a connection that is closed on a client
        that still sends loses the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.guard.count(self.scope, self.status)
            # without this word uvicorn reads on for as long as the client sends
            close = [(b"connection", b"close")] if not self.whole and self._sends() else []
            message = {**message, "headers": [*message["headers"], *_HEADERS, *close]}
        if message["type"] != "http.response.body" or message.get("more_body") or self.whole or not self._sends():
            return await self._send(message)
        await self._send({**message, "more_body": True})
        await self._drain()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _sends(self) -> bool:
        return self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.whole and self.read < 4 * self.guard.max_bytes:
                    self._note(await self._receive())
        except TimeoutError:
            pass

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the request is too large: send at most {self.limit} bytes.")
