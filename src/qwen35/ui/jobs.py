"""Jobs: commands that run as processes of their own, exactly as they are shown."""

from __future__ import annotations

import asyncio
import codecs
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.display import cut, printable
from qwen35.errors import UsageError
from qwen35.progress import NO_ESTIMATE
from qwen35.ui.actions import STARTED, action_named
from qwen35.ui.previews import dry_run, shown_command

__all__ = ["Job", "Jobs"]

GRACE_SECONDS = 10.0
"""Time to tidy up after SIGTERM, before SIGKILL."""

MOST_RUNNING = 4
_MOST_KEPT = 20
_MOST_LINES, _LONGEST_LINE = 300, 1000
_TICK_SECONDS = 0.2
_ENDINGS = {0: "done", 1: "findings", 2: "refused"}
_PROGRESS = re.compile(
    r"(?P<title>.*?): (?P<share>\d{1,3})%, "
    rf"(?:about (?P<left>\d+) s left|{NO_ESTIMATE}), .*"
)

# A job ends when the server does, even by SIGKILL: PR_SET_PDEATHSIG outlasts execv. Our start of
# the process could not set it, as functions between fork and exec are unsafe beside threads.
_LAUNCHER = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass
class Job:
    """One command.

    Args:
        number: counts from 1.
        action: the name of its action.
        values: the keywords it was made from.
        arguments: the command, without the program's name.
        apply: the command that carries out what this one, a dry run, has shown.
    """

    number: int
    action: str
    values: dict[str, Any]
    arguments: Sequence[str]
    apply: Sequence[str] = ()
    state: str = "running"
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_MOST_LINES))
    progress: dict[str, Any] | None = None
    process: asyncio.subprocess.Process | None = None
    cancelled: bool = False
    version: int = 0

    @property
    def running(self) -> bool:
        """Whether its process may still be there."""
        return self.state == "running"

    def to_json(self) -> dict[str, Any]:
        """Return what the page shows."""
        return {
            "number": self.number,
            "action": self.action,
            "values": self.values,
            "command": shown_command(self.arguments),
            "apply": shown_command(self.apply) if self.apply and self.state == "done" else "",
            "state": "cancelling" if self.running and self.cancelled else self.state,
            "progress": self.progress,
            "lines": list(self.lines),
        }

    def read(self, line: str) -> None:
        """Take in one line of its output; progress replaces the progress before."""
        line = line.rstrip("\r").rpartition("\r")[2]  # what a terminal would show in the end
        if found := _PROGRESS.fullmatch(line):
            share = min(int(found["share"]), 100)
            left = int(found["left"]) if found["left"] else None
            self.progress = {"title": found["title"], "share": share, "left": left}
        elif line:
            self.lines.append(cut(printable(line), _LONGEST_LINE))


