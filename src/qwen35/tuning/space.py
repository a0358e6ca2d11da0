"""The search space of one checkpoint in one format: units, their errors, artifacts."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.checkpoint.source import Checkpoint, Reader
from qwen35.codecs.codec import Codec
from qwen35.codecs.devices import Kernels, kernels_for
from qwen35.codecs.roundtrip import RoundTrip
from qwen35.errors import UsageError
from qwen35.execution.survey import Survey
from qwen35.model.dimension_keys import shape_keys
from qwen35.model.fused import fused_group
from qwen35.planning.containers import container_of
from qwen35.planning.output_plan import Plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rows import RowChunk
from qwen35.planning.rules import Recipe
from qwen35.planning.step import Step
from qwen35.progress import Progress
from qwen35.tensors import TensorSpec
from qwen35.tuning.allocation_recipe import recipe_text
from qwen35.tuning.tunable import Tunable, tunable_of
from qwen35.tuning.units import Allocation, Unit
from qwen35.writing.write import write

if TYPE_CHECKING:
    from qwen35.array_types import F32
    from qwen35.planning.gguf_files.imatrix import Imatrix

__all__ = ["ChoiceSpace"]


@dataclass(frozen=True)
class ChoiceSpace:
    """The choices for one checkpoint in one format.

    Args:
        checkpoint: the source.
        format: of the recipes.
        choices: from small to large.
        imatrix: importance matrix, for both errors and artifacts.
    """

    checkpoint: Checkpoint
    format: str
    choices: tuple[str, ...]
    imatrix: Imatrix | None = None

    @property
    def _tunable(self) -> Tunable:
        return tunable_of(self.format)

    @property
    def exact(self) -> str:
        """The lossless choice."""
        return self._tunable.exact

    @cached_property
    def _plan(self) -> Plan:
        """The plan by the base recipe."""
        base = load_recipe(self._tunable.base(self.format), container_of(self.format).name)
        return self._tunable.plan(self.checkpoint, base, self.imatrix)

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user, on the model that is tuned."""
        return self._plan.notes

    @cached_property
    def _codecs(self) -> dict[str, Codec]:
        return {choice: self._tunable.codec(choice) for choice in self.choices}

    @cached_property
    def members(self) -> dict[str, list[Step]]:
        """Unit to its steps: those of one role, or of roles that engines join, in one layer.

        Engines load joined roles as one matrix, which a codec may require to be in one type.
        """
        joined = any(codec.joined for codec in self._codecs.values())
        members: dict[str, list[Step]] = defaultdict(list)
        for step in self._tunable.steps(self._plan):
            role = step.role
            if role.scope == "text":
                group = fused_group(role) if joined else None
                kind = group[2] if group else role.name
                members[kind if role.layer is None else f"{kind}@{role.layer}"].append(step)
        return members

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """One unit per layer and role, or joined matrix."""
        units = tuple(self._unit(name, steps) for name, steps in self.members.items())
        if not units:
            found = f"{self.format}, but all weights that it packs are packed already"
            raise UsageError("--format", found, hint="tune with the original checkpoint")
        stuck = [unit.name for unit in units if not unit.sizes]
        if stuck:
            found = f"none fits {stuck[0]}{self._misfit(self.members[stuck[0]])}"
            raise UsageError("--types", found, hint=self._tunable.remedy)
        return units

    def _misfit(self, steps: Sequence[Step]) -> str:
        """Return the dimension that fits no codec, if that is what is wrong."""
        reasons = (codec.fits(_spec(step)) for step in steps for codec in self._codecs.values())
        reason = next((text for text in reasons if text), "")
        return f" ({reason}, by {shape_keys(steps[0].role.info)})" if reason else ""

    def _unit(self, name: str, steps: Sequence[Step]) -> Unit:
        sizes = {
            choice: sum(self._stored(step, codec) for step in steps)
            for choice, codec in self._codecs.items()
            if all(self._legal(step, codec) for step in steps)
        }
        roles = tuple(dict.fromkeys(step.role.name for step in steps))
        numel = sum(prod(step.rows.shape) for step in steps)
        return Unit(name, roles, steps[0].role.layer, numel, sizes)

    def _legal(self, step: Step, codec: Codec) -> bool:
        """Return whether a codec fits a step's weight and has the importance it needs."""
        if codec.fits(_spec(step)) or not codec.packs(step.role):
            return False
        return not codec.needs_importance or self._plan.options.importance(step, 0) is not None

    def _stored(self, step: Step, codec: Codec) -> int:
        return sum(self._tunable.stored(out.nbytes) for out in codec.layout(_spec(step)))

    @property
    def weights(self) -> int:
        """Number of weights in the artifact, for bits per weight."""
        return sum(prod(step.rows.shape) for step in self._plan.written)

    @property
    def smallest(self) -> Allocation:
        """The choice of fewest bytes for every unit."""
        return {unit.name: min(unit.sizes, key=lambda c: unit.sizes[c]) for unit in self.units}

    def size(self, chosen: Allocation) -> int:
        """Return the exact bytes of an artifact's weight files."""
        kinds = {
            step.outputs[0].name: chosen[name]
            for name, steps in self.members.items()
            for step in steps
        }
        return self._tunable.size(self._plan, kinds, lambda: self._planned(chosen))

    def errors(self, threads: int, progress: Progress) -> dict[str, dict[str, float]]:
        """Measure the relative squared error of every unit in each of its choices.

        With an importance matrix, a weight's squared error is multiplied by the mean square of its
        input; the sum is then the squared error of the product, relative to the product's square.
        """
        jobs = [
            (unit, step, part)
            for unit in self.units
            for step in self.members[unit.name]
            for part in self._parts(step)
        ]
        squared: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        norms: dict[str, float] = defaultdict(float)
        progress.begin("quantization errors", sum(_numel(step, part) for _, step, part in jobs))
        [kernels] = kernels_for("cpu")
        survey = Survey()
        try:
            with Reader(self.checkpoint) as reader, ThreadPoolExecutor(threads) as pool:

                def work(job: tuple[Unit, Step, list[RowChunk]]) -> tuple[float, dict[str, float]]:
                    unit, step, part = job
                    packed = {c: self._codecs[c] for c in unit.sizes if c != self.exact}
                    errors = _RowErrors(self._plan, step, part, packed, kernels, survey)
                    return errors.measure(reader)

                # In order of the jobs, so that sums do not depend on the threads' timing.
                results = pool.map(work, jobs)
                for (unit, step, part), (norm, errors) in zip(jobs, results, strict=True):
                    norms[unit.name] += norm
                    for choice, error in errors.items():
                        squared[unit.name][choice] += error
                    progress.advance(_numel(step, part), step.weight.name)
        finally:
            progress.end()
        return {
            unit.name: {c: squared[unit.name][c] / (norms[unit.name] or 1.0) for c in unit.sizes}
            for unit in self.units
        }

    def _parts(self, step: Step) -> Iterator[list[RowChunk]]:
        """Yield the chunks to encode together: single ones, or all of a weight."""
        codecs = [codec for choice, codec in self._codecs.items() if choice != self.exact]
        grain = max((codec.grain(step.spec) for codec in codecs), default=1)
        chunks = step.rows.chunks(grain)
        # a codec that surveys has a scale for each matrix: rows of several stay together
        alone = len(step.rows.shape) == 2 or not any(codec.surveys for codec in codecs)
        if alone and all(codec.independent for codec in codecs):
            yield from ([chunk] for chunk in chunks)
        else:
            yield list(chunks)

    def recipe(self, chosen: Allocation, description: str, *, explicit: bool = False) -> str:
        """Return the TOML recipe of an allocation."""
        return recipe_text(
            self.format,
            self.units,
            chosen,
            description=description,
            base=self._tunable.base(self.format),
            default=self._tunable.default_action(self.format),
            explicit=explicit,
        )

    def _planned(self, chosen: Allocation) -> Plan:
        return self._tunable.plan(self.checkpoint, self._recipe(chosen), self.imatrix)

    def _recipe(self, chosen: Allocation) -> Recipe:
        """Return the recipe of an allocation, loaded from its text like a user's.

        A packed format refuses a recipe that packs nothing, so that case has a built-in recipe.
        """
        container, unpacked = container_of(self.format).name, self._tunable.exact_recipe
        if unpacked and set(chosen.values()) == {self.exact}:
            return load_recipe(unpacked, container)
        with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
            file.write(self.recipe(chosen, "a probe"))
            file.flush()
            # The temporary file's random name must not become the recipe's.
            return replace(load_recipe(file.name, container), name="tuned")

    def reference(self, folder: Path) -> str:
        """Return the unquantized model for the engine that runs artifacts; write it if needed."""
        return self._tunable.reference(self.checkpoint, folder)

    def make(self, chosen: Allocation, out: Path, threads: int) -> str:
        """Write an artifact; return its path."""
        return str(write(self._planned(chosen), out, keep=False, threads=threads).out)


