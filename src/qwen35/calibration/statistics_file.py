"""The statistics as JSON: one line a weight, largest magnitudes and mean squares of its columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen35.array_types import F32
from qwen35.calibration.inputs import input_of
from qwen35.calibration.sums import Sums
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.model.model_config import ModelConfig
from qwen35.planning.activations import LARGEST, MADE, SQUARES, TOKENS

__all__ = ["SumsSource", "coverage", "weights", "write_statistics"]


class SumsSource(Protocol):
    """Where sums come from, a block at a time."""

    def sums(self, block: str) -> Mapping[str, Sums]:
        """Return the sums of a block, by the weight that was measured."""


def weights(
    items: tuple[InventoryItem, ...], config: ModelConfig, source: SumsSource
) -> Iterator[tuple[InventoryItem, Sums, int]]:
    """Yield every weight that was measured, with its sums and its place in their stack.

    Fused stacks of experts are yielded expert by expert, named as per-expert checkpoints do. The
    sums of one block are in memory at a time.
    """
    held, sums = "", {}
    for item in items:
        found = input_of(item.role, config)
        if found is None:
            continue
        block, name = found
        if block != held:
            held, sums = block, dict(source.sums(block))
        if name not in sums:
            continue
        for part in list(item.experts()) or [item]:
            yield part, sums[name], part.role.expert or 0


def write_statistics(
    path: Path,
    items: tuple[InventoryItem, ...],
    config: ModelConfig,
    source: SumsSource,
    *,
    floor: int,
    made: Mapping[str, Any],
) -> None:
    """Write the JSON file; experts below `floor` are filled up (`Sums.filled`).

    ``tokens`` is what a weight really saw.
    """
    last: tuple[Sums, Sums, F32] | None = None
    with path.open("x", encoding="utf-8") as file:
        file.write(f"{{\n{json.dumps(MADE)}: {json.dumps(made, ensure_ascii=False)}")
        for item, sums, number in weights(items, config, source):
            if last is None or last[0] is not sums:
                filled = sums.filled(floor)
                last = sums, filled, filled.mean_squares
            _, filled, squares = last
            file.write(
                f",\n{json.dumps(item.spec.name)}: "
                f'{{"{LARGEST}": [{_numbers(filled.largest[number])}], '
                f'"{SQUARES}": [{_numbers(squares[number])}], "{TOKENS}": {sums.tokens[number]}}}'
            )
        file.write("\n}\n")


def _numbers(values: F32) -> str:
    return ", ".join(f"{value:.7g}" for value in values.tolist())


def coverage(blocks: Iterable[tuple[str, Mapping[str, Sums]]], floor: int) -> dict[str, Any]:
    """Return how many tokens reached each expert, and which experts fewer than `floor` reached.

    Args:
        blocks: the name and sums of each block.
        floor: tokens.
    """
    seen, below = {}, {}
    for block, sums in blocks:
        for name, one in sums.items():
            if one.stacked and name.endswith("mlp.experts.gate_proj"):
                place = f"{block}.{name}".removesuffix(".mlp.experts.gate_proj")
                seen[place] = one.tokens.tolist()
                if few := one.below(floor):
                    below[place] = few
    return {"floor": floor, "tokens": seen, "below_floor": below}