class Jobs:
    """All jobs of one server; everything happens in its event loop.

    Args:
        folder: for what dry runs save.
        program: the words that start `qwen35`.
    """

    def __init__(
        self, folder: Path, program: Sequence[str] = (sys.executable, "-P", "-m", "qwen35")
    ) -> None:  # -P: import nothing from where we work
        self._folder, self._program = folder, program
        self._jobs: dict[int, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._version = self._number = 0
        self.closing = False

    async def start(self, name: Any, given: Any) -> Job:
        """Start an action; publishing starts as a dry run, which saves what it finds.

        Raises:
            UsageError: the values do not make a command, or too much runs already.
        """
        action = action_named(name, STARTED)
        values = action.values(given)
        action.require(values)
        arguments = action.arguments(values)
        if name != "publish":
            return await self._start(name, values, arguments)
        saved = str(self._folder / f"difference-{self._number + 1}.json")
        dry = [*arguments, *dry_run(saved)]
        return await self._start(name, values, dry, [*arguments, "--apply", saved])

    async def apply(self, number: int) -> Job:
        """Start what a finished dry run has shown.

        Raises:
            UsageError: there is no such dry run, or it is not done.
        """
        dry = self._job(number)
        if not dry.apply or dry.state != "done":
            found, hint = "no finished dry run", "run it first, and read what it shows"
            raise UsageError(f"job {number}", found, hint=hint)
        arguments, dry.apply = dry.apply, ()
        try:
            return await self._start(dry.action, dry.values, arguments)
        except UsageError:  # no room: it can be confirmed again
            dry.apply = arguments
            raise
        finally:
            self._changed(dry)

    async def cancel(self, number: int) -> None:
        """Ask a job to end; kill it if it takes too long.

        Raises:
            UsageError: there is no such job.
        """
        job = self._job(number)
        if job.running and not job.cancelled:
            job.cancelled = True
            self._changed(job)
            self._keep(self._end(job))

    async def states(self) -> AsyncIterator[dict[str, Any]]:
        """Yield jobs that changed, with the numbers of all, until the server closes."""
        seen = -1
        while not self.closing:
            if self._version != seen:
                changed = [job.to_json() for job in self._jobs.values() if job.version > seen]
                seen = self._version
                yield {"numbers": list(self._jobs), "jobs": changed}
            await asyncio.sleep(_TICK_SECONDS)

    async def close(self) -> None:
        """End all jobs and wait for them."""
        self.closing = True
        await asyncio.gather(*(self._end(job) for job in self._jobs.values()))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)

    def kill(self) -> None:
        """End what is left of all jobs at once, without an event loop."""
        for job in self._jobs.values():
            if job.process is not None and job.running:
                _signal_group(job.process, signal.SIGKILL)

    def _job(self, number: int) -> Job:
        if number not in self._jobs:
            raise UsageError(f"job {number}", "unknown", hint="it may be too long ago")
        return self._jobs[number]

    async def _start(
        self,
        name: str,
        values: dict[str, Any],
        arguments: Sequence[str],
        apply: Sequence[str] = (),
    ) -> Job:
        running = sum(job.running for job in self._jobs.values())
        if self.closing or running >= MOST_RUNNING:
            hint = "wait for one, or cancel it"
            raise UsageError("jobs", f"{running} are running, the most at a time", hint=hint)
        self._number += 1
        job = Job(self._number, name, values, arguments, apply)
        self._jobs[job.number] = job
        self._forget()
        self._changed(job)
        try:
            job.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())),
                *self._program,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # too many processes or files; text it cannot have
            job.state = "failed"
            job.read(f"not started: {getattr(error, 'strerror', None) or error}")
            self._changed(job)
            return job
        self._keep(self._follow(job))
        if job.cancelled or self.closing:  # meanwhile
            self._keep(self._end(job))
        return job

    async def _follow(self, job: Job) -> None:
        """Read a job's output until it ends."""
        assert job.process is not None
        assert job.process.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        rest = ""
        while block := await job.process.stdout.read(2**16):
            *lines, rest = (rest + decoder.decode(block)).split("\n")
            rest = rest[-_LONGEST_LINE:]
            for line in lines:
                job.read(line)
            self._changed(job)
        job.read(rest)
        code = await job.process.wait()
        ended = "cancelled" if job.cancelled else "failed"
        job.state = _ENDINGS.get(code, ended)
        if job.state == "failed":
            job.read(f"ended with code {code}" if code >= 0 else f"killed by signal {-code}")
        self._changed(job)

    async def _end(self, job: Job) -> None:
        if job.process is None or not job.running:
            return
        with suppress(ProcessLookupError):
            job.process.terminate()  # it tells its own processes
        with suppress(TimeoutError):
            await asyncio.wait_for(job.process.wait(), GRACE_SECONDS)
        _signal_group(job.process, signal.SIGKILL)

    def _keep(self, work: Any) -> None:
        """Run `work` beside everything else; the event loop alone would let go of it."""
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _changed(self, job: Job) -> None:
        self._version += 1
        job.version = self._version

    def _forget(self) -> None:
        ended = [number for number, job in self._jobs.items() if not job.running]
        for number in ended[: max(0, len(self._jobs) - _MOST_KEPT)]:
            del self._jobs[number]


def _environment() -> dict[str, str]:
    """Return the environment of a job: its output is read here, line by line."""
    environment = {**os.environ, "NO_COLOR": "1", "QWEN35_HEARTBEAT": "1"}
    environment.pop("COLUMNS", None)
    return environment


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
