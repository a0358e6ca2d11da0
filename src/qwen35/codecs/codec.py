"""The protocol: everything that the rest of the package asks of a way to hold a weight.

A codec is a folder beside this file and a row in `qwen35.codecs.registry`. What has a default here
may be left out. Methods that work on values import their kernels when they are called, so that a
plan, which needs headers alone, starts fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qwen35.errors import Finding, TensorError
from qwen35.tensors import FLOAT_DTYPES, StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, Array
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.pieces import Readable
    from qwen35.model.model_config import ModelConfig
    from qwen35.model.roles import Role

__all__ = [
    "Codec",
    "Encoding",
    "EncodingRequest",
    "Kernel",
    "LoaderModule",
    "Piece",
    "StoredValues",
    "stacked",
]

Kernel = Callable[..., bool]
"""Encodes a piece on one device; what it takes is the codec's own affair. False: not finite."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of an output, ready to be encoded or compared.

    Args:
        first: number of the first row, in the output.
        values: [rows, row] elements of `dtype` (BF16 as its uint16 bits), valid until the next.
        dtype: BF16, F16 or F32.
        importance: [row] float32, how much an error in each column matters; None: all alike.
    """

    first: int
    values: Array
    dtype: str
    importance: F32 | None = None


@dataclass(frozen=True, slots=True)
class EncodingRequest:
    """What one weight, or a run of its rows, is to be encoded to.

    Args:
        source: name of the weight in the checkpoint, for error sentences.
        spec: the weight as the output names it, decoded.
        outputs: the tensors that it becomes, as `Codec.layout` gives them.
        write: takes the name of one of `outputs`, an offset in bytes, and data.
        settings: how scales are chosen, for codecs that are `chooses_scales`.
        kernel: of the device, for codecs that have some.
    """

    source: str
    spec: TensorSpec
    outputs: tuple[TensorSpec, ...]
    write: Callable[[str, int, memoryview], None]
    settings: Any = None
    kernel: Kernel | None = None


class StoredValues(Protocol):
    """The values of a stored weight, wherever in it."""

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with the elements from number `first` on, in the weight's dtype.

        Raises:
            TensorError: they cannot be read or decoded.
        """


class Encoding(ABC):
    """One weight, or a run of its rows, on the way to an output."""

    @abstractmethod
    def add(self, piece: Piece) -> None:
        """Encode and write a piece.

        Raises:
            TensorError: it holds NaN or infinity, or what the codec cannot say.
        """

    def finish(self) -> None:  # noqa: B027 - most have nothing left to write
        """Write what only all pieces together give."""


class LoaderModule(Protocol):
    """A weight of an artifact as its loader meets it: a step of a plan, or what lies in a file."""

    @property
    def module(self) -> str:
        """Its name in the artifact, without ``.weight``."""

    @property
    def role(self) -> Role:
        """What it is."""

    @property
    def spec(self) -> TensorSpec:
        """The weight, decoded."""

    @property
    def codec(self) -> str:
        """How it is held."""

    @property
    def parts(self) -> Sequence[TensorSpec]:
        """The tensors that hold it, the one of its own name first."""


