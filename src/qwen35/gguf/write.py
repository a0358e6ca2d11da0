"""The loop: read a strip, encode it for every file that wants it, write. One pass for all files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Reader
from qwen35.gguf.kernel import encode, open_kernel
from qwen35.gguf.names import Tensor
from qwen35.gguf.plan import GgufFile, GgufPlan
from qwen35.gguf.rows import Strip, read_strip, strips
from qwen35.gguf.types import FLOATS, GGML_TYPES
from qwen35.plan.manifest import work_key
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import TensorFile, write_file
from qwen35.sinks.staging import Result, check_output, check_space, resumable
from qwen35.sinks.written import Written
from qwen35.threads import default_threads

__all__ = ["Result", "write"]

F32 = npt.NDArray[np.float32]


def write(
    plan: GgufPlan,
    out: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Write the files that `plan` describes to the folder `out`, which appears whole.

    A run that is killed or interrupted is continued by the next one of the same plan.
    Memory is a strip of `rows.STRIP` elements for each thread and type, whatever the model's size;
    weights of a packed source are decoded whole.

    Raises:
        OutputError: the output exists or overlaps the source, or the disk is full.
        TensorError: a weight cannot be read, holds NaN or infinity, or is out of a type's range.
        UsageError: llama-cpp-python is needed and not installed.
    """
    source = plan.checkpoint.folder()
    out = out.resolve() if not out.is_symlink() else out
    check_output(out, source=source, overwrite=overwrite)
    if any(kind not in FLOATS for file in plan.files for kind in file.kinds.values()):
        open_kernel()
    progress = progress or Silent()
    key = work_key(plan.digest, plan.checkpoint, "gguf", "llama_cpp_python")
    try:
        with (
            resumable(out, key, overwrite=overwrite) as (folder, journal),
            Reader(plan.checkpoint) as reader,
        ):
            check_space(folder, plan.nbytes, keeping=folder)
            with Written(folder, journal) as written:
                run = _Run(out.name, plan, written, reader, progress)
                hashes = run.files(threads or default_threads())
            manifest = plan.made.render(hashes)
            write_file(folder / MANIFEST_NAME, manifest)
    finally:
        progress.end()
    return Result(out, hashes, plan.nbytes)


@dataclass
class _Job:
    """A tensor, the files that still want it by type, and its strips that are left to do."""

    tensor: Tensor
    kinds: dict[str, list[GgufFile]]
    left: int


@dataclass
class _Run:
    """One execution: what its threads share."""

    name: str
    plan: GgufPlan
    written: Written
    reader: Reader
    progress: Progress
    lock: Lock = field(default_factory=Lock)
    stopped: bool = False

    def files(self, threads: int) -> dict[str, str]:
        """Write, flush and hash all files."""
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda f: self.written.hash_of(f.name, f.head.nbytes), self.plan.files)
            hashes = {
                file.name: digest for file, digest in zip(self.plan.files, found, strict=True)
            }
            opened = {}
            for file in self.plan.files:
                if hashes[file.name] is None:
                    head = file.head
                    opened[file.name] = self.written.open(
                        file.name, head.content, head.offsets, head.nbytes
                    )
            self._fill(pool, threads, opened)
            hashes |= zip(opened, pool.map(self.written.finish, opened), strict=True)
        return {name: digest for name, digest in hashes.items() if digest is not None}

    def _fill(self, pool: ThreadPoolExecutor, threads: int, opened: dict[str, TensorFile]) -> None:
        todo = self._todo()
        self._begin(todo)
        jobs = ((job, strip) for job in todo for strip in strips(job.tensor))
        futures = [pool.submit(self._work, jobs, opened) for _ in range(threads)]
        try:
            wait(futures)
        finally:
            self.stopped = True
            wait(futures)  # nobody may write when the files are closed
        for future in futures:
            future.result()

    def _todo(self) -> list[_Job]:
        """Return every tensor that some file still wants."""
        jobs = []
        for tensor, kinds in self.plan.jobs:
            left = {
                kind: [file for file in files if not self.written.has(file.name, tensor.name)]
                for kind, files in kinds.items()
            }
            left = {kind: files for kind, files in left.items() if files}
            if left:
                jobs.append(_Job(tensor, left, sum(1 for _ in strips(tensor))))
        return jobs

    def _begin(self, todo: list[_Job]) -> None:
        weights = {slab.item.weight for job in todo for slab in job.tensor.slabs}
        nbytes = sum(weight.nbytes for weight in weights)
        verb = "writing" if nbytes == self.plan.read_bytes else "continuing"
        self.progress.begin(f"{verb} {self.name}", nbytes)

    def _work(self, jobs: Iterator[tuple[_Job, Strip]], opened: dict[str, TensorFile]) -> None:
        """Take strips until none is left."""
        try:
            while True:
                with self.lock:
                    taken = None if self.stopped else next(jobs, None)
                if taken is None:
                    return
                job, strip = taken
                self._strip(job, strip, opened)
                with self.lock:
                    job.left -= 1
                    complete = not job.left
                if complete:
                    files = [file.name for files in job.kinds.values() for file in files]
                    self.written.done(job.tensor.name, files)
        except BaseException:
            self.stopped = True
            raise

    def _strip(self, job: _Job, strip: Strip, opened: dict[str, TensorFile]) -> None:
        tensor = job.tensor
        rows = read_strip(self.reader, strip)
        importance = self._importance(tensor, strip.slab)
        for kind, files in job.kinds.items():
            offset = GGML_TYPES[kind].size((strip.start, tensor.row))
            data = encode(tensor.name, rows, kind, importance)
            for file in files:
                opened[file.name].write(tensor.name, offset, data)
        self.progress.advance(self._source_bytes(strip), tensor.name)

    def _importance(self, tensor: Tensor, slab: int) -> F32 | None:
        imatrix = self.plan.asked.imatrix
        entry = imatrix.entries.get(tensor.name) if imatrix else None
        return entry.slice(slab, tensor.row) if entry else None

    @staticmethod
    def _source_bytes(strip: Strip) -> int:
        item = strip.tensor.slabs[strip.slab].item
        return item.weight.nbytes * strip.count * strip.tensor.row // item.spec.numel
