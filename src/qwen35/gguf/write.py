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
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import TensorFile, write_file
from qwen35.sinks.staging import Result, check_output, check_space, staging
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
    check_space(out.absolute().parent, plan.nbytes)
    progress = progress or Silent()
    progress.begin(f"writing {out.name}", plan.read_bytes)
    threads = threads or default_threads()
    try:
        with staging(out, overwrite=overwrite) as folder, Reader(plan.checkpoint) as reader:
            hashes = _Run(plan, folder, reader, progress).files(threads)
            manifest = plan.made.render(hashes)
            write_file(folder / MANIFEST_NAME, manifest)
    finally:
        progress.end()
    return Result(out, hashes, plan.nbytes)


Job = tuple[Strip, dict[str, list[GgufFile]]]


@dataclass
class _Run:
    """One execution: what its threads share."""

    plan: GgufPlan
    folder: Path
    reader: Reader
    progress: Progress
    lock: Lock = field(default_factory=Lock)
    stopped: bool = False

    def files(self, threads: int) -> dict[str, str]:
        """Write, flush and hash all files."""
        opened: dict[str, TensorFile] = {}
        try:
            for file in self.plan.files:
                head = file.head
                path = self.folder / file.name
                opened[file.name] = TensorFile(path, head.content, head.offsets, head.nbytes)
            with ThreadPoolExecutor(threads) as pool:
                self._fill(pool, threads, opened)
                hashes = pool.map(lambda name: opened[name].finish(), opened)
                return dict(zip(opened, hashes, strict=True))
        finally:
            for target in opened.values():
                target.close()

    def _fill(self, pool: ThreadPoolExecutor, threads: int, opened: dict[str, TensorFile]) -> None:
        jobs = self._jobs()
        futures = [pool.submit(self._work, jobs, opened) for _ in range(threads)]
        try:
            wait(futures)
        finally:
            self.stopped = True
            wait(futures)  # nobody may write when the files are closed
        for future in futures:
            future.result()

    def _jobs(self) -> Iterator[Job]:
        for tensor, kinds in self.plan.jobs:
            for strip in strips(tensor):
                yield strip, kinds

    def _work(self, jobs: Iterator[Job], opened: dict[str, TensorFile]) -> None:
        """Take strips until none is left."""
        try:
            while True:
                with self.lock:
                    job = None if self.stopped else next(jobs, None)
                if job is None:
                    return
                self._strip(*job, opened)
        except BaseException:
            self.stopped = True
            raise

    def _strip(
        self, strip: Strip, kinds: dict[str, list[GgufFile]], opened: dict[str, TensorFile]
    ) -> None:
        tensor = strip.tensor
        rows = read_strip(self.reader, strip)
        importance = self._importance(tensor, strip.slab)
        for kind, files in kinds.items():
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
