"""Steps: what happens to each weight. Its rows are read once, whatever the number of files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from qwen35.codecs.registry import CODECS
from qwen35.model.roles import Role
from qwen35.planning.rows import Rows
from qwen35.record_class import record
from qwen35.tensors import TensorSpec, Weight

__all__ = ["Step", "StepTarget"]


@record
class StepTarget:
    """One encoding in which a step's rows are written.

    Args:
        codec: a key of `qwen35.codecs.registry.CODECS`.
        outputs: the tensors, in the codec's order.
        files: the files to write to; each gets all tensors.
        copied: whether the stored bytes are copied unchanged.
        codes: how codes are chosen, one of `qwen35.planning.refinement.CODES`.
    """

    codec: str
    outputs: tuple[TensorSpec, ...]
    files: tuple[str, ...]
    copied: bool = False
    codes: str = "plain"

    @property
    def name(self) -> str:
        """The written weight's name; its tensors may be called otherwise."""
        return CODECS[self.codec].weight_name(self.outputs[0].name)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, in one file."""
        return sum(out.nbytes for out in self.outputs)

    @property
    def op(self) -> str:
        """``copy``, ``decode`` (to the checkpoint's dtype), or the codec's label."""
        if self.copied:
            return "copy"
        return CODECS[self.codec].op


@record
class Step:
    """What happens to one weight, or to a stack of experts.

    Args:
        rows: the source of its values.
        role: its role in the model.
        reason: the reason of the rule that decided.
        targets: the encodings written; empty if the weight is dropped.
        tied: the other weights that have to have the same scale of the whole, as engines fuse them.
    """

    rows: Rows
    role: Role
    reason: str
    targets: tuple[StepTarget, ...]
    tied: tuple[Rows, ...] = ()

    @property
    def weight(self) -> Weight:
        """The stored weight, or the first of several; for one expert of a stack, its part."""
        return self.rows.slabs[0].item.weight

    @property
    def spec(self) -> TensorSpec:
        """The decoded weight."""
        return self.rows.slabs[0].item.spec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The written tensors of all targets."""
        if len(self.targets) == 1:
            return self.targets[0].outputs
        return tuple(out for target in self.targets for out in target.outputs)

    @property
    def op(self) -> str:
        """The targets' operations (`StepTarget.op`), ``merge`` or ``drop``."""
        if self.rows.item.changes and self.targets and not self.packing:
            return "merge"
        if len(self.targets) == 1:
            return self.targets[0].op
        return ", ".join(target.op for target in self.targets) or "drop"

    @property
    def nbytes(self) -> int:
        """Bytes written to all files together."""
        return sum(target.nbytes * len(target.files) for target in self.targets)

    @property
    def read_bytes(self) -> int:
        """Source bytes that the step reads."""
        return self.rows.nbytes if self.targets else 0

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the step writes to, in order."""
        if len(self.targets) == 1:
            return self.targets[0].files
        return tuple(file for target in self.targets for file in target.files)

    # --- `qwen35.codecs.codec.LoaderModule`

    @property
    def codec(self) -> str:
        """The codec of the written weight."""
        return self.targets[0].codec

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensors written for it."""
        return self.targets[0].outputs

    @property
    def module(self) -> str:
        """The module's name in the output."""
        return self.targets[0].name.removesuffix(".weight")

    @property
    def packing(self) -> str | None:
        """The codec of the written weight, if it packs."""
        packed = self.targets and CODECS[self.targets[0].codec].packed
        return self.targets[0].codec if packed else None

    def into(self, files: Iterable[str]) -> Step:
        """Return this step restricted to some of its files."""
        kept = set(files)
        targets = (
            replace(target, files=tuple(file for file in target.files if file in kept))
            for target in self.targets
        )
        return replace(self, targets=tuple(target for target in targets if target.files))
