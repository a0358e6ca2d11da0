"""A client of servers that gives up soon, and servers that answer it as they like."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fake_server import FakeServer, serving
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.server_client import Bounds, ServerClient

__all__ = ["HASTY", "raw_server", "talking"]

HASTY = Bounds(seconds=0.4, retries=2, pause=0.01, wait=0.05)


@contextmanager
def talking(fake: FakeServer | None = None, bounds: Bounds = HASTY) -> Iterator[ServerClient]:
    """Yield a client of a server that runs meanwhile."""
    with serving(fake) as running, ServerClient(Endpoint.parse(running.url), bounds) as client:
        yield client


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that accepts one connection, reads the request and does as it likes."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(5)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(5)
            connection.recv(2**16)
            try:
                answer(connection)
            except OSError:
                return  # the client has left

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join()
        listener.close()
