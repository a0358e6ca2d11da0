"""A server that is started for a check, and ended after it."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as LateError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

from qwen35.errors import EndpointError, UsageError
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.hidden_keys import shown
from qwen35.serving.server_client import Bounds, ServerClient
from qwen35.threads import detached

__all__ = ["FIRST_WORD", "START_SECONDS", "StartedServers", "answers", "started_servers"]

_LOG = logging.getLogger(__name__)

START_SECONDS = 3600.0
"""For loading a model, and compiling its kernels."""

FIRST_WORD = 60.0
"""Seconds of waiting before the first word about it; each other one comes after twice as many."""

_LOADING = (502, 504)
"""What a gateway says while the server behind it loads; 503 is busy."""

_PAUSE = 0.2
_FALL_SECONDS = 1.0
"""For a program to end after its last connection is lost."""

_PROBE = Bounds(seconds=5.0, retries=0)
_END_SECONDS = 10.0
_LAST_BYTES = 4096
_SHOWN = 200


class _Program:
    """A server that runs, and the last that it wrote: a pipe holds no gigabytes of log.

    Args:
        process: in a group of its own.
        endpoint: where it answers.
    """

    def __init__(self, process: subprocess.Popen[bytes], endpoint: Endpoint) -> None:
        self.process, self.endpoint = process, endpoint
        self._kept = b""
        self._written = detached(self._read)

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        while piece := os.read(stream.fileno(), _LAST_BYTES):
            self._kept = (self._kept + piece)[-_LAST_BYTES:]
        stream.close()

    def last(self) -> str:
        """Return the last line that it wrote, in brackets."""
        if self.process.poll() is not None:
            with suppress(LateError):  # a child may keep the pipe open
                self._written.result(_FALL_SECONDS)
        lines = self._kept.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({shown(last, _SHOWN)})" if last else ""

    def fate(self) -> EndpointError | None:
        """Return how it has ended; None if it runs."""
        code = self.process.poll()
        if code is None:
            return None
        how, hint = f"ends with exit code {code}", ""
        if code == 0:
            hint = "it must stay in the foreground"
        elif code < 0:
            how, hint = f"is ended by {_signal_name(-code)}", ""
        found = f"the server that --serve starts {how}{self.last()}"
        return EndpointError(self.endpoint.url, found, hint=hint)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class StartedServers:
    """Servers that were started, and answer."""

    def __init__(self, programs: Sequence[_Program] = ()) -> None:
        self.programs = programs

    def fate(self) -> EndpointError | None:
        """Return how one of them has ended by itself; None if all run."""
        for one in self.programs:
            if not answers(one.endpoint):
                with suppress(subprocess.TimeoutExpired):
                    one.process.wait(_FALL_SECONDS)
            if (error := one.fate()) is not None:
                return error
        return None


@contextmanager
def started_servers(
    commands: Sequence[str], endpoints: Sequence[Endpoint]
) -> Iterator[StartedServers]:
    """Start a server with each command, wait until each endpoint answers, and end them.

    Args:
        commands: with their arguments, quoted as for a shell; none reads them.
        endpoints: their addresses, in the same order.

    Raises:
        UsageError: there are more commands than endpoints, one cannot be started, or something
            answers at an address already.
        EndpointError: a server ends by itself, or does not answer within an hour.
    """
    if len(commands) > len(endpoints):
        found = f"given {len(commands)} times, for {len(endpoints)} --endpoint"
        raise UsageError("--serve", found, hint="name the address of each server that it starts")
    pairs = [(_split(one), place) for one, place in zip(commands, endpoints, strict=False)]
    for _, endpoint in pairs:
        if answers(endpoint):
            found = f"something answers at {endpoint.url} already"
            raise UsageError("--serve", found, hint="leave it out, or choose another port")
    with ExitStack() as stack:
        started = StartedServers([stack.enter_context(_running(*pair)) for pair in pairs])
        for program in started.programs:
            _wait(program)
        try:
            yield started
        except EndpointError as error:
            raise started.fate() or error from error


def _split(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError("--serve", f"not a command ({error})", hint="check the quotes") from error
    if not words:
        raise UsageError("--serve", "an empty command", hint="leave it out, or name a program")
    return words


@contextmanager
def _running(words: list[str], endpoint: Endpoint) -> Iterator[_Program]:
    """Run a program in a process group of its own, which ends with the block."""
    try:
        process = subprocess.Popen(  # noqa: S603 - the user's own command; no shell reads it
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        found = f"{shown(words[0], _SHOWN)} cannot be started ({why})"
        raise UsageError("--serve", found, hint="name an installed program") from error
    try:
        yield _Program(process, endpoint)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    try:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    finally:
        # also after a second Ctrl-C, and for children that the first signal did not end
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _wait(program: _Program) -> None:
    begun = time.monotonic()
    word = FIRST_WORD
    while not answers(program.endpoint):
        if (error := program.fate()) is not None:
            raise error
        waited = time.monotonic() - begun
        found = "the server that --serve starts does not answer"
        if waited > START_SECONDS:
            found = f"{found} within {START_SECONDS:g} s{program.last()}"
            raise EndpointError(program.endpoint.url, found, hint="is this its address?")
        if waited > word:
            at = program.endpoint.url
            _LOG.warning("%s: %s yet, after %.0f s%s", at, found, waited, program.last())
            word *= 2
        time.sleep(_PAUSE)


def answers(endpoint: Endpoint) -> bool:
    """Whether a server is there and has loaded its model: one that loads is busy (503)."""
    with ServerClient(replace(endpoint, key=None), _PROBE) as client:
        try:
            client.get("/v1/models")
        except EndpointError as error:
            return bool(error.status) and error.status not in _LOADING
    return True
