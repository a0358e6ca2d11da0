"""The options of GGUF files beside their recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen35.errors import InputError, UsageError
from qwen35.planning.container import ContainerInputs
from qwen35.planning.gguf_files.imatrix import Imatrix
from qwen35.planning.gguf_files.mixes import DRAFTED, converted_type
from qwen35.planning.refinement import NEAREST, Refinement

if TYPE_CHECKING:
    from qwen35.array_types import F32
    from qwen35.planning.step import Step

__all__ = ["GgufOptions", "mtp_type_of", "projector_type"]

_MTP_TYPE = "Q8_0"
"""The type of an MTP layer's own file: drafts need no more, and it is the middle of those that
ggml-org publishes (BF16, Q8_0, Q4_0)."""


def mtp_type_of(choice: str, mtp_type: str | None) -> str | None:
    """Return the file type of the MTP layer's own file; None for no such file.

    Args:
        choice: one of `qwen35.planning.mtp_choice.MTP_CHOICES`.
        mtp_type: `--mtp-type`, if given.

    Raises:
        UsageError: there is no such type, or it is given without such a file.
    """
    if choice == "separate":
        return converted_type(mtp_type or _MTP_TYPE, "--mtp-type", DRAFTED)
    if mtp_type is not None:
        hint = "add it, or leave this out"
        raise UsageError("--mtp-type", "has no effect without --mtp separate", hint=hint)
    return None


def projector_type(mmproj: bool | str, subject: str = "--mmproj") -> str | None:
    """Return the file type of the vision tower's file; None for no such file.

    Args:
        mmproj: the user's input: whether to write it, as F16, or a type.
        subject: where it was set.

    Raises:
        UsageError: there is no such type.
    """
    if isinstance(mmproj, str):
        return converted_type(mmproj, subject)
    return "F16" if mmproj else None


@dataclass(frozen=True)
class GgufOptions:
    """Options of GGUF files.

    Args:
        types: file types, in order, keys of `qwen35.planning.gguf_files.mixes.FILE_TYPES`.
        imatrix: an importance matrix.
        projector: file type of the multimodal projector's file; None for no such file.
        drop_mtp: omit the multi-token-prediction layers.
        mtp_file: file type of a file with that layer alone, which the others lack; None for none.
        upstream_counters: count layers as llama-quantize does (`select_types`).
        split_max_size: bytes of tensors a file; a model with more is split. None for no limit.
        adapter_only: write the adapter itself, for llama.cpp to apply, and not the model.
        refinement: how codes are chosen.
        encoder: one of `qwen35.codecs.ggml.quantizers.ENCODERS`; does not change what comes out.
    """

    types: tuple[str, ...]
    imatrix: Imatrix | None = None
    projector: str | None = None
    drop_mtp: bool = False
    mtp_file: str | None = None
    upstream_counters: bool = False
    split_max_size: int | None = None
    adapter_only: bool = False
    refinement: Refinement = NEAREST
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
        hessians = self.refinement.hessians
        return ContainerInputs(
            imatrix=self.imatrix.path if self.imatrix else None,
            hessians=hessians.folder if hessians else None,
        )

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
