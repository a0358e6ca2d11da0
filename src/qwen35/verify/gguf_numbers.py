"""Numbers of GGUF files: each block decoded by the `gguf` library, and held against the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from qwen35.checkpoint.source import Reader
from qwen35.errors import Finding, InputError
from qwen35.gguf.container import Container, Entry
from qwen35.gguf.names import Tensor
from qwen35.gguf.rows import read_strip, strips
from qwen35.gguf.types import FLOATS
from qwen35.progress import Progress
from qwen35.threads import default_threads
from qwen35.verify.compared import Compared, RoleError, by_role
from qwen35.verify.memo import Memo

__all__ = ["BOUNDS", "compare"]

F32 = npt.NDArray[np.float32]

_BLOCK = 256

BOUNDS: dict[str, tuple[float, float]] = {
    "q8_0": (0.017, 0.004),
    "q6_K": (0.055, 0.04),
    "q5_K": (0.085, 0.03),
    "q5_1": (0.085, 0.03),
    "q5_0": (0.12, 0.05),
    "q4_K": (0.17, 0.065),
    "q4_1": (0.18, 0.06),
    "q4_0": (0.21, 0.08),
    "iq4_xs": (0.18, 0.065),
    "iq4_nl": (0.18, 0.065),
    "mxfp4": (0.24, 0.12),
    "q3_K": (0.31, 0.12),
    "q2_K": (0.57, 0.23),
}
"""Type to the largest error of a tensor and of a block of 256 weights.

