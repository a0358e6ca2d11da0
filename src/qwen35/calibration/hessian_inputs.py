"""Which Hessians a calibration keeps: of what inputs, for which weights, and their size."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qwen35.calibration.inputs import EXPERTS_IN, EXPERTS_OUT, SHARED_IN, Input, input_of
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.forward.blocks import HEAD, MTP, layer_number
from qwen35.model.model_config import ModelConfig
from qwen35.model.roles import Role
from qwen35.planning.hessians import (
    HEAD_FILE,
    MeasuredInput,
    ReadingWeight,
    layer_file,
    mtp_file,
)

__all__ = [
    "HOLD_OUT",
    "OWN_TOKENS",
    "Matrix",
    "PlannedInput",
    "Tokens",
    "assigned",
    "file_of",
    "is_held_out",
    "matrix_name",
    "passed_matrices",
    "planned_inputs",
    "summed_in",
]

HOLD_OUT = 5
"""Every fifth window is held out."""

OWN_TOKENS = 16
"""Fitting tokens for each column that an expert needs for Hessians of its own, and that the average
of its layer's experts needs to stand in. A sum over fewer is noise in most of its directions: it
has a rank of at most the number of tokens."""


def is_held_out(window: int) -> bool:
    """Return whether a window judges codes, instead of choosing them."""
    return window % HOLD_OUT == HOLD_OUT - 1


class Tokens(NamedTuple):
    """How many tokens two sums are over."""

    fit: int
    held_out: int


class Matrix(NamedTuple):
    """What has Hessians: an input of a layer, of all its experts or of one.

    Args:
        name: of the input: the measured weight.
        expert: its number; None for an input that all tokens make.
    """

    name: str
    expert: int | None = None


@dataclass
class PlannedInput:
    """An input of a layer, and the weights that read it.

    Args:
        columns: its width.
        weights: that read it.
        experts: for each expert, what reads its share of the input.
    """

    columns: int
    weights: list[ReadingWeight] = field(default_factory=list)
    experts: dict[int, list[ReadingWeight]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of two sums in memory, [columns, columns] float32 each."""
        return 2 * 4 * self.columns**2

    def has_own(self, tokens: Tokens) -> bool:
        """Return whether so many tokens are enough for an expert."""
        return tokens.fit >= OWN_TOKENS * self.columns and tokens.held_out > 0


def planned_inputs(
    items: Sequence[InventoryItem], config: ModelConfig
) -> dict[str, dict[str, PlannedInput]]:
    """Return the inputs of each block by name, in the order of the weights."""
    made: dict[str, dict[str, PlannedInput]] = {}
    for item in items:
        found = _input(item.role, config)
        if found is None:
            continue
        block, name = found
        columns = item.spec.shape[-1]
        planned = made.setdefault(block, {}).setdefault(name, PlannedInput(columns))
        if item.role.info.place == "fused":
            for expert in range(item.spec.shape[0]):
                planned.experts.setdefault(expert, []).append((item.spec.name, expert))
        elif item.role.expert is not None:
            planned.experts.setdefault(item.role.expert, []).append(item.spec.name)
        else:
            planned.weights.append(item.spec.name)
    return made


def _input(role: Role, config: ModelConfig) -> Input | None:
    """Return what a weight reads: routers, of which there are no statistics, read all tokens."""
    if role.info.kind != "router":
        return input_of(role, config)
    layer = f"layers.{role.layer}"
    return (MTP, f"{layer}.{SHARED_IN}") if role.scope == "mtp" else (layer, SHARED_IN)


def file_of(block: str, name: str) -> tuple[str, str]:
    """Return the file of an input, and its name in it."""
    if block == HEAD:
        return HEAD_FILE, name
    if block != MTP:
        return layer_file(layer_number(block)), name
    head, _, rest = name.partition(".")
    if head != "layers":
        return mtp_file(0), name
    number, _, rest = rest.partition(".")
    return mtp_file(int(number)), rest


def matrix_name(matrix: Matrix) -> str:
    """Return what Hessians are called."""
    return matrix.name if matrix.expert is None else f"{matrix.name}.{matrix.expert}"


def summed_in(name: str, expert: int | None, wanted: Collection[Matrix] | None) -> Matrix | None:
    """Return which sums an input belongs to in a pass of all windows, if to any.

    Args:
        name: of the input.
        expert: which reads it.
        wanted: experts that the pass is for; None for the first pass.
    """
    if wanted is not None:
        return own if (own := Matrix(name, expert)) in wanted else None
    # Experts read what the shared expert reads; their down projections read their own.
    return Matrix(name) if expert is None or name.endswith(EXPERTS_OUT) else None


def passed_matrices(
    inputs: Mapping[str, PlannedInput], wanted: Sequence[Matrix] | None
) -> dict[Matrix, int]:
    """Return the sums that such a pass makes, each with its columns."""
    if wanted is not None:
        return {matrix: inputs[matrix.name].columns for matrix in wanted}
    of_all = {name: next(iter(planned.experts), None) for name, planned in inputs.items()}
    made = {name: summed_in(name, expert, None) for name, expert in of_all.items()}
    return {matrix: inputs[name].columns for name, matrix in made.items() if matrix is not None}


def assigned(
    inputs: Mapping[str, PlannedInput], tokens: Mapping[Matrix, Tokens]
) -> dict[Matrix, MeasuredInput]:
    """Decide which Hessians a block's weights get.

    An expert gets its own where it saw enough tokens, else those of all experts of its layer where
    these did, else none. All experts together read each token as often as a token is routed, so
    their gate and up projections share what the shared expert reads: its sum but for a factor.

    Args:
        inputs: of the block.
        tokens: of each input, and of each expert's share of the input of its down projection.
    """
    weights: dict[Matrix, list[ReadingWeight]] = {}
    for name, planned in inputs.items():
        if planned.weights:
            weights.setdefault(Matrix(name), []).extend(planned.weights)
        together = Matrix(_together(name))
        for expert, readers in planned.experts.items():
            own = Matrix(name, expert)
            if planned.has_own(tokens[own]):
                weights[own] = readers
            elif planned.has_own(tokens[together]):
                weights.setdefault(together, []).extend(readers)
    return {
        matrix: MeasuredInput(inputs[matrix.name].columns, *tokens[matrix], tuple(readers))
        for matrix, readers in weights.items()
    }


def _together(name: str) -> str:
    """Return the input that stands for those of all experts."""
    return name.removesuffix(EXPERTS_IN) + SHARED_IN if name.endswith(EXPERTS_IN) else name
