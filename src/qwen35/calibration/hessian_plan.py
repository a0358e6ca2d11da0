"""What Hessians take: memory and disk space, before any token has passed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qwen35.calibration.hessian_inputs import (
    HOLD_OUT,
    OWN_TOKENS,
    PlannedInput,
    file_of,
    is_held_out,
    planned_inputs,
)
from qwen35.calibration.inputs import EXPERTS_IN
from qwen35.calibration.text_windows import TextWindows
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.errors import UsageError
from qwen35.model.model_config import ModelConfig
from qwen35.planning.activations import Key
from qwen35.planning.hessians import Hessians, InputHessian, triangle_bytes, weight_keys

__all__ = ["HessianPlan", "expected_hessians", "plan_hessians"]

_HEADS = 2**20
"""Upper bound on the bytes of a file's header, beside 512 for each matrix of an expert."""

_SHARE = 4
"""The part of --memory that experts' sums may take: a quarter."""


@dataclass(frozen=True)
class HessianPlan:
    """The Hessians of a calibration.

    Args:
        inputs: of each block, by name.
        fit_tokens: tokens of the windows that are not held out.
        reached: most experts that a token reaches.
        group: most bytes of experts' sums in memory.
    """

    inputs: Mapping[str, Mapping[str, PlannedInput]]
    fit_tokens: int
    reached: int
    group: int

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files."""
        return tuple(sorted({name for block in self.inputs for name in self.files_of(block)}))

    def files_of(self, block: str) -> tuple[str, ...]:
        """Return the names of a block's files."""
        return tuple(dict.fromkeys(file_of(block, name)[0] for name in self.inputs[block]))

    @property
    def widest(self) -> int:
        """Columns of the widest input."""
        return max(one.columns for inputs in self.inputs.values() for one in inputs.values())

    @property
    def nbytes(self) -> int:
        """Most bytes in memory: the sums of a block's inputs, or of a group of its experts."""
        together = (
            sum(one.nbytes for name, one in inputs.items() if not name.endswith(EXPERTS_IN))
            for inputs in self.inputs.values()
        )
        return max(*together, self.group)

    def disk_bytes(self, done: Collection[str] = ()) -> int:
        """Return an upper bound on the bytes of all files, without those of finished blocks."""
        return sum(
            self._block_bytes(inputs) for block, inputs in self.inputs.items() if block not in done
        )

    @property
    def streamed_disk_bytes(self) -> int:
        """An upper bound on the bytes on disk if only the heads of finished blocks stay there."""
        heads = sum(map(self._head_bytes, self.inputs.values()))
        return heads + max(map(self._block_bytes, self.inputs.values()))

    def _block_bytes(self, inputs: Mapping[str, PlannedInput]) -> int:
        total = self._head_bytes(inputs)
        for one in inputs.values():
            own = _most_own(one, self.fit_tokens, self.reached)
            total += 2 * triangle_bytes(one.columns) * (1 + own)
        return total

    @staticmethod
    def _head_bytes(inputs: Mapping[str, PlannedInput]) -> int:
        return _HEADS + sum(512 * len(one.experts) for one in inputs.values())


def plan_hessians(
    items: Sequence[InventoryItem],
    config: ModelConfig,
    text: TextWindows,
    layer: int,
    memory: int | None,
) -> HessianPlan:
    """Plan the Hessians of a model.

    Args:
        items: its weights.
        config: its geometry.
        text: to calibrate on.
        layer: bytes of its largest block: without a limit, experts' sums take no more than that.
        memory: limit in bytes, if there is one.

    Raises:
        UsageError: no window would be held out.
    """
    count = len(text.windows)
    if count < HOLD_OUT:
        raise UsageError(
            "--hessian",
            f"{count} chunks of {text.context} tokens",
            expected=f"{HOLD_OUT} at least: every fifth is held out",
            hint="give more text",
        )
    fitting = sum(not is_held_out(window) for window in range(count))
    fit_tokens, reached = fitting * text.context, _reached(config)
    inputs = planned_inputs(items, config)
    blocks = [
        [(one.nbytes, _most_own(one, fit_tokens, reached)) for one in block.values()]
        for block in inputs.values()
    ]
    largest = max(nbytes for block in blocks for nbytes, own in [*block, (0, 1)] if own)
    most = max(sum(nbytes * own for nbytes, own in block) for block in blocks)
    allowed = layer if memory is None else memory // _SHARE
    group = max(largest, min(most, allowed))
    return HessianPlan(inputs, fit_tokens, reached, group)


def _reached(config: ModelConfig) -> int:
    """Return how many experts a token reaches; at most all of them."""
    experts = config.dims.get("experts", 0)
    given = config.text_raw.get("num_experts_per_tok")
    return min(given, experts) if isinstance(given, int) and given > 0 else experts


def _most_own(planned: PlannedInput, fit_tokens: int, reached: int) -> int:
    """Return how many experts of an input can have seen enough tokens for their own Hessians."""
    enough = fit_tokens * reached // (OWN_TOKENS * planned.columns)
    # No expert sees a token twice.
    possible = len(planned.experts) if fit_tokens >= OWN_TOKENS * planned.columns else 0
    return min(enough, possible)


def expected_hessians(plan: HessianPlan, provenance: Mapping[str, Any]) -> Hessians:
    """Return what will be found in the files; which experts share is known only afterwards."""
    by_weight: dict[Key, InputHessian] = {}
    for block, inputs in plan.inputs.items():
        for name, planned in inputs.items():
            file, own = file_of(block, name)
            hashes = ("0" * 64,) * 2
            found = InputHessian(
                Path(), file, own, planned.columns, plan.fit_tokens, 1, (0, 0), hashes
            )
            for weight in (*planned.weights, *chain(*planned.experts.values())):
                by_weight |= dict.fromkeys(weight_keys(weight), found)
    return Hessians(Path("hessians"), provenance, "0" * 64, by_weight)
