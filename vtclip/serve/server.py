# SPDX-License-Identifier: Apache-2.0
"""The socket and the process around the application."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vtclip.names import option
from vtclip.serve.app import build_app
from vtclip.serve.guard import LOCAL, Guard
from vtclip.serve.predictor import Predictor
from vtclip.serve.work import Desk

CONNECTIONS = 256  # open at once; beyond that they are answered with 503
HEADERS_S = 10.0  # until the headers of a request are complete, at most
SHUTDOWN_S = 5.0  # that requests have to end when the process is stopped


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, which answers nobody before it listens; a ValueError if taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise ValueError(f"{option('host')} {host!a} is no name or address of a machine") from None
    # asyncio sends without delay through sockets of this protocol by name alone
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # a port that was left a moment ago is free
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        raise ValueError(f"{option('port')} {port} on {host}: {reason}") from None
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    address = str(bound.getsockname()[0])
    return address == "::1" or address.startswith("127.")


def address_of(bound: socket.socket) -> str:
    """What a browser on this machine opens."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(
    predictor: Predictor,
    bound: socket.socket,
    *,
    names: frozenset[str] | None,
    ready: Callable[[], None],
    log: Callable[[str], None],
) -> None:
    """Answers requests until a signal ends it; the signal is then raised again.

    names: further names by which the service may be called. A socket of this machine is called by
    those of LOCAL and these alone; any other by every name, unless some are given here.
    ready: called once requests are answered. log: takes one line per request.
    """
    hosts = names
    if is_local(bound):
        hosts = LOCAL | {str(bound.getsockname()[0])} | (names or frozenset())
    for noisy in ("uvicorn.error", "python_multipart"):  # clients' faults are in the line of log
        logging.getLogger(noisy).setLevel(logging.ERROR)
    asyncio.run(_serve(predictor, bound, hosts, ready, log))


async def _serve(
    predictor: Predictor,
    bound: socket.socket,
    hosts: frozenset[str] | None,
    ready: Callable[[], None],
    log: Callable[[str], None],
) -> None:
    desk = Desk()
    protocol: Any = functools.partial(_Patient, min(HEADERS_S, predictor.limits.timeout))
    config = uvicorn.Config(
        Guard(build_app(predictor, desk), hosts, log),
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(SHUTDOWN_S),
    )
    server = uvicorn.Server(config)

    async def announce() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        ready()
        while not server.should_exit:
            await asyncio.sleep(0.1)
        desk.close()

    told = asyncio.create_task(announce())
    try:
        await server.serve(sockets=[bound])
    finally:
        told.cancel()
        desk.close()


class _Patient(asyncio.Protocol):
    """uvicorn's protocol, with an end to its patience: headers must be complete in `patience` s.

    Within a request the application has the time; between two it is the server's.
    """

    def __init__(self, patience: float, **settings: Any) -> None:
        self._patience = patience
        self._inner: Any = H11Protocol(**settings)
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._inner.connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        self._look()

    def eof_received(self) -> None:
        self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _look(self) -> None:
        if not self._waiting:
            self._stop()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._too_slow)

    @property
    def _waiting(self) -> bool:
        """Whether no request is being answered."""
        cycle = self._inner.cycle
        return cycle is None or bool(cycle.response_complete)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._waiting:
            self._transport.close()
