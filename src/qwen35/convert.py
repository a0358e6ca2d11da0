"""The loop: read, encode, write. Carries out a plan tensor by tensor, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from qwen35.checkpoint.place import Folder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Reader
from qwen35.codecs.devices import encoders_for
from qwen35.plan.manifest import manifest_bytes, manifest_size, work_key
from qwen35.plan.plan import Plan, PlannedFile
from qwen35.plan.step import Step
from qwen35.progress import Progress, Silent
from qwen35.sinks.files import TensorFile, write_file
from qwen35.sinks.staging import Result, check_output, check_space, resumable
from qwen35.sinks.written import Written
from qwen35.threads import default_threads
from qwen35.work.dispatch import Pool
from qwen35.work.fleet import fill
from qwen35.work.steps import Carrier, each

__all__ = ["Conversion", "Result", "check_before", "convert", "converting"]


def check_before(out: Path, *, overwrite: bool, device: str, source: Path | None = None) -> None:
    """Check what can be checked before the source is downloaded.

    Args:
        out: the output.
        overwrite: replace an output of ours.
        device: to encode on.
        source: the folder of the source, if it is on this machine.

    Raises:
        OutputError: the output exists or overlaps the source.
        UsageError: there is no such device.
    """
    check_output(out, source=source, overwrite=overwrite)
    encoders_for(device)


def convert(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    pool: Pool | None = None,
) -> Result:
    """Write the output that `plan` describes to the folder `out`.

    The folder appears whole: everything is prepared beside it, flushed and hashed, and renamed. A
    run that is killed or interrupted is continued by the next one of the same plan.
    Memory is a few pieces of 8 MB a thread, whatever the size of the model.

    Args:
        plan: what to write.
        out: the folder.
        overwrite: replace an output of ours.
        threads: of this process; all processors, if not given.
        device: where this process encodes.
        progress: told of the bytes read.
        pool: workers that do it instead (`qwen35.work.processes`, `qwen35.work.on_ray`), on their
            own devices; they must see the source and the output.

    Raises:
        OutputError: the output exists or overlaps the source, or the disk is full.
        TensorError: a weight cannot be read, or holds NaN or infinity.
        WorkerError: workers died again and again, or a GPU has too little memory.
    """
    progress = progress or Silent()
    here = "cpu" if pool else device
    try:
        with converting(plan, out, overwrite=overwrite, device=here, progress=progress) as run:
            run.weights(threads, pool)
    finally:
        progress.end()
    return run.result


@contextmanager
def converting(
    plan: Plan, out: Path, *, overwrite: bool, device: str, progress: Progress
) -> Iterator[Conversion]:
    """Prepare the output of `plan`, let the block fill its weights, and complete it.

    Arguments and errors are those of `convert`.
    """
    source = plan.checkpoint.folder()
    place = Folder(source)
    out = out.resolve() if not out.is_symlink() else out
    check_output(out, source=source, overwrite=overwrite)
    encoders = encoders_for(device)
    key = work_key(plan.digest, plan.checkpoint)
    with (
        resumable(out, key, overwrite=overwrite) as (folder, journal),
        Reader(plan.checkpoint) as reader,
    ):
        check_space(folder, plan.nbytes + manifest_size(plan), keeping=folder)
        with Written(folder, journal) as written:
            run = Conversion(out, plan, folder, written, reader, Carrier(plan, encoders), progress)
            yield run
        hashes = run.hashes
        for name, content in plan.documents.items():
            hashes[name] = write_file(folder / name, content)
        for name, size in plan.copied.items():
            hashes[name] = write_file(folder / name, place.read(name, 0, size))
        manifest = manifest_bytes(plan, hashes)
        write_file(folder / MANIFEST_NAME, manifest)
    run.result = Result(out, hashes, plan.nbytes + len(manifest))


@dataclass
class Conversion:
    """One execution of a plan: everything its steps share.

    Args:
        out: the output.
        plan: what is executed.
        folder: where its files are while they are made.
        written: its files.
        reader: of the source.
        carrier: of its steps.
        progress: told of the bytes read.

    Attributes:
        hashes: SHA-256 of the finished files.
        result: known at the end.
    """

    out: Path
    plan: Plan
    folder: Path
    written: Written
    reader: Reader
    carrier: Carrier
    progress: Progress
    hashes: dict[str, str] = field(default_factory=dict)
    result: Result = field(init=False)

    def weights(self, threads: int | None, workers: Pool | None = None) -> None:
        """Write the safetensors files, by threads or by workers."""
        with ThreadPoolExecutor(threads or default_threads()) as pool:
            left = self._left(pool)
            self._begin(left)
            if workers is None:
                self._by_threads(pool, left)
                return
        self.hashes |= fill(self.plan, self.folder, self.written, left, workers, self.progress)

    def _by_threads(self, pool: ThreadPoolExecutor, left: Sequence[PlannedFile]) -> None:
        """Fill one file after the other; each is flushed and hashed while the next is filled."""
        stop = Event()
        finishing: dict[str, Future[str]] = {}
        try:
            for planned in left:
                self.fill(pool, planned, self.left(planned, planned.steps), stop)
                finishing[planned.name] = pool.submit(self.written.finish, planned.name)
            self.hashes |= {name: future.result() for name, future in finishing.items()}
        finally:
            stop.set()

    def begin(self, pool: Executor) -> list[tuple[Step, PlannedFile, TensorFile]]:
        """Open the files that are still to be filled; return the steps that fill them."""
        left = self._left(pool)
        opened = [(planned, self._open(planned)) for planned in left]
        return [
            (step, planned, f)
            for planned, f in opened
            for step in self.left(planned, planned.steps)
        ]

    def finish(self, pool: Executor) -> None:
        """Flush and hash the files that `begin` opened."""
        left = [file.name for file in self.plan.files if file.name not in self.hashes]
        self.hashes |= zip(left, pool.map(self.written.finish, left), strict=True)

    def _left(self, pool: Executor) -> list[PlannedFile]:
        """Return the files that are to be filled; note the hashes of those of an earlier run."""
        files = self.plan.files
        found = pool.map(lambda file: self.written.hash_of(file.name, file.nbytes), files)
        left = []
        for file, digest in zip(files, found, strict=True):
            if digest is None:
                left.append(file)
            else:
                self.hashes[file.name] = digest
        return left

    def _begin(self, left: Sequence[PlannedFile]) -> None:
        nbytes = sum(s.weight.nbytes for file in left for s in self.left(file, file.steps))
        whole = nbytes == self.plan.read_bytes
        verb = "writing" if whole else "continuing" if nbytes else "finishing"
        self.progress.begin(f"{verb} {self.out.name}", nbytes)

    def left(self, planned: PlannedFile, steps: Sequence[Step]) -> list[Step]:
        """Return those of the steps of a file that are still to be done."""
        return [s for s in steps if not self.written.has(planned.name, s.outputs[0].name)]

    def _open(self, planned: PlannedFile) -> TensorFile:
        return self.written.open(planned.name, planned.head, planned.offsets, planned.nbytes)

    def fill(
        self, pool: Executor, planned: PlannedFile, steps: Sequence[Step], stop: Event
    ) -> None:
        """Carry out steps of a file in the threads of `pool`, until the first failure."""
        file = self._open(planned)

        def pieces(step: Step) -> Iterator[int]:
            return self.pieces(step, planned, file, self.reader)

        each(pool, steps, pieces, stop)

    def pieces(
        self, step: Step, planned: PlannedFile, file: TensorFile, reader: Reader
    ) -> Iterator[int]:
        """Carry out a step; yield after each piece how far into its source file it has read."""
        yield from self.carrier.pieces(step, file, reader)
        self.written.done(step.outputs[0].name, [planned.name])
        self.progress.advance(step.weight.nbytes, step.weight.name)
