"""Steps: what happens to each weight. One read of its rows serves every file that wants them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qwen35.codecs.registry import CODECS
from qwen35.model.roles import Role
from qwen35.planning.rows import Rows
from qwen35.tensors import TensorSpec, Weight

__all__ = ["Step", "StepTarget"]


@dataclass(frozen=True, slots=True)
class StepTarget:
    """One form in which the rows of a step are written.

    Args:
        codec: how; a key of `qwen35.codecs.registry.CODECS`.
        outputs: the tensors, in the order the codec gives.
        files: those that hold them, each all of them.
        copied: whether the stored bytes are copied, as the source's own codec holds them.
    """

    codec: str
    outputs: tuple[TensorSpec, ...]
    files: tuple[str, ...]
    copied: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, in one file."""
        return sum(out.nbytes for out in self.outputs)

    @property
    def op(self) -> str:
        """What is done: ``copy``, ``decode`` (to the checkpoint's dtype), or the codec's label."""
        if self.copied:
            return "copy"
        return CODECS[self.codec].op


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one weight, or to a stack of experts.

    Args:
        rows: where its values come from.
        role: what it is.
        reason: the recipe's words.
        targets: what is written; nothing if the weight is dropped.
    """

    rows: Rows
    role: Role
    reason: str
    targets: tuple[StepTarget, ...]

    @property
    def weight(self) -> Weight:
        """The weight, or the first of several; of one expert of a fused stack, the part it is."""
        return self.rows.slabs[0].item.weight

    @property
    def spec(self) -> TensorSpec:
        """The weight itself, decoded."""
        return self.rows.slabs[0].item.spec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Every tensor written, of all targets."""
        if len(self.targets) == 1:
            return self.targets[0].outputs
        return tuple(out for target in self.targets for out in target.outputs)

    @property
    def op(self) -> str:
        """What is done (`StepTarget.op`), or ``drop``."""
        return ", ".join(target.op for target in self.targets) or "drop"

    @property
    def nbytes(self) -> int:
        """Bytes written, to all files together."""
        return sum(target.nbytes * len(target.files) for target in self.targets)

    @property
    def read_bytes(self) -> int:
        """Bytes of the source that it reads."""
        return self.rows.nbytes if self.targets else 0

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that it writes to, in order."""
        if len(self.targets) == 1:
            return self.targets[0].files
        return tuple(file for target in self.targets for file in target.files)

    # --- as a loader meets it (`qwen35.codecs.codec.LoaderModule`)

    @property
    def codec(self) -> str:
        """How the output holds the weight."""
        return self.targets[0].codec

    @property
    def parts(self) -> tuple[TensorSpec, ...]:
        """The tensors that hold it."""
        return self.targets[0].outputs

    @property
    def module(self) -> str:
        """Its name in the output, without ``.weight``."""
        return self.targets[0].outputs[0].name.removesuffix(".weight")

    @property
    def packing(self) -> str | None:
        """How the output holds the weight, if packed."""
        packed = self.targets and CODECS[self.targets[0].codec].packed
        return self.targets[0].codec if packed else None

    def into(self, files: Iterable[str]) -> Step:
        """Return the same step for some of its files alone."""
        wanted = set(files)
        targets = (
            replace(target, files=tuple(file for file in target.files if file in wanted))
            for target in self.targets
        )
        return replace(self, targets=tuple(target for target in targets if target.files))
