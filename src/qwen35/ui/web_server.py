"""The server of the page: on this machine's loopback, until it is stopped."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from qwen35.errors import UsageError, extra_hint

__all__ = ["HOST", "serve_page"]

HOST = "127.0.0.1"
_STOP_SECONDS = 2


def serve_page(port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until the process is asked to end; its jobs end too.

    Args:
        port: on 127.0.0.1; any free one if 0.
        ready: receives the page's address, which holds the token.

    Raises:
        UsageError: the port is taken, or the extra `ui` is not installed.
    """
    try:
        import uvicorn

        from qwen35.ui.web_app import web_app
    except ModuleNotFoundError as error:
        raise UsageError("qwen35 ui", f"needs {error.name}", hint=extra_hint("ui")) from error
    from qwen35.ui.jobs import Jobs

    token = secrets.token_urlsafe(24)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await jobs.close()  # which ends the streams of progress as well
            await super().shutdown(sockets)

    with closing(_listening(port)) as listening, TemporaryDirectory(prefix="qwen35-ui-") as folder:
        jobs = Jobs(Path(folder))
        port = listening.getsockname()[1]
        config = uvicorn.Config(
            web_app(jobs, token, port),
            access_log=False,
            log_level="warning",
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        ready(f"http://{HOST}:{port}/?token={token}")
        try:
            Server(config).run(sockets=[listening])
        finally:
            jobs.kill()


def _listening(port: int) -> socket.socket:
    """Return a socket that others on this machine can already connect to."""
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen()
    except OSError as error:
        listening.close()
        found, hint = str(error.strerror).lower(), "choose another, or leave it out for a free one"
        raise UsageError(f"--port {port}", found, hint=hint) from error
    return listening
