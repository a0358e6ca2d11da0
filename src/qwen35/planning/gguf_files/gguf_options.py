"""The options of GGUF files beside their recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen35.errors import InputError
from qwen35.planning.container import ContainerInputs
from qwen35.planning.gguf_files.imatrix import Imatrix

if TYPE_CHECKING:
    from qwen35.array_types import F32
    from qwen35.planning.step import Step

__all__ = ["GgufOptions"]


@dataclass(frozen=True)
class GgufOptions:
    """Options of GGUF files.

    Args:
        types: file types, in order, keys of `qwen35.planning.gguf_files.mixes.FILE_TYPES`.
        imatrix: an importance matrix.
        projector: file type of the multimodal projector's file; None for no such file.
        drop_mtp: omit the multi-token-prediction layers.
        upstream_counters: count layers as llama-quantize does (`select_types`).
        encoder: one of `qwen35.codecs.ggml.quantizers.ENCODERS`; does not change what comes out.
    """

    types: tuple[str, ...]
    imatrix: Imatrix | None = None
    projector: str | None = None
    drop_mtp: bool = False
    upstream_counters: bool = False
    encoder: str = "auto"

    @property
    def settings(self) -> None:
        """None: ggml types choose their own scales."""

    @property
    def inputs(self) -> ContainerInputs:
        """The files beside the source.

        Raises:
            InputError: the importance matrix was not read from a file.
        """
        if self.imatrix is not None and self.imatrix.path is None:
            raise InputError(self.imatrix.name, "workers cannot read it", expected="a file")
        return ContainerInputs(imatrix=self.imatrix.path if self.imatrix else None)

    def input_largest(self, step: Step) -> float | None:
        """Return None: no type stores anything about inputs."""
        del step
        return None

    def importance(self, step: Step, slab: int) -> F32 | None:
        """Return the importance of each column of a slab; None if the matrix lacks it."""
        if self.imatrix is None:
            return None
        entry = self.imatrix.entries.get(step.outputs[0].name)
        return entry.slice(slab, step.rows.row) if entry else None