The first is relative (root of summed squares), the second the root mean square over the block's
largest weight. They are 1.5 times the worst that ggml's own quantizers give on normal,
heavy-tailed, sparse and shifted weights, with and without importance matrices.
"""

NOT_FINITE = "a scale or weight is not finite"

_LOOSE = (1.1, 0.65)
"""For types of three bits and less, which a bound can only tell from noise."""


@dataclass
class _Faults:
    """Values of one tensor that are not what they must be: floats, and packed blocks."""

    values: int = 0
    blocks: int = 0


def compare(
    container: Container,
    tensors: Mapping[str, Tensor],
    reader: Reader | None,
    *,
    memo: Memo,
    threads: int | None,
    progress: Progress,
) -> tuple[list[RoleError], list[Finding]]:
    """Decode every tensor of a file; with a source, compare each.

    Args:
        container: the file.
        tensors: name to where its values come from: of the source, or made up from the keys.
        reader: of the source, or None.
        memo: what an unfinished check has seen, and where to note what this one sees.
        threads: tensors decoded at a time.
        progress: told of the bytes read.

    Returns:
        Errors for each role and type (none without a source), and findings.
    """
    check = _Check(container, reader, progress, memo)
    pairs = [(entry, tensors.get(name)) for name, entry in container.tensors.items()]
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        seen = list(pool.map(lambda pair: check.tensor(*pair), pairs))
    findings = [finding for one in seen for finding in one.findings]
    judged = [
        (tensor.slabs[0].item.role.name, entry.kind.name, one)
        for (entry, tensor), one in sorted(zip(pairs, seen, strict=True), key=_name)
        if tensor is not None and one.judged
    ]
    return by_role(judged), findings


def _name(row: tuple[tuple[Entry, Tensor | None], Compared]) -> str:
    return row[0][0].name


@dataclass(frozen=True)
class _Check:
    container: Container
    reader: Reader | None
    progress: Progress
    memo: Memo

    def tensor(self, entry: Entry, tensor: Tensor | None) -> Compared:
        """Check one tensor, unless an unfinished check has."""
        name = f"{self.container.path.name}/{entry.name}"
        seen = self.memo.get(name)
        result = Compared.from_json(seen) if seen else self._tensor(entry, tensor)
        self.memo.add(name, result.to_json())
        self.progress.advance(entry.nbytes, entry.name)
        return result

    def _tensor(self, entry: Entry, tensor: Tensor | None) -> Compared:
        """Check one tensor; what cannot be read becomes a finding."""
        result = Compared()
        try:
            if self.reader is None or tensor is None:
                result.findings += self._decoded(entry)
            else:
                self._compared(result, entry, tensor, self.reader)
        except InputError as error:
            message = str(error).removeprefix(f"{error.subject}: ")
            return Compared(findings=[Finding("decode", error.subject, message)])
        return result

    def _decoded(self, entry: Entry) -> Iterator[Finding]:
        row = entry.shape[-1]
        rows = entry.nbytes // entry.kind.size((row,))
        step = max(1, 2**20 // row)
        for first in range(0, rows, step):
            values = self._read(entry, first, min(step, rows - first))
            if not np.isfinite(values).all():
                yield self._finding("decode", entry, NOT_FINITE)
                return

    def _read(self, entry: Entry, first: int, count: int) -> F32:
        """Decode rows [first, first + count) as float32 [count, row]."""
        size = entry.kind.size((entry.shape[-1],))
        with self.container.path.open("rb") as file:
            file.seek(entry.begin + first * size)
            data = np.frombuffer(file.read(count * size), np.uint8)
        if data.size != count * size:
            raise InputError(entry.name, "the file ends within it")
        kind = GGMLQuantizationType(entry.kind.code)
        with np.errstate(over="ignore", invalid="ignore"):
            values: F32 = dequantize(data.reshape(count, size), kind)
        return values

    def _compared(self, result: Compared, entry: Entry, tensor: Tensor, reader: Reader) -> None:
        faults = _Faults()
        for strip in strips(tensor):
            expected = read_strip(reader, strip)
            found = self._read(entry, strip.start, strip.count)
            if not np.isfinite(found).all():
                result.findings.append(self._finding("decode", entry, NOT_FINITE))
                return
            _accumulate(result, faults, entry.kind.name, found, expected)
        result.judged = True
        result.findings += _judged(self.container, entry, result, faults)

    def _finding(self, check: str, entry: Entry, message: str) -> Finding:
        return Finding(check, f"{self.container.path.name}: {entry.name}", message)


def _accumulate(result: Compared, faults: _Faults, kind: str, found: F32, expected: F32) -> None:
    result.norm += float(np.square(expected, dtype=np.float64).sum())
    if kind in FLOATS:
        expected = _rounded(expected, kind)
        faults.values += int(np.count_nonzero(expected != found))
    difference = found - expected
    result.squared += float(np.square(difference, dtype=np.float64).sum())
    if kind not in FLOATS:
        faults.blocks += _bad_blocks(expected, difference, kind)


def _rounded(values: F32, kind: str) -> F32:
    if kind == "f16":
        return values.astype(np.float16).astype(np.float32)
    if kind == "bf16":
        from qwen35.codecs.floats import bf16_from_f32, f32_from

        return f32_from(bf16_from_f32(values.reshape(-1)), "BF16").reshape(values.shape)
    return values


def _bad_blocks(expected: F32, difference: F32, kind: str) -> int:
    """Count the blocks whose error is beyond what the type can make."""
    width = _BLOCK if expected.shape[-1] % _BLOCK == 0 else expected.shape[-1]
    _, bound = BOUNDS.get(kind, _LOOSE)
    largest = np.abs(expected.reshape(-1, width)).max(axis=1)
    error = np.sqrt(np.square(difference.reshape(-1, width)).mean(axis=1))
    return int(np.count_nonzero(error > bound * largest))


def _judged(
    container: Container, entry: Entry, seen: Compared, faults: _Faults
) -> Iterator[Finding]:
    subject, kind = f"{container.path.name}: {entry.name}", entry.kind.name
    if faults.values:
        yield Finding("values", subject, f"{faults.values} values differ from the source's")
        return
    relative: Any = np.sqrt(seen.squared / seen.norm) if seen.norm else np.sqrt(seen.squared)
    bound, _ = BOUNDS.get(kind, _LOOSE)
    if kind not in FLOATS and relative > bound:
        message = f"relative error {relative:.3f}, at most {bound} in {kind}"
        yield Finding("bound", subject, message)
    elif faults.blocks:
        message = f"{faults.blocks} blocks are farther from the source than {kind} can be"
        yield Finding("bound", subject, message)
