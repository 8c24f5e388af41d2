"""`videoar serve`: from an exported model to a listening server that ends cleanly."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inference.serving.config import ServeConfig
from tokenizer.errors import UserError


def serve(model: Path, device: str, config: ServeConfig, loading: Mapping[str, Any] | None = None) -> None:
    """Serves a model until SIGINT or SIGTERM.

    Args:
        model: the folder that `videoar export` wrote.
        device: where it runs.
        config: address and limits.
        loading: further arguments of `VideoARPipeline.from_pretrained`, such as its dtype.

    Raises:
        UserError: a package is missing, the address can't be had, the key is empty, or the model can't be read.
    """
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn

        from inference.serving.app import create_app
        from inference.serving.service import VideoService
    except ModuleNotFoundError as error:
        raise UserError(
            f"`videoar serve` needs the package {error.name}: install fastapi, uvicorn, python-multipart and prometheus-client."
        ) from error
    from inference.pipeline import VideoARPipeline

    key = os.environ.get(config.api_key_variable)
    if key is not None and (not key.isascii() or not key.strip() or key != key.strip()):
        raise UserError(
            f"the environment variable {config.api_key_variable} holds no usable key: put ASCII letters into it, or unset it."
        )
    listener = bound_socket(config)  # before the model is loaded, which may take long
    with listener:
        pipe = VideoARPipeline.from_pretrained(model, device, **(loading or {}))
        service = VideoService(pipe, model.resolve().name, config, key)
        try:
            options = uvicorn.Config(
                create_app(service), log_level="warning", access_log=False, http="h11", ws="none", lifespan="off",
                server_header=False, timeout_graceful_shutdown=5, loop="asyncio",
            )  # fmt: skip
            _run(uvicorn.Server(options), service, listener, key is not None)
        finally:
            service.close()
    print("videoar serve: ended", flush=True)


def bound_socket(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sends small answers at once only where the protocol is named; else each waits 40 ms for the client's acknowledgement
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"the server can't listen at {config.host}, port {config.port} ({error.strerror or error}): choose another --host or --port."
        ) from error
    return listener


def _run(server, service, listener: socket.socket, locked: bool) -> None:
    startup, shutdown = server.startup, server.shutdown

    async def started(sockets=None) -> None:
        service.start()
        await startup(sockets=sockets)
        host, port = listener.getsockname()[:2]
        print(f"videoar serve: {service.name} at http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
        if not locked and host not in ("127.0.0.1", "::1"):
            print(
                f"videoar serve: anyone who reaches {host} may use it: set {service.config.api_key_variable} to ask for a key",
                file=sys.stderr,
                flush=True,
            )

    async def ending(sockets=None) -> None:
        service.store.stop()  # else those who watch a job would keep the server waiting
        await shutdown(sockets=sockets)

    server.startup, server.shutdown = started, ending
    # uvicorn raises the signal that ended it once more, for whom it was before: the folder has still to be removed
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
