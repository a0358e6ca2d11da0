"""NF4 and FP8: whether the weights of each role in each layer are packed, or stay as they are."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen35.checkpoint.source import Checkpoint, Reader
from qwen35.checkpoint.storage import FP8_BLOCK
from qwen35.codecs.floats import f32_from
from qwen35.codecs.fp8 import Calibration
from qwen35.codecs.fp8_arrays import decode_rows, encode_rows
from qwen35.codecs.nf4 import BLOCK
from qwen35.codecs.nf4_arrays import decode_blocks, encode_blocks
from qwen35.codecs.nf4_tables import LEVELS
from qwen35.convert import convert
from qwen35.model.fused import fused_group
from qwen35.plan.plan import Plan, make_plan
from qwen35.plan.recipe import load_recipe
from qwen35.plan.step import Step
from qwen35.progress import Progress
from qwen35.strips import decoded, tile_rows
from qwen35.tune.rules import recipe_text
from qwen35.tune.units import Allocation, Unit

__all__ = ["PackedSpace"]

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PackedSpace:
    """The choices for `checkpoint` in a packed format.

    Args:
        checkpoint: the source, with its weights at hand.
        format: ``nf4`` or ``fp8``, the name of the built-in recipe too.
    """

    checkpoint: Checkpoint
    format: str

    exact = "plain"

    @cached_property
    def _plan(self) -> Plan:
        return make_plan(self.checkpoint, load_recipe(self.format))

    @cached_property
    def _members(self) -> dict[str, list[Step]]:
        """Unit to its steps: those of one role, or of roles that engines join, in one layer."""
        members: dict[str, list[Step]] = defaultdict(list)
        for step in self._plan.steps:
            if step.op == self.format and step.role.scope == "text":
                group = fused_group(step.role) if self.format == "fp8" else None
                kind = step.role.name if group is None else group[2]
                members[f"{kind}@{step.role.layer}"].append(step)
        return members

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One for each role, or each matrix that engines join, in each layer."""
        return tuple(
            Unit(
                name,
                tuple(dict.fromkeys(step.role.name for step in steps)),
                steps[0].role.layer,
                sum(step.spec.numel for step in steps),
                {
                    self.format: sum(step.nbytes for step in steps),
                    self.exact: sum(step.spec.nbytes for step in steps),
                },
            )
            for name, steps in self._members.items()
        )

    @property
    def weights(self) -> int:
        """All weights of the artifact."""
        return sum(step.spec.numel for step in self._plan.steps if step.op != "drop")

    def size(self, chosen: Allocation) -> int:
        """Return the bytes of the weight files."""
        return sum(file.nbytes for file in self._planned(chosen).files)

    def errors(self, threads: int, progress: Progress) -> dict[str, dict[str, float]]:
        """Pack and decode every weight; see `Space.errors`.

        NF4's statistics are not quantized once more here, which would add about a hundredth.
        """
        jobs = [(name, step) for name, steps in self._members.items() for step in steps]
        progress.begin("errors of packing", sum(step.spec.numel for _, step in jobs))
        squared: dict[str, float] = defaultdict(float)
        norms: dict[str, float] = defaultdict(float)
        try:
            with Reader(self.checkpoint) as reader, ThreadPoolExecutor(threads) as pool:
                rows = pool.map(lambda job: self._step(reader, job[1]), jobs)
                for (name, step), (norm, error) in zip(jobs, rows, strict=True):
                    norms[name] += norm
                    squared[name] += error
                    progress.advance(step.spec.numel, step.weight.name)
        finally:
            progress.end()
        return {
            unit.name: {self.format: squared[unit.name] / (norms[unit.name] or 1), self.exact: 0.0}
            for unit in self.units
        }

    def _step(self, reader: Reader, step: Step) -> tuple[float, float]:
        code = _through_nf4 if self.format == "nf4" else _through_fp8
        strip = tile_rows(step.spec) if self.format == "fp8" else BLOCK * 2**14
        norm = error = 0.0
        for piece in decoded(reader, step.weight, step.spec, strip=strip):
            values = f32_from(piece, step.spec.dtype)
            difference = values - code(piece, step).reshape(values.shape)
            norm += float(np.einsum("i,i->", values, values, dtype=np.float64))
            error += float(np.einsum("i,i->", difference, difference, dtype=np.float64))
        return norm, error

    def recipe(self, chosen: Allocation, description: str, *, explicit: bool = False) -> str:
        """Return a recipe for `qwen35 convert`."""
        return recipe_text(
            self.format,
            self.units,
            chosen,
            description=description,
            base=self.format,
            default=self.format,
            explicit=explicit,
        )

    def _planned(self, chosen: Allocation) -> Plan:
        if self.format not in chosen.values():
            return make_plan(self.checkpoint, load_recipe("bf16"))
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(self.recipe(chosen, "a probe"))
            file.flush()
            return make_plan(self.checkpoint, load_recipe(file.name))

    def reference(self, folder: Path) -> str:  # noqa: ARG002
        """Return the source itself, for transformers."""
        return str(self.checkpoint.folder())

    def make(self, chosen: Allocation, out: Path, threads: int) -> str:
        """Write an artifact by `chosen`."""
        return str(convert(self._planned(chosen), out, threads=threads).out)


def _through_nf4(piece: Array, step: Step) -> F32:
    absmax = np.empty(piece.size // BLOCK, np.float32)
    packed = np.empty(piece.size // 2, np.uint8)
    encode_blocks(piece, step.spec.dtype, absmax, packed)
    return decode_blocks(packed, absmax, LEVELS)


def _through_fp8(piece: Array, step: Step) -> F32:
    values = piece.reshape(-1, step.spec.shape[1])
    codes = np.empty(values.shape, np.uint8)
    scales = np.empty((len(values) // FP8_BLOCK, values.shape[1] // FP8_BLOCK), np.uint16)
    encode_rows(values, step.spec.dtype, Calibration(), None, codes, scales)
    return decode_rows(codes, f32_from(scales, "BF16"))
