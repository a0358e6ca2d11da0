"""The options of a safetensors output beside its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import InputError
from qwen35.planning.container import ContainerInputs
from qwen35.planning.refinement import NEAREST, Refinement

if TYPE_CHECKING:
    from qwen35.array_types import F32
    from qwen35.planning.activations import Activations
    from qwen35.planning.step import Step

__all__ = ["KV_CACHES", "MAX_SHARD_BYTES", "SafetensorsOptions"]

KV_CACHES = ("fp8",)
"""The formats of a KV cache that an output may have scales for."""

MAX_SHARD_BYTES = 5_000_000_000
"""The most tensor bytes per shard, unless a single weight is larger."""


@dataclass(frozen=True)
class SafetensorsOptions:
    """Options of a safetensors output.

    Args:
        keep_prefix: keep text tensors of a text-only output under ``model.language_model.``.
        scale_choice: how scales are chosen; `ScaleChoice`'s default if None.
        activations: statistics that weigh columns when scales are chosen.
        shard_bytes: the most tensor bytes per file; `MAX_SHARD_BYTES` if 0.
        keep_shards: write a file for each file of the source, of the same name.
        kv_cache: one of `KV_CACHES`, to write scales from the largest keys and values of
            `activations`; None to keep those of the source.
        refinement: how codes are chosen.
        described: whether the output is only described: statistics that it takes may be missing.
    """

    keep_prefix: bool = False
    scale_choice: ScaleChoice | None = None
    activations: Activations | None = None
    shard_bytes: int = 0
    keep_shards: bool = False
    kv_cache: str | None = None
    refinement: Refinement = NEAREST
    described: bool = False

    @property
    def settings(self) -> ScaleChoice | None:
        """How codecs choose scales."""
        return self.scale_choice

    @property
    def encoder(self) -> str:
        """Our own kernels: these codecs have no alternative."""
        return "auto"

    @property
    def inputs(self) -> ContainerInputs:
        """The files beside the source.

        Raises:
            InputError: the statistics were not read from a file.
        """
        if self.activations is not None and self.activations.path is None:
            raise InputError(self.activations.name, "workers cannot read it", expected="a file")
        hessians = self.refinement.hessians
        return ContainerInputs(
            activations=self.activations.path if self.activations else None,
            hessians=hessians.folder if hessians else None,
        )

    def importance(self, step: Step, slab: int) -> F32 | None:
        """Return how much an error in each column matters; None if unknown."""
        del slab
        if self.activations is None or self.scale_choice is None:
            return None
        return self.activations.weights(step.role, self.scale_choice.mode)

    def input_largest(self, step: Step) -> float | None:
        """Return the largest magnitude of the inputs of a step's layer, and of those tied to it."""
        if self.activations is None:
            return None
        roles = (step.role, *(rows.item.role for rows in step.tied))
        found = (self.activations.largest(role) for role in roles)
        return max((one for one in found if one is not None), default=None)
