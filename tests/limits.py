"""Commands run one by one in forked processes, with what each took of time and memory."""

from __future__ import annotations

import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

import qwen35
from patience import PATIENCE

__all__ = ["Ended", "Limited", "limited"]

SECONDS = 10
"""Of time of the processor; after that a command is killed, if nothing else is asked for."""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: exit code; negative, the signal that ended it.
        said: what it wrote to standard error; of a crash, the end of the traceback.
        printed: what it wrote to standard output.
        seconds: time of the processor, which does not depend on what else runs.
        nbytes: peak memory of the process, all that it imported included.
    """

    code: int
    said: str
    printed: str
    seconds: float
    nbytes: int


class Limited:
    """A process that runs commands of `qwen35`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, command: Sequence[str], folder: Path) -> Ended:
        """Run one command in a folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([*command, str(folder)]), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))


@contextmanager
def limited(*modules: str, seconds: int = SECONDS, **settings: str) -> Iterator[Limited]:
    """Start the process, which imports `modules` once; `settings` are in its environment."""
    environment = {"PYTHONPATH": str(Path(qwen35.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, __file__, str(seconds), *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, "OPENBLAS_NUM_THREADS": "1", **settings},
    ) as process:
        yield Limited(process)
        assert process.stdin is not None
        process.stdin.close()


def _main() -> None:
    seconds = int(sys.argv[1])
    for name in sys.argv[2:]:
        importlib.import_module(name)
    for line in sys.stdin:
        *command, folder = json.loads(line)
        sys.stdout.write(json.dumps(asdict(_run(command, folder, seconds))) + "\n")
        sys.stdout.flush()


def _run(command: list[str], folder: str, limit: int) -> Ended:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(command, folder, writing, limit)
    os.close(writing)
    with os.fdopen(reading) as file:
        said, printed = json.loads(file.read() or '["", ""]')  # nothing, if it was killed
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    return Ended(os.waitstatus_to_exitcode(status), said, printed, seconds, usage.ru_maxrss * 1024)


def _child(command: list[str], folder: str, pipe: int, limit: int) -> None:
    import traceback

    from qwen35.cli.main import main

    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    os.chdir(folder)
    said, printed = io.StringIO(), io.StringIO()
    code = 99
    try:
        with redirect_stderr(said), redirect_stdout(printed):
            code = main(command)
    except BaseException:  # noqa: BLE001 - told to the parent
        said.write(traceback.format_exc()[-1500:])
    finally:
        with os.fdopen(pipe, "w") as file:
            json.dump([said.getvalue()[-4000:], printed.getvalue()], file)
        os._exit(code)


if __name__ == "__main__":
    _main()
