"""Run a small program on what a stranger wrote: in a child, within time, memory and output."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen35.planning import limited_program

__all__ = ["PATIENCE", "Limits", "run_bounded"]

PATIENCE = 8
"""Wall time that a child may take, in multiples of its processor time."""


@dataclass(frozen=True)
class Limits:
    """What a child may use; the operating system and its parent see to it.

    Args:
        seconds: of processor time, with the start of the interpreter; where others use the
            processors too, it may wait for them `PATIENCE` times as long.
        memory: bytes of its address space.
        output: bytes that it may answer.
    """

    seconds: float
    memory: int
    output: int = 2**16

    def __str__(self) -> str:
        return f"{self.seconds:g} s and {self.memory // 2**20} MiB"


def run_bounded(
    program: Path, content: bytes, limits: Limits, packages: Sequence[str]
) -> tuple[bytes, bool]:
    """Run a program of this package with `content` as its input.

    Args:
        program: a file that imports nothing but the standard library and `packages`.
        content: its standard input, which it reads to the end before it answers.
        limits: what it may use.
        packages: packages that it imports: no others can be found, in no other folders.

    Returns:
        What it wrote, cut at the limit, and whether it came to its end within the limits. What it
        says on stderr is dropped.

    Raises:
        OSError: no process can be started.
    """
    arguments = [str(program), str(limits.seconds), str(limits.memory), *_folders(packages)]
    # -I and -S: neither the working directory, nor the environment, nor site-packages' start files.
    command = [sys.executable, "-I", "-S", limited_program.__file__, *arguments]
    with subprocess.Popen(  # noqa: S603 - this interpreter, on files of this package
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        start_new_session=True,
    ) as child:
        late = threading.Event()
        timer = threading.Timer(PATIENCE * limits.seconds, _end, [child, late])
        timer.daemon = True
        timer.start()
        try:
            output = _exchange(child, content, limits.output)
            # Not yet reaped: its number is its group's, and must not become another's.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        finally:  # also on Ctrl-C
            timer.cancel()
            timer.join()
            _end(child)
    whole = child.returncode == 0 and not late.is_set() and len(output) <= limits.output
    return output[: limits.output], whole


def _exchange(child: subprocess.Popen[bytes], content: bytes, most: int) -> bytes:
    """Write the input, then read at most one byte more than `most`; a flood ends the child."""
    assert child.stdin is not None and child.stdout is not None  # noqa: PT018 - both are pipes
    with suppress(BrokenPipeError):  # it ended early: its exit code tells
        child.stdin.write(content)
    with suppress(BrokenPipeError):
        child.stdin.close()
    output = child.stdout.read(most + 1)
    if len(output) > most:
        _end(child)
    return output


def _end(child: subprocess.Popen[bytes], late: threading.Event | None = None) -> None:
    """Kill the child, which nobody has waited for, and whatever it started."""
    if late is not None:
        late.set()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _folders(packages: Sequence[str]) -> list[str]:
    """Return the folders in which this process finds the packages."""
    specs = [importlib.util.find_spec(name) for name in packages]
    origins = [spec.origin for spec in specs if spec is not None and spec.origin]
    return list(dict.fromkeys(str(Path(origin).parent.parent) for origin in origins))


def _environment() -> dict[str, str]:
    """Return the little that an interpreter needs to start: where libraries are."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
