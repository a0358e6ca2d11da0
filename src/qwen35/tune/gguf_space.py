"""GGUF: a type of ggml for the tensors of each role in each layer."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from qwen35.checkpoint.source import Checkpoint, Reader
from qwen35.errors import UsageError
from qwen35.gguf.imatrix import Imatrix
from qwen35.gguf.kernel import encode
from qwen35.gguf.metadata import ALIGNMENT
from qwen35.gguf.names import Tensor
from qwen35.gguf.plan import Asked, GgufFile, make_plan
from qwen35.gguf.rows import Strip, read_strip, strips
from qwen35.gguf.rules import load_recipe
from qwen35.gguf.types import GGML_TYPES, NEEDS_IMATRIX, fallback, quantizable
from qwen35.gguf.write import write
from qwen35.progress import Progress
from qwen35.tune.rules import recipe_text
from qwen35.tune.units import Allocation, Unit

__all__ = ["DEFAULT_TYPES", "GgufSpace"]

F32 = npt.NDArray[np.float32]

DEFAULT_TYPES = ("q3_K", "iq4_xs", "q4_K", "q5_K", "q6_K", "q8_0", "f16")
"""Types to choose from, the last one exact enough to count as no quantization at all."""

_BASE = "Q4_K_M"
"""File type of what is written: it decides what has no unit, such as the MTP layer."""


@dataclass(frozen=True)
class GgufSpace:
    """The choices for GGUF files of `checkpoint`.

    Args:
        checkpoint: the source, with its weights at hand.
        types: types to choose from, from small to large.
        imatrix: an importance matrix, for errors and artifacts alike.
    """

    checkpoint: Checkpoint
    types: tuple[str, ...]
    imatrix: Imatrix | None = None

    format = "gguf"
    exact = "f16"

    @cached_property
    def _file(self) -> GgufFile:
        asked = Asked((_BASE,), load_recipe("mix"), imatrix=self.imatrix)
        return make_plan(self.checkpoint, asked).files[0]

    @cached_property
    def _members(self) -> dict[str, list[Tensor]]:
        """Unit to its tensors: those of one role in one layer that can be quantized."""
        members: dict[str, list[Tensor]] = defaultdict(list)
        for tensor in self._file.tensors:
            role = tensor.slabs[0].item.role
            if role.scope == "text" and quantizable(tensor.name, tensor.shape):
                members[role.name + (f"@{role.layer}" if role.layer is not None else "")].append(
                    tensor
                )
        return members

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One for each role in each layer."""
        units = []
        for name, tensors in self._members.items():
            sizes = {
                kind: sum(_stored(tensor, kind) for tensor in tensors)
                for kind in self.types
                if all(self._legal(tensor, kind) for tensor in tensors)
            }
            role = tensors[0].slabs[0].item.role
            numel = sum(prod(tensor.shape) for tensor in tensors)
            units.append(Unit(name, (role.name,), role.layer, numel, sizes))
        stuck = [unit.name for unit in units if not unit.sizes]
        if stuck:
            raise UsageError("--types", f"none fits {stuck[0]}", hint="add q8_0 or f16")
        return tuple(units)

    def _legal(self, tensor: Tensor, kind: str) -> bool:
        if fallback(GGML_TYPES[kind], tensor.row) is not GGML_TYPES[kind]:
            return False
        known = self.imatrix is not None and tensor.name in self.imatrix.entries
        return known or kind not in NEEDS_IMATRIX

    @property
    def weights(self) -> int:
        """All weights of the file."""
        return sum(prod(tensor.shape) for tensor in self._file.tensors)

    def size(self, chosen: Allocation) -> int:
        """Return the bytes of the file."""
        kinds = dict(self._file.kinds)
        for name, tensors in self._members.items():
            kinds |= {tensor.name: chosen[name] for tensor in tensors}
        return self._file.size_with(kinds)

    def errors(self, threads: int, progress: Progress) -> dict[str, dict[str, float]]:
        """Quantize and decode every tensor in each type; see `Space.errors`.

        The error of a weight counts as much as the mean square of its input, where an importance
        matrix knows it: the sum is then that of the product's squared error, relative to the
        product's square.
        """
        found: dict[str, dict[str, float]] = {}
        jobs = [(unit, strip) for unit in self.units for strip in self._strips(unit)]
        progress.begin("errors of types", sum(s.count * s.tensor.row for _, s in jobs))
        squared: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        norms: dict[str, float] = defaultdict(float)
        try:
            with Reader(self.checkpoint) as reader, ThreadPoolExecutor(threads) as pool:

                def work(job: tuple[Unit, Strip]) -> tuple[float, dict[str, float]]:
                    unit, strip = job
                    return self._strip(reader, strip, list(unit.sizes))

                for (unit, strip), (norm, errors) in zip(jobs, pool.map(work, jobs), strict=True):
                    norms[unit.name] += norm
                    for kind, error in errors.items():
                        squared[unit.name][kind] += error
                    progress.advance(strip.count * strip.tensor.row, strip.tensor.name)
        finally:
            progress.end()
        for unit in self.units:
            norm = norms[unit.name] or 1.0
            found[unit.name] = {kind: value / norm for kind, value in squared[unit.name].items()}
        return found

    def _strips(self, unit: Unit) -> Iterator[Strip]:
        for tensor in self._members[unit.name]:
            yield from strips(tensor)

    def _strip(
        self, reader: Reader, strip: Strip, kinds: Sequence[str]
    ) -> tuple[float, dict[str, float]]:
        rows = read_strip(reader, strip)
        tensor = strip.tensor
        entry = self.imatrix.entries.get(tensor.name) if self.imatrix else None
        weight = entry.slice(strip.slab, tensor.row) if entry else None
        errors = {}
        for kind in kinds:
            data = np.frombuffer(encode(tensor.name, rows, kind, weight), np.uint8)
            code = GGMLQuantizationType(GGML_TYPES[kind].code)
            values = dequantize(data.reshape(strip.count, -1), code)
            errors[kind] = _weighted(rows - values.reshape(rows.shape), weight)
        return _weighted(rows, weight), errors

    def recipe(self, chosen: Allocation, description: str, *, explicit: bool = False) -> str:
        """Return a recipe for `qwen35 gguf`."""
        return recipe_text(
            self.format, self.units, chosen, description=description, base="mix", explicit=explicit
        )

    def reference(self, folder: Path) -> str:
        """Write the model in F16, for llama.cpp."""
        asked = Asked(("F16",), load_recipe("mix"))
        plan = make_plan(self.checkpoint, asked)
        return str(write(plan, folder / "F16").out)

    def make(self, chosen: Allocation, out: Path, threads: int) -> str:
        """Write a GGUF file by `chosen`."""
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(self.recipe(chosen, "a probe"))
            file.flush()
            recipe = replace(load_recipe(file.name), name="tuned")
        asked = Asked((_BASE,), recipe, imatrix=self.imatrix)
        return str(write(make_plan(self.checkpoint, asked), out, threads=threads).out)


def _stored(tensor: Tensor, kind: str) -> int:
    size = GGML_TYPES[kind].size(tensor.shape)
    return size + -size % ALIGNMENT


def _weighted(values: F32, weight: F32 | None) -> float:
    """Return the sum of squares, each column counting by its weight; values: [rows, row]."""
    columns = np.einsum("ij,ij->j", values, values, dtype=np.float64)
    return float(columns.sum() if weight is None else columns @ weight)
