"""The statistics as JSON: per weight, one line with its columns' maxima and mean squares."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen35.array_types import F32
from qwen35.calibration.inputs import CACHED, input_of
from qwen35.calibration.sums import Sums
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.model.model_config import ModelConfig
from qwen35.planning.activations import CACHE_LARGEST, LARGEST, PROVENANCE, SQUARES, TOKENS

__all__ = ["SumsSource", "coverage", "weights", "write_statistics"]


class SumsSource(Protocol):
    """A source of sums, read block by block."""

    def sums(self, block: str) -> Mapping[str, Sums]:
        """Return the sums of a block, keyed by measured weight."""


def weights(
    items: tuple[InventoryItem, ...], config: ModelConfig, source: SumsSource
) -> Iterator[tuple[InventoryItem, Sums, int, float | None]]:
    """Yield every measured weight with its sums, its slice number in them, and its largest output.

    That is what a KV cache would hold; None for weights whose output does not enter one.
    Fused stacks are yielded expert by expert, under the names that per-expert checkpoints use. One
    block's sums are in memory at a time.
    """
    loaded, sums = "", {}
    for item in items:
        measured_input = input_of(item.role, config)
        if measured_input is None:
            continue
        block, name = measured_input
        if block != loaded:
            loaded, sums = block, dict(source.sums(block))
        if name not in sums:
            continue
        cached = sums.get(_cached(name, item.module))
        largest = None if cached is None else float(cached.largest.max())
        for part in list(item.experts()) or [item]:
            yield part, sums[name], part.role.expert or 0, largest


def _cached(name: str, module: str) -> str:
    """Return what is measured of a module's output, in the layer of its input `name`."""
    layer, _, _ = name.rpartition("self_attn.")
    path = module.rpartition("self_attn.")[1:]
    return layer + CACHED.get("".join(path), "")


def write_statistics(
    path: Path,
    items: tuple[InventoryItem, ...],
    config: ModelConfig,
    source: SumsSource,
    *,
    floor: int,
    provenance: Mapping[str, Any],
) -> None:
    """Write the JSON file; experts below `floor` are topped up (`Sums.filled`).

    ``tokens`` is the number actually seen, before topping up.
    """
    last: tuple[Sums, Sums, F32] | None = None
    with path.open("x", encoding="utf-8") as file:
        file.write(f"{{\n{json.dumps(PROVENANCE)}: {json.dumps(provenance, ensure_ascii=False)}")
        for item, sums, number, cached in weights(items, config, source):
            # Experts of a layer share their sums: top them up once, not per expert.
            if last is None or last[0] is not sums:
                filled = sums.filled(floor)
                last = sums, filled, filled.mean_squares
            _, filled, squares = last
            in_cache = "" if cached is None else f', "{CACHE_LARGEST}": {cached:.9g}'
            file.write(
                f",\n{json.dumps(item.spec.name)}: "
                f'{{"{LARGEST}": [{_numbers(filled.largest[number])}], '
                f'"{SQUARES}": [{_numbers(squares[number])}], "{TOKENS}": {sums.tokens[number]}'
                f"{in_cache}}}"
            )
        file.write("\n}\n")


def _numbers(values: F32) -> str:
    # Seven significant digits are about float32's precision and keep the file small.
    return ", ".join(f"{value:.7g}" for value in values.tolist())


def coverage(blocks: Iterable[tuple[str, Mapping[str, Sums]]], floor: int) -> dict[str, Any]:
    """Return the tokens that reached each expert, and the experts below `floor` tokens."""
    seen, below = {}, {}
    for block, sums in blocks:
        for name, one in sums.items():
            if one.stacked and name.endswith("mlp.experts.gate_proj"):
                layer = f"{block}.{name}".removesuffix(".mlp.experts.gate_proj")
                seen[layer] = one.tokens.tolist()
                if few := one.below(floor):
                    below[layer] = few
    return {"floor": floor, "tokens": seen, "below_floor": below}