class Codec(ABC):
    """One way to hold a weight.

    Attributes:
        name: in recipes, plans and manifests.
        packed: whether it is a quantization.
        meaning: what a recipe's action of this name does.
        independent: whether pieces can be encoded without each other, in any order, and decoded
            with nothing large in memory beside them.
        checks: whether encoding refuses values that are not finite by itself; else they are
            refused before they reach it.
        per_expert: whether a fused stack of experts is written matrix by matrix, the rows of gate
            and up apart; else whole, with its three dimensions.
        joined: whether what engines join (`qwen35.model.fused`) must be packed together.
        chooses_scales: whether `EncodingRequest.settings` and activation statistics matter to it.
        needs_importance: whether it is garbage where it is not known how much columns matter.
        widens: whether values that are not BF16 are made float32 before they are encoded.
        packable: what of a model it can hold, for error sentences.
        spared: kinds of weights that a rule for a group leaves alone.
        method: ``quant_method`` of config.json.
        container: what holds it; a key of `qwen35.planning.containers.CONTAINERS`.
        suffix: what an artifact's name ends with.
        tags: of a model card.
        title: how `inspect` calls it, `label` if empty.
        described: how a model card does, `label` if empty.
        toolkit: what the toolkit before us calls checkpoints of it.
        library: what loads it, as the Hub calls it; nothing if nothing does.
        trains: whether peft trains adapters on it.
        load_format: what SGLang must be told to load it.
        libraries: what its engine needs beside transformers, as modules.
        loads: whether transformers reads it; other codecs are decoded for it.
        in_memory: whether transformers keeps it packed in memory.
        tiled: whether GPUs can share a weight in whole tiles alone (`tensor_parallel`).
    """

    name: ClassVar[str]
    packed: ClassVar[bool] = True
    meaning: ClassVar[str] = ""
    independent: ClassVar[bool] = True
    checks: ClassVar[bool] = False
    per_expert: ClassVar[bool] = False
    joined: ClassVar[bool] = False
    chooses_scales: ClassVar[bool] = False
    needs_importance: ClassVar[bool] = False
    widens: ClassVar[bool] = False
    packable: ClassVar[str] = "linear layers"
    spared: ClassVar[frozenset[str]] = frozenset({"vector", "conv", "embedding", "router"})
    method: ClassVar[str] = ""
    container: ClassVar[str] = "safetensors"
    suffix: ClassVar[str] = ""
    tags: ClassVar[tuple[str, ...]] = ()
    title: ClassVar[str] = ""
    described: ClassVar[str] = ""
    toolkit: ClassVar[str] = ""
    library: ClassVar[str] = ""
    trains: ClassVar[bool] = False
    load_format: ClassVar[str] = ""
    libraries: ClassVar[tuple[str, ...]] = ()
    loads: ClassVar[bool] = False
    in_memory: ClassVar[bool] = False
    tiled: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name.upper()

    @property
    def op(self) -> str:
        """What a plan says is done to a weight that becomes this."""
        return self.name

    # --- in a source

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the other stored tensors of the weight called `name`, in the order of parts.

        None: it is not held so. The first codec that says otherwise has the weight: tell it by
        names that no other tool gives, or by dtypes too. `mismatch` looks at shapes, `problem` at
        what else can be wrong.
        """
        del tensors, name
        return None

    def is_companion(self, name: str) -> bool:
        """Whether a tensor called so belongs to a weight of another name, there or not."""
        del name
        return False

    def problem(self, tensors: Mapping[str, StoredTensor], name: str) -> TensorError | None:
        """Return what is wrong with the tensors that `companions` found, if anything."""
        del tensors, name
        return None

    def mismatch(self, weight: Weight, expected: TensorSpec) -> TensorError | None:
        """Return why a stored weight cannot be the one that the config promises, if it cannot.

        By default its tensors must have the shapes that `layout` gives for it, and dtypes that it
        gives for a weight of some dtype.
        """
        layouts = [
            self.layout(TensorSpec(expected.name, dtype, expected.shape)) for dtype in FLOAT_DTYPES
        ]
        for part, wanted in zip(weight.parts, zip(*layouts, strict=True), strict=False):
            if part.spec.shape != wanted[0].shape:
                found, expect = f"shape {list(part.spec.shape)}", list(wanted[0].shape)
                return TensorError(part.spec.name, found, expected=f"{expect} by config.json")
            dtypes = list(dict.fromkeys(spec.dtype for spec in wanted))
            if part.spec.dtype not in dtypes:
                found = f"dtype {part.spec.dtype}"
                return TensorError(part.spec.name, found, expected=" or ".join(dtypes))
        return None

    def numel(self, weight: Weight) -> int:
        """Return how many weights are stored; to be said where an element holds several."""
        return weight.main.spec.numel

    @abstractmethod
    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Return the values of a stored weight; `spec` is the weight, decoded.

        Values that are not finite are refused where they are used.

        Raises:
            TensorError: what they are decoded by is damaged.
        """

    def check(self, reader: Readable, weight: Weight) -> None:  # noqa: B027
        """Check what a copy of the stored bytes would carry along.

        Raises:
            TensorError: it is damaged.
        """

    # --- in an output

    @abstractmethod
    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors that a weight becomes, the one of its own name first."""

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be held; nothing if it can.

        Such a weight is copied, with this as the reason in the plan.
        """
        del spec
        return ""

    def packs(self, role: Role) -> bool:
        """Whether weights of this role may be held so at all.

        A rule that names such a weight is refused, one for a group passes it over (`spared`).
        """
        return role.info.kind == "linear"

    def grain(self, spec: TensorSpec) -> int:
        """Return the rows to whose multiples a weight may be cut."""
        del spec
        return 1

    @abstractmethod
    def encode(self, order: EncodingRequest) -> Encoding:
        """Return what takes the pieces of a weight."""

    def kernel(self, device: str) -> Kernel | None:
        """Return what encodes on ``cpu`` or a GPU; None if there is nothing to choose.

        Raises:
            UsageError: there is no such device, or a library for it is missing.
        """
        del device
        return None

    def memory(self, spec: TensorSpec) -> int:
        """Return bytes that encoding a weight takes, beside its piece."""
        del spec
        return 0

    def decoding_memory(self, spec: TensorSpec) -> int:
        """Return bytes that decoding a weight takes, beside its piece."""
        del spec
        return 0

    # --- in the eyes of a loader

    def config(self, modules: Sequence[LoaderModule], prefix: str, dtype: str) -> dict[str, Any]:
        """Return ``quantization_config``.

        Args:
            modules: every weight that is written.
            prefix: what names of text tensors begin with.
            dtype: of the checkpoint, as safetensors names it.

        Raises:
            UsageError: no loader could read them.
        """
        del prefix, dtype
        return {"quant_method": self.method or self.name, "ignore": self._kept(modules)}

    def _kept(self, modules: Sequence[LoaderModule]) -> list[str]:
        """Return the matrices that are not held so."""
        kept = (m.module for m in modules if m.codec != self.name and len(m.spec.shape) == 2)
        return sorted(kept)

    def config_findings(
        self, quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
    ) -> Iterator[Finding]:
        """Yield where ``quantization_config`` and the weights contradict each other.

        By default it must be as `config` writes it; what writes another must say another check.
        """
        del vision
        if not any(module.codec == self.name for module in modules):
            message = f"promises {self.label}, but nothing is packed"
            yield Finding("quantization-config", "config.json", message)
        said, kept = quantization.get("ignore"), self._kept(modules)
        if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
            yield Finding("skip-list", "config.json", "ignore is not a list of names")
            return
        for name in sorted(set(said) ^ set(kept)):
            packed = "not packed, and missing from ignore"
            yield Finding("skip-list", name, packed if name in kept else "in ignore, but packed")

    def tensor_parallel(
        self, config: ModelConfig, modules: Sequence[LoaderModule], ranks: int
    ) -> Iterator[Finding]:
        """Yield the weights that `ranks` GPUs could not share."""
        del config, modules, ranks
        yield from ()

    def notes(self, modules: Sequence[LoaderModule], dtype: str) -> Iterator[str]:
        """Yield what the user of an output should know of it."""
        del modules, dtype
        yield from ()

    # --- in the eyes of a check

    @abstractmethod
    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare a stored weight with its original; put errors and findings into `result`.

        Args:
            reader: of the artifact.
            weight: as it holds it.
            spec: the weight, decoded.
            original: all of it, in pieces of whole grains, in the order of the original's file.
            result: empty; its `subject` is what findings are about.

        Raises:
            InputError: a part cannot be read or decoded.
        """

    def too_far(self, errors: Mapping[str, float]) -> str:
        """Return why a weight is too far from its original though no value is; nothing if not.

        Args:
            errors: what `judge` put into its result.
        """
        del errors
        return ""


def stacked(spec: TensorSpec) -> tuple[int, int]:
    """Return (rows, row) of a weight with all dimensions but the last made one."""
    row = spec.shape[-1] if spec.shape else 1
    return (spec.numel // row if row else 0), row
