"""Numbers: every tensor decoded, hashed against the manifest and compared with the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.checkpoint.inventory import Item, inventory
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint, Reader
from qwen35.checkpoint.storage import FP8_BLOCK
from qwen35.codecs.floats import all_finite, f32_from
from qwen35.codecs.fp8 import fits
from qwen35.codecs.fp8_errors import Errors
from qwen35.codecs.nf4 import BLOCK
from qwen35.codecs.nf4_arrays import State, decode_blocks, encode_blocks
from qwen35.codecs.nf4_tables import LEVELS, dynamic_map
from qwen35.errors import Finding, InputError
from qwen35.progress import Progress, Silent
from qwen35.strips import (
    decoded,
    fp8_scales,
    nf4_absmax,
    nf4_state,
    not_finite,
    stored,
    tile_rows,
)
from qwen35.threads import default_threads
from qwen35.verify.compared import Compared, RoleError, by_role
from qwen35.verify.memo import Memo
from qwen35.verify.nf4 import same_mean, wrong_codes, wrong_scales

__all__ = ["Numbers", "check_hashes", "check_numbers"]

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Numbers:
    """What `check_numbers` saw.

    Args:
        roles: errors per role; none without a source.
        fp8: errors of each FP8 weight that was compared with an unpacked original, by name.
        identical: weights that are not FP8 and whose stored bytes are those of the source.
        findings: what is wrong.
    """

    roles: list[RoleError]
    fp8: dict[str, Errors]
    identical: int
    findings: list[Finding]


def check_hashes(
    checkpoint: Checkpoint, manifest: Mapping[str, Any], memo: Memo
) -> Iterator[Finding]:
    """Hash the safetensors files and compare with the manifest."""
    for name in checkpoint.file_sizes:
        entry = manifest["files"].get(name)
        if entry is None:
            yield Finding("hash", name, f"not listed in {MANIFEST_NAME}")
            continue
        digest = memo.sha256(checkpoint.folder() / name)
        if digest != entry["sha256"]:
            message = f"sha256 {digest[:12]}..., written as {entry['sha256'][:12]}..."
            yield Finding("hash", name, message)


_Key = tuple[str, int | None, int | None]


def _key(item: Item) -> _Key:
    return item.role.name, item.role.layer, item.role.expert


def check_numbers(
    artifact: Checkpoint,
    items: tuple[Item, ...],
    source: Checkpoint | None,
    *,
    only: Callable[[Item], bool] | None = None,
    memo: Memo | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Numbers:
    """Decode every weight; with a source, compare each with its original.

    Args:
        artifact: what is checked, with its files at hand.
        items: its weights, as the structural check matched them.
        source: the checkpoint it was made from.
        only: which weights to decode; all when None.
        memo: what an unfinished check has seen, and where to note what this one sees.
        threads: weights decoded at a time.
        progress: told of the bytes read.
    """
    progress = progress or Silent()
    originals = _originals(source, {_key(item) for item in items}) if source is not None else {}
    findings = _unmatched(items, originals) if source is not None else []
    chosen = [item for item in items if only is None or only(item)]
    progress.begin(f"checking {artifact.name}", sum(item.weight.nbytes for item in chosen))
    try:
        with Reader(artifact) as reader, Reader(source or artifact) as source_reader:
            run = _Comparison(reader, source_reader, originals, progress, memo)
            with ThreadPoolExecutor(threads or default_threads()) as pool:
                compared = list(zip(chosen, pool.map(run.weight, chosen), strict=True))
    finally:
        progress.end()
    for _, one in compared:
        findings += one.findings
    errors = {item.spec.name: one.fp8 for item, one in compared if one.fp8 is not None}
    identical = sum(one.identical for item, one in compared if item.weight.storage != "fp8")
    roles = by_role((item.role.name, item.weight.storage, one) for item, one in compared)
    return Numbers(roles if source is not None else [], errors, identical, findings)


def _originals(source: Checkpoint, wanted: Set[_Key]) -> dict[_Key, Item]:
    """Return the source's weights by key; fused experts one by one where they are wanted so."""
    originals: dict[_Key, Item] = {}
    for item in inventory(source):
        parts = [item]
        if _key(item) not in wanted:
            parts = list(item.experts()) or parts
        originals |= {_key(part): part for part in parts}
    return originals


