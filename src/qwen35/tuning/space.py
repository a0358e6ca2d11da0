"""The search space of one checkpoint in one format: units, their choices, artifacts."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.codec import Codec
from qwen35.errors import UsageError
from qwen35.model.dimension_keys import shape_keys
from qwen35.model.fused import fused_group
from qwen35.model.roles import Role
from qwen35.planning.containers import container_of
from qwen35.planning.output_plan import Plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rules import Recipe
from qwen35.planning.step import Step
from qwen35.tensors import TensorSpec
from qwen35.tuning.allocation_recipe import recipe_text
from qwen35.tuning.tunable import Tunable, tunable_of
from qwen35.tuning.units import Allocation, Unit
from qwen35.writing.write import write

if TYPE_CHECKING:
    from qwen35.codecs.input_quantizers import InputQuantizer
    from qwen35.planning.gguf_files.imatrix import Imatrix

__all__ = ["ChoiceSpace"]


@dataclass(frozen=True)
class ChoiceSpace:
    """The choices for one checkpoint in one format.

    Args:
        checkpoint: the source.
        format: of the recipes.
        choices: from small to large.
        imatrix: importance matrix, for both prices and artifacts.
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

    @property
    def needs(self) -> str:
        """The flags that a recipe must be used with to be of the size that it was chosen for."""
        return self._tunable.needs

    @cached_property
    def plan(self) -> Plan:
        """The plan by the base recipe."""
        base = load_recipe(self._tunable.base(self.format), container_of(self.format).name)
        return self._tunable.plan(self.checkpoint, base, self.imatrix)

    @cached_property
    def _by_name(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    def unit(self, name: str) -> Unit:
        """Return the unit of this name."""
        return self._by_name[name]

    def packed(self, unit: str) -> dict[str, Codec]:
        """Return the lossy choices of a unit, each with its codec."""
        return {c: self._codecs[c] for c in self.unit(unit).sizes if c != self.exact}

    def input_rounding(self, choice: str) -> InputQuantizer | None:
        """Return what the engine does to the inputs of products with a choice; None if nothing."""
        return None if choice == self.exact else self._tunable.input_rounding(choice)

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user, on the model that is tuned."""
        return self.plan.notes

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
        for step in self._tunable.steps(self.plan):
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
        roles = tuple(dict.fromkeys(self._ruled(step.role) for step in steps))
        numel = sum(prod(step.rows.shape) for step in steps)
        return Unit(name, roles, steps[0].role.layer, numel, sizes)

    @cached_property
    def _stored_roles(self) -> set[tuple[int | None, str]]:
        items = take(self.checkpoint, tower=False)[1]
        return {(item.role.layer, item.role.name) for item in items if item.role.scope == "text"}

    def _ruled(self, role: Role) -> str:
        """Return the role that rules see: experts are packed one by one, out of a stack."""
        stack = f"{role.name.rpartition('.')[0]}.gate_up_proj"
        stacked = (role.layer, role.name) not in self._stored_roles
        return stack if stacked and (role.layer, stack) in self._stored_roles else role.name

    def _legal(self, step: Step, codec: Codec) -> bool:
        """Return whether a codec fits a step's weight and has the importance it needs."""
        if codec.fits(_spec(step)) or not codec.packs(step.role):
            return False
        return not codec.needs_importance or self.plan.options.importance(step, 0) is not None

    def _stored(self, step: Step, codec: Codec) -> int:
        return sum(self._tunable.stored(out.nbytes) for out in codec.layout(_spec(step)))

    def packs_nothing(self, chosen: Allocation) -> bool:
        """Return whether an allocation is no recipe: `qwen35 convert` refuses to pack nothing."""
        return bool(self._tunable.exact_recipe) and set(chosen.values()) == {self.exact}

    @property
    def weights(self) -> int:
        """Number of weights in the artifact, for bits per weight."""
        return sum(prod(step.rows.shape) for step in self.plan.written)

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
        return self._tunable.size(self.plan, kinds, lambda: self._planned(chosen))

    @property
    def loaded(self) -> int:
        """Least bytes of memory that an engine needs for an artifact and the original."""
        loaded = self._tunable.loaded
        exact = {unit.name: self.exact for unit in self.units}
        if loaded:
            return 2 * loaded * self.weights
        return self.size(exact) + self.size(self.smallest)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of the weight files that no choice changes."""
        units = {unit.name: unit for unit in self.units}
        return self.size(self.smallest) - sum(
            units[name].sizes[choice] for name, choice in self.smallest.items()
        )

    def read_share(self, unit: Unit) -> Fraction:
        """Return the share of a unit's bytes that computing one token reads.

        Each token reaches some of the experts, and looks up one row of an embedding that is not the
        head as well.
        """
        info, config = self.members[unit.name][0].role.info, self.checkpoint.config
        if info.kind == "experts":
            return Fraction(config.experts_per_token, config.dims["experts"])
        if info.kind == "embedding" and not config.tied:
            return Fraction(1, config.dims["vocab"])
        return Fraction(1)

    @cached_property
    def fixed_active(self) -> int:
        """Bytes that computing one token reads whatever is chosen: norms, convolutions, routers."""
        chosen = {id(step) for steps in self.members.values() for step in steps}
        return sum(
            step.targets[0].nbytes
            for step in self.plan.written
            if id(step) not in chosen and step.role.scope == "text"
        )

    def active(self, chosen: Allocation) -> int:
        """Return the bytes of an allocation that computing one token reads."""
        return self.fixed_active + sum(
            -int(-self.read_share(unit) * unit.sizes[chosen[unit.name]] // 1) for unit in self.units
        )

    @property
    def active_weights(self) -> int:
        """Number of weights that computing one token reads, for bits per weight."""
        chosen = {id(step): name for name, steps in self.members.items() for step in steps}
        shares = {unit.name: self.read_share(unit) for unit in self.units}
        return int(
            sum(
                prod(step.rows.shape) * (shares[chosen[id(step)]] if id(step) in chosen else 1)
                for step in self.plan.written
                if step.role.scope == "text"
            )
        )

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
        container = container_of(self.format).name
        if self.packs_nothing(chosen):
            return load_recipe(self._tunable.exact_recipe, container)
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
