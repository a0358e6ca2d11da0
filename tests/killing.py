"""Runs that are killed: a process that forks one for each trial and kills it from outside.

Every call that changes the disk is announced before it is made, so that a kill falls in a known
phase, and in any of them. A power failure is a kill after which every file has the bytes of its
last flush and every folder the names of its last flush.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import get_ident
from typing import IO, Any

import numpy as np

import qwen35

__all__ = ["Killed", "Killer", "Trial", "killer"]


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        sink: ``threads``, ``workers``, ``slice i/N`` or ``finalize``.
        source: folder of the checkpoint.
        out: folder to write.
        asked: recipe, or file types of GGUF, with commas.
        kill_at: number of the announcement after which it is killed; 0 to let it end.
        fault: what the call announced then fails with, instead of a kill.
        power: whether it is the power that fails; `shadow` holds what was flushed.
        shadow: a folder for that.
        threads: of the run.
        shard: bytes of a shard.
        seconds: between two flushes.
    """

    sink: str
    source: str
    out: str
    asked: str
    kill_at: int = 0
    fault: int = 0
    power: bool = False
    shadow: str = ""
    threads: int = 2
    shard: int = 800_000
    seconds: float = 0.005


@dataclass(frozen=True)
class Killed:
    """How it ended.

    Args:
        phases: what was announced, ``call path``, in order.
        code: exit code; negative, the signal.
        error: what the run said of a failure.
    """

    phases: list[str]
    code: int
    error: str