def _spec(step: Step) -> TensorSpec:
    return TensorSpec(step.targets[0].name, step.spec.dtype, step.rows.shape)


def _numel(step: Step, part: Sequence[RowChunk]) -> int:
    return sum(chunk.count for chunk in part) * step.rows.row


@dataclass(frozen=True)
class _RowErrors:
    """Errors of some rows of a weight in several codecs.

    Args:
        plan: the plan of `step`.
        step: the weight's step.
        chunks: the rows: one chunk, or all.
        codecs: choice to codec.
        kernels: encoding kernels.
        survey: the largest magnitudes of weights.
    """

    plan: Plan
    step: Step
    chunks: list[RowChunk]
    codecs: dict[str, Codec]
    kernels: Kernels
    survey: Survey

    def measure(self, reader: Reader) -> tuple[float, dict[str, float]]:
        """Return the sums of squares of the values, and of the errors of each choice.

        Memory is one piece and the encoded rows. Pieces are read a second time for the comparison,
        which is cheap because they were just read.
        """
        from qwen35.codecs.floats import f32_from  # late: pulls in numpy

        trips = self._trips(reader)
        opened = self.step.rows.open(reader)
        for chunk in self.chunks:
            piece = opened.piece(chunk, self._importance(chunk))
            for trip in trips.values():
                trip.add(piece)
        for trip in trips.values():
            trip.finish()
        norm, errors = 0.0, dict.fromkeys(trips, 0.0)
        for chunk in self.chunks:
            piece = opened.piece(chunk, self._importance(chunk))
            values = f32_from(piece.values, piece.dtype)
            norm += _weighted(values, piece.importance)
            for choice, trip in trips.items():
                errors[choice] += _weighted(values - trip.decoded(piece), piece.importance)
        return norm, errors

    def _trips(self, reader: Reader) -> dict[str, RoundTrip]:
        rows, [first, *more] = self.step.rows, self.chunks
        begin = 0 if more else first.slab * rows.count + first.first
        count = sum(chunk.count for chunk in self.chunks)
        # all of a weight in its own shape: experts have scales of their own
        shape = rows.shape if count == prod(rows.shape[:-1]) else (count, rows.row)
        spec = TensorSpec(self.step.targets[0].name, self.step.spec.dtype, shape)
        return {
            choice: RoundTrip(
                codec,
                spec,
                first=begin,
                settings=self.plan.settings,
                kernel=self.kernels.get(codec.name),
                largest=self.survey.of_rows(self.step, reader) if codec.surveys else None,
            )
            for choice, codec in self.codecs.items()
        }

    def _importance(self, chunk: RowChunk) -> F32 | None:
        return self.plan.options.importance(self.step, chunk.slab)


def _weighted(values: F32, weight: F32 | None) -> float:
    """Return the sum of squares weighted by column; values: [rows, row]."""
    import numpy as np

    columns = np.einsum("ij,ij->j", values, values, dtype=np.float64)
    return float(columns.sum() if weight is None else columns @ weight)
