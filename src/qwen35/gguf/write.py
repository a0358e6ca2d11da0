"""The loop: read a strip, encode it for every file that wants it, write. One pass for all files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
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

__all__ = ["Job", "Result", "Writing", "write", "writing"]

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
    progress = progress or Silent()
    try:
        with writing(plan, out, overwrite=overwrite, progress=progress) as run:
            run.files(threads or default_threads())
    finally:
        progress.end()
    return Result(run.out, run.hashes, plan.nbytes)


@contextmanager
def writing(plan: GgufPlan, out: Path, *, overwrite: bool, progress: Progress) -> Iterator[Writing]:
    """Prepare the folder of `plan`, let the block fill its files, and complete it.

    Arguments and errors are those of `write`.
    """
    source = plan.checkpoint.folder()
    out = out.resolve() if not out.is_symlink() else out
    check_output(out, source=source, overwrite=overwrite)
    if any(kind not in FLOATS for file in plan.files for kind in file.kinds.values()):
        open_kernel()
    key = work_key(plan.digest, plan.checkpoint, "gguf", "llama_cpp_python")
    with (
        resumable(out, key, overwrite=overwrite) as (folder, journal),
        Reader(plan.checkpoint) as reader,
    ):
        check_space(folder, plan.nbytes, keeping=folder)
        with Written(folder, journal) as written:
            run = Writing(out, plan, written, reader, progress)
            yield run
        write_file(folder / MANIFEST_NAME, plan.made.render(run.hashes))


@dataclass
class Job:
    """A tensor, the files that still want it by type, and its strips that are left to do."""

    tensor: Tensor
    kinds: dict[str, list[GgufFile]]
    left: int


@dataclass
class Writing:
    """One execution of a plan: what its threads share.

    Args:
        out: the output.
        plan: what is executed.
        written: its files.
        reader: of the source.
        progress: told of the bytes read.

    Attributes:
        hashes: SHA-256 of the finished files.
    """

    out: Path
    plan: GgufPlan
    written: Written
    reader: Reader
    progress: Progress
    hashes: dict[str, str] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    opened: dict[str, TensorFile] = field(default_factory=dict)
    stopped: bool = False

    def files(self, threads: int) -> None:
        """Write, flush and hash all files."""
        with ThreadPoolExecutor(threads) as pool:
            todo = self.begin(pool)
            self._announce(todo)
            self._fill(pool, threads, todo)
            self.finish(pool)

    def begin(self, pool: Executor) -> list[Job]:
        """Open the files that are still to be filled; return what fills them."""
        files = self.plan.files
        found = pool.map(lambda f: self.written.hash_of(f.name, f.head.nbytes), files)
        for file, digest in zip(files, found, strict=True):
            if digest is not None:
                self.hashes[file.name] = digest
                continue
            head = file.head
            self.opened[file.name] = self.written.open(
                file.name, head.content, head.offsets, head.nbytes
            )
        return self._todo()

    def finish(self, pool: Executor) -> None:
        """Flush and hash the files that `begin` opened."""
        self.hashes |= zip(self.opened, pool.map(self.written.finish, self.opened), strict=True)

    def _fill(self, pool: ThreadPoolExecutor, threads: int, todo: list[Job]) -> None:
        jobs = ((job, strip) for job in todo for strip in strips(job.tensor))
        futures = [pool.submit(self._work, jobs) for _ in range(threads)]
        try:
            wait(futures)
        finally:
            self.stopped = True
            wait(futures)  # nobody may write when the files are closed
        for future in futures:
            future.result()

    def _todo(self) -> list[Job]:
        """Return every tensor that some file still wants."""
        jobs = []
        for tensor, kinds in self.plan.jobs:
            left = {
                kind: [file for file in files if not self.written.has(file.name, tensor.name)]
                for kind, files in kinds.items()
            }
            left = {kind: files for kind, files in left.items() if files}
            if left:
                jobs.append(Job(tensor, left, sum(1 for _ in strips(tensor))))
        return jobs

    def _announce(self, todo: list[Job]) -> None:
        weights = {slab.item.weight for job in todo for slab in job.tensor.slabs}
        nbytes = sum(weight.nbytes for weight in weights)
        verb = "writing" if nbytes == self.plan.read_bytes else "continuing"
        self.progress.begin(f"{verb} {self.out.name}", nbytes)

    def _work(self, jobs: Iterator[tuple[Job, Strip]]) -> None:
        """Take strips until none is left."""
        try:
            while True:
                with self.lock:
                    taken = None if self.stopped else next(jobs, None)
                if taken is None:
                    return
                self.strip(*taken, self.reader)
        except BaseException:
            self.stopped = True
            raise

    def strip(self, job: Job, strip: Strip, reader: Reader) -> None:
        """Read a strip, encode it for every file that wants it, and write it."""
        tensor = job.tensor
        rows = read_strip(reader, strip)
        importance = self._importance(tensor, strip.slab)
        for kind, files in job.kinds.items():
            offset = GGML_TYPES[kind].size((strip.start, tensor.row))
            data = encode(tensor.name, rows, kind, importance)
            for file in files:
                self.opened[file.name].write(tensor.name, offset, data)
        with self.lock:
            job.left -= 1
            complete = not job.left
        if complete:
            self.written.done(tensor.name, [f.name for files in job.kinds.values() for f in files])
        self.progress.advance(self._source_bytes(strip), tensor.name)

    def _importance(self, tensor: Tensor, slab: int) -> F32 | None:
        imatrix = self.plan.asked.imatrix
        entry = imatrix.entries.get(tensor.name) if imatrix else None
        return entry.slice(slab, tensor.row) if entry else None

    @staticmethod
    def _source_bytes(strip: Strip) -> int:
        item = strip.tensor.slabs[strip.slab].item
        return item.weight.nbytes * strip.count * strip.tensor.row // item.spec.numel