class Killer:
    """The process that forks the runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to: IO[str] = process.stdin
        self._from: IO[str] = process.stdout

    def run(self, trial: Trial) -> Killed:
        """Run one and kill it where it is asked."""
        print(json.dumps(asdict(trial)), file=self._to, flush=True)
        return Killed(**json.loads(self._from.readline()))


@contextmanager
def killer() -> Iterator[Killer]:
    """Start the process; it imports once what all runs need."""
    path = os.pathsep.join([str(Path(qwen35.__file__).parent.parent), str(Path(__file__).parent)])
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Killer(process)
        assert process.stdin is not None
        process.stdin.close()


# --- in that process


def _main() -> None:
    for name in ("qwen35.writing.slices", "qwen35.planning.gguf_files.gguf_plan"):
        importlib.import_module(name)
    from qwen35.codecs.ggml.quantizers import quantizer
    from qwen35.codecs.nf4.arrays import encode_blocks

    encode_blocks(np.zeros(64, np.uint16), "BF16", np.zeros(1, np.float32), np.zeros(32, np.uint8))
    for kind in ("q4_K", "q6_K", "q8_0"):
        quantizer(kind)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(asdict(_trial(Trial(**json.loads(line))))) + "\n")
        sys.stdout.flush()


def _trial(trial: Trial) -> Killed:
    reading, writing = os.pipe()
    told, telling = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            _announce(writing, trial)
            _work(trial)
            code = 0
        except BaseException as failure:  # noqa: BLE001 - told to the parent
            os.write(telling, f"{type(failure).__name__}: {failure}".encode())
        finally:
            os._exit(code)
    os.close(writing)
    os.close(telling)
    phases = []
    with os.fdopen(reading) as lines, os.fdopen(told) as errors:
        for phase in lines:
            phases.append(phase.strip())
            if len(phases) == trial.kill_at and not trial.fault:
                os.kill(child, signal.SIGKILL)
        error = errors.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0 and trial.power:
        _lose_power(trial)
    return Killed(phases, code, error)


def _work(trial: Trial) -> None:
    from qwen35.checkpoint.source import open_folder
    from qwen35.execution.process_pool import ProcessPool
    from qwen35.planning.output_plan import make_plan
    from qwen35.planning.recipe import load_recipe
    from qwen35.planning.safetensors_files import safetensors_options
    from qwen35.sinks import tensor_writer
    from qwen35.writing.slices import finalize, write_slice
    from qwen35.writing.write import write

    safetensors_options.MAX_SHARD_BYTES = trial.shard
    tensor_writer.SECONDS = trial.seconds
    if trial.sink == "finalize":
        finalize(Path(trial.out), threads=trial.threads)
        return
    checkpoint = open_folder(Path(trial.source))
    if "," in trial.asked:
        recipe, types = load_recipe("mix", "gguf"), tuple(trial.asked.split(","))
        plan = make_plan(checkpoint, recipe, types=types, projector="F16")
    else:
        plan = make_plan(checkpoint, load_recipe(trial.asked))
    if trial.sink.startswith("slice "):
        number, count = map(int, trial.sink.split()[1].split("/"))
        write_slice(plan, Path(trial.out), number, count, threads=trial.threads)
        return
    pool = ProcessPool(trial.threads, threads=1) if trial.sink == "workers" else None
    write(plan, Path(trial.out), threads=trial.threads, pool=pool)


_ON_DESCRIPTORS = ("pwrite", "write", "fsync", "fdatasync", "posix_fallocate", "ftruncate")
_ON_PATHS = ("open", "rename", "unlink", "mkdir", "rmdir")


def _announce(pipe: int, trial: Trial) -> None:
    """Make calls of `os` that change the disk say so first."""
    root = str(Path(trial.out).parent)
    write = os.write
    count = itertools.count(1)

    def say(name: str, path: str) -> None:
        if path.startswith(root):
            write(pipe, f"{name} {path.removeprefix(root)}\n".encode())
            if next(count) == trial.kill_at and trial.fault:
                raise OSError(trial.fault, os.strerror(trial.fault), path)

    def keep(path: str) -> None:
        if trial.power and path.startswith(root):
            _keep(Path(path), Path(trial.shadow), root)

    os.replace = _following(trial, root, say)
    for name in _ON_DESCRIPTORS:
        setattr(os, name, _on_descriptor(name, say, keep))
    for name in _ON_PATHS:
        setattr(os, name, _on_path(name, say))


def _following(trial: Trial, root: str, say: Callable[[str, str], None]) -> Callable[..., None]:
    """Return a renaming that announces itself, and takes along what is on the disk."""
    real = os.replace

    def replace(path: Any, to: Any) -> None:
        say("replace", str(to))
        real(path, to)
        kept = Path(trial.shadow) / Path(path).relative_to(root)
        if trial.power and kept.exists():
            kept.rename(Path(trial.shadow) / Path(to).relative_to(root))

    return replace


def _on_descriptor(
    name: str, say: Callable[[str, str], None], keep: Callable[[str], None]
) -> Callable[..., Any]:
    """Return a call that announces itself; tensors are written half by half."""
    real = getattr(os, name)

    def call(descriptor: int, *rest: Any) -> Any:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        say(name, path)
        if name == "pwrite":
            rest = (rest[0][: -(-len(rest[0]) // 2)], *rest[1:])
        if name in ("fsync", "fdatasync"):
            keep(path)
        return real(descriptor, *rest)

    return call


def _on_path(name: str, say: Callable[[str, str], None]) -> Callable[..., Any]:
    real = getattr(os, name)

    def call(path: Any, *rest: Any, **more: Any) -> Any:
        folder = more.get("dir_fd", more.get("src_dir_fd"))
        below = Path(f"/proc/self/fd/{folder}").readlink() if folder is not None else Path()
        say(name, str(below / path))
        return real(path, *rest, **more)

    return call


def _keep(path: Path, shadow: Path, root: str) -> None:
    """Note what a flush brought to the disk: a file's bytes, or the names in a folder."""
    kept = shadow / path.relative_to(root)
    kept.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        kept.mkdir(exist_ok=True)
        kept = kept / ".names"
    beside = kept.with_name(f".{kept.name}.{os.getpid()}.{get_ident()}")
    if path.is_dir():
        beside.write_text(json.dumps([entry.name for entry in path.iterdir()]))
    else:
        shutil.copyfile(path, beside)
    beside.rename(kept)


def _lose_power(trial: Trial) -> None:
    """Give every file in the work folder the bytes of its last flush, if it had one."""
    out = Path(trial.out)
    work = out.with_name(f".{out.name}.partial")
    if out.exists() or not (work / "files").exists():
        return  # renames: made or not made, both are tried by plain kills
    for folder in (work / "files", work):
        kept = Path(trial.shadow) / folder.relative_to(out.parent)
        names = json.loads((kept / ".names").read_text()) if (kept / ".names").exists() else []
        for path in folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif path.is_file() and path.stat().st_size:
                if (kept / path.name).exists():
                    shutil.copyfile(kept / path.name, path)
                else:
                    path.write_bytes(bytes(path.stat().st_size))  # its size alone may survive


if __name__ == "__main__":
    _main()