def _unmatched(items: tuple[Item, ...], originals: Mapping[Any, Item]) -> list[Finding]:
    found = {_key(item) for item in items}
    findings = [
        Finding("source", item.weight.name, "the source has no such weight")
        for item in items
        if _key(item) not in originals
    ]
    whole = {scope for scope in ("visual", "mtp") if not any(i.role.scope == scope for i in items)}
    findings += [
        Finding("source", item.weight.name, "in the source, but not here")
        for key, item in originals.items()
        if key not in found and item.role.scope not in whole
    ]
    return findings


@dataclass(frozen=True)
class _Comparison:
    reader: Reader
    source_reader: Reader
    originals: Mapping[_Key, Item]
    progress: Progress
    memo: Memo | None

    def weight(self, item: Item) -> Compared:
        """Check one weight, unless an unfinished check has."""
        seen = self.memo.get(item.weight.name) if self.memo else None
        result = Compared.from_json(seen) if seen else self._weight(item)
        if self.memo:
            self.memo.add(item.weight.name, result.to_json())
        self.progress.advance(item.weight.nbytes, item.weight.name)
        return result

    def _weight(self, item: Item) -> Compared:
        """Check one weight; what cannot be read or decoded becomes a finding."""
        result = Compared()
        original = self.originals.get(_key(item))
        try:
            if original is None:
                self._decode(item)
            elif _same_storage(item, original):
                self._same(result, item, original)
            elif item.weight.storage == "nf4":
                self._nf4(result, item, original)
            elif item.weight.storage == "fp8" and fits(item.spec.shape):
                self._fp8(result, item, original)
            else:
                self._values(result, item, original)
        except InputError as error:
            message = str(error).removeprefix(f"{error.subject}: ")
            result.findings.append(Finding("decode", error.subject, message))
        return result

    def _decode(self, item: Item) -> None:
        if item.weight.storage == "plain":
            for _ in stored(self.reader, item.weight.main):
                pass
        else:
            for _ in decoded(self.reader, item.weight, item.spec):
                pass

    def _same(self, result: Compared, item: Item, original: Item) -> None:
        """Both are stored alike: the bytes must be the same."""
        pairs = zip(item.weight.parts, original.weight.parts, strict=True)
        for here, there in pairs:
            pieces = stored(self.reader, here), stored(self.source_reader, there, check=False)
            wrong = sum(
                int(np.count_nonzero(a.view(np.uint8) != b.view(np.uint8)))
                for a, b in zip(*pieces, strict=True)
            )
            if wrong:
                message = f"{wrong} bytes differ from the source"
                result.findings.append(Finding("bytes", here.spec.name, message))
        result.identical = not result.findings
        if result.findings:
            self._values(result, item, original, report=False)

    def _values(self, result: Compared, item: Item, original: Item, *, report: bool = True) -> None:
        """Compare decoded values; they must be equal."""
        here = decoded(self.reader, item.weight, item.spec)
        there = decoded(self.source_reader, original.weight, original.spec)
        wrong = 0
        for a, b in zip(here, there, strict=True):
            got, expected = f32_from(a, item.spec.dtype), f32_from(b, original.spec.dtype)
            wrong += int(np.count_nonzero(got != expected))
            _accumulate(result, got, expected)
        if wrong and report:
            _found(result, item, "values", f"{wrong} of {original.spec.numel} values differ")

    def _fp8(self, result: Compared, item: Item, original: Item) -> None:
        """Compare every code with what its scale can say at best."""
        weight, spec = item.weight, item.spec
        scales = fp8_scales(self.reader, weight)
        result.fp8 = errors = Errors()
        row = done = 0
        pieces = decoded(self.source_reader, original.weight, original.spec, strip=tile_rows(spec))
        for piece in pieces:
            values = piece.reshape(-1, spec.shape[1])
            codes = np.empty(values.shape, np.uint8)
            self.reader.read_into(weight.main, done, codes.data.cast("B"))
            if not all_finite(codes, "F8_E4M3"):
                raise not_finite(weight.name)
            count = len(values) // FP8_BLOCK
            errors.add(values, original.spec.dtype, codes, scales[row : row + count])
            row, done = row + count, done + values.size
        result.squared, result.norm = errors.squared, errors.norm
        if errors.misplaced:
            message = (
                f"{errors.misplaced} of {spec.numel} values are further from the source than "
                "rounding to E4M3 with these scales explains"
            )
            _found(result, item, "codes", message)

    def _nf4(self, result: Compared, item: Item, original: Item) -> None:
        """Compare packed codes and decoded absmax with what the source's blocks must give."""
        weight, spec = item.weight, item.spec
        state = nf4_state(self.reader, weight, spec)
        absmax = nf4_absmax(self.reader, weight, state)
        self._constants(result, item)
        true_absmax = np.empty_like(absmax)
        done = wrong = 0
        for piece in decoded(self.source_reader, original.weight, original.spec):
            packed = np.empty(piece.size // 2, np.uint8)
            self.reader.read_into(weight.main, done // 2, packed.data)
            blocks = slice(done // BLOCK, (done + piece.size) // BLOCK)
            expected = np.empty_like(packed)
            encode_blocks(piece, original.spec.dtype, true_absmax[blocks], expected)
            values = f32_from(piece, original.spec.dtype)
            if not np.array_equal(packed, expected):
                wrong += wrong_codes(packed, expected, values, true_absmax[blocks])
            _accumulate(result, decode_blocks(packed, absmax[blocks], LEVELS), values)
            done += piece.size
        if wrong:
            message = f"{wrong} of {spec.numel} codes are not the nearest level"
            _found(result, item, "codes", message)
        self._scales(result, item, state, true_absmax)

    def _scales(self, result: Compared, item: Item, state: State, true: F32) -> None:
        """Compare the stored scales with the largest magnitudes of the source's blocks."""
        absmax = self._part(item, ".absmax")
        if not state.nested:
            off = int(np.count_nonzero(absmax.view(np.float32) != true))
        elif not same_mean(state.offset, true):
            off = len(true)
        else:
            nested = self._part(item, ".nested_absmax").view(np.float32)
            off = wrong_scales(absmax, nested, state.offset, true)
        if off:
            message = f"{off} of {len(true)} scales are not those of the source"
            _found(result, item, "absmax", message)

    def _part(self, item: Item, suffix: str) -> Array:
        part = item.weight.part(suffix)
        assert part is not None  # checked by nf4_state
        return np.frombuffer(self.reader.read(part), np.uint8)

    def _constants(self, result: Compared, item: Item) -> None:
        for suffix, expected in ((".quant_map", LEVELS), (".nested_quant_map", dynamic_map())):
            part = item.weight.part(suffix)
            if part is not None and bytes(self.reader.read(part)) != expected.tobytes():
                message = f"{part.spec.name} is not bitsandbytes' table"
                _found(result, item, "constants", message)


def _same_storage(item: Item, original: Item) -> bool:
    here, there = item.weight, original.weight
    return (
        here.storage == there.storage
        and len(here.parts) == len(there.parts)
        and all(
            (a.spec.dtype, a.spec.shape) == (b.spec.dtype, b.spec.shape)
            for a, b in zip(here.parts, there.parts, strict=True)
        )
    )


def _found(result: Compared, item: Item, check: str, message: str) -> None:
    result.findings.append(Finding(check, item.weight.name, message))


def _accumulate(result: Compared, got: F32, expected: F32) -> None:
    difference = (got - expected).astype(np.float64)
    result.squared += float(difference @ difference)
    wide = expected.astype(np.float64)
    result.norm += float(wide @ wide)
