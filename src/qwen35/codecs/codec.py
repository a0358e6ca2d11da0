"""The codec protocol: everything the rest of the package needs from a weight format.

A codec is a folder beside this file and a row in `qwen35.codecs.registry`. Members with a default
are optional. Methods that process values import their kernels when called, so that planning, which
needs only headers, starts fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qwen35.errors import Finding, TensorError
from qwen35.tensors import FLOAT_DTYPES, StoredTensor, TensorSpec, Weight

if TYPE_CHECKING:
    from qwen35.array_types import F32, U8, Array
    from qwen35.codecs.comparison import WeightComparison
    from qwen35.codecs.input_quantizers import InputQuantizer
    from qwen35.codecs.kv_cache import CacheForm
    from qwen35.codecs.pieces import Readable
    from qwen35.codecs.refining import CodeGrid
    from qwen35.model.model_config import ModelConfig
    from qwen35.model.roles import Role

__all__ = [
    "Codec",
    "Encoding",
    "EncodingRequest",
    "Kernel",
    "LoaderModule",
    "Piece",
    "Refine",
    "Search",
    "StoredValues",
    "stacked",
]

Kernel = Callable[..., bool]
"""Encodes a piece on one device; arguments differ by codec. False: a value is not finite."""


Refine = Callable[[int, "F32", "CodeGrid"], "U8"]
"""Returns better codes for rows: the number of the first row in the output, the rows [n, columns],
and what their codes can stand for (`qwen35.codecs.refining`)."""

Search = Callable[[int, "F32", "CodeGrid", "F32"], tuple["U8", "U8"]]
"""The same with other scales [choices, rows, groups] that the rows could have; also returns which
of them are taken, [rows, groups]: 0 for those of the grid, 1 for the first of the others."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of an output, ready to be encoded or compared.

    Args:
        first: index of the first row in the output.
        values: [rows, row] elements of `dtype` (BF16 as uint16 bits), valid until the next piece.
        dtype: BF16, F16 or F32.
        importance: [row] float32, error weight of each column; None for equal weights.
    """

    first: int
    values: Array
    dtype: str
    importance: F32 | None = None


@dataclass(frozen=True, slots=True)
class EncodingRequest:
    """Parameters for encoding one weight, or a run of its rows.

    Args:
        source: name of the weight in the checkpoint, for error messages.
        spec: the decoded weight, with its name in the output.
        outputs: the tensors to write, as returned by `Codec.layout`.
        write: called with the name of one of `outputs`, a byte offset and data.
        settings: how to choose scales, for codecs with `chooses_scales`.
        kernel: the device's kernel, for codecs that have kernels.
        encoder: which implementation encodes, for codecs with several.
        largest: [matrices] float32, the largest magnitude of each matrix of the whole weight and of
            those that share its scales, for codecs that `surveys`.
        input_largest: the largest magnitude of the layer's inputs, for `quantized_inputs`.
        refine: chooses codes by what they do to outputs, for codecs that `refines`; None: nearest.
        search: instead, chooses scales too, for codecs that `searches`.
    """

    source: str
    spec: TensorSpec
    outputs: tuple[TensorSpec, ...]
    write: Callable[[str, int, memoryview], None]
    settings: Any = None
    kernel: Kernel | None = None
    encoder: str = "auto"
    largest: F32 | None = None
    input_largest: float | None = None
    refine: Refine | None = None
    search: Search | None = None


class StoredValues(Protocol):
    """Random access to the values of a stored weight."""

    def read_into(self, first: int, out: Array) -> None:
        """Fill flat `out` with elements in the weight's dtype, starting at index `first`.

        Raises:
            TensorError: the elements cannot be read or decoded.
        """


class Encoding(ABC):
    """The encoding of one weight, or a run of its rows, in progress."""

    @abstractmethod
    def add(self, piece: Piece) -> None:
        """Encode and write a piece.

        Raises:
            TensorError: it holds NaN, infinity or values the codec cannot represent.
        """

    def finish(self) -> None:  # noqa: B027 - most have nothing left to write
        """Write everything that depends on all pieces."""


class LoaderModule(Protocol):
    """A weight of an artifact from a loader's view: a step of a plan, or a stored weight."""

    @property
    def module(self) -> str:
        """The weight's name in the artifact, without ``.weight``."""

    @property
    def role(self) -> Role:
        """The role of the weight."""

    @property
    def spec(self) -> TensorSpec:
        """The decoded weight."""

    @property
    def codec(self) -> str:
        """The name of its codec."""

    @property
    def parts(self) -> Sequence[TensorSpec]:
        """The tensors that hold it, that of its values first."""


class Codec(ABC):
    """A weight format.

    Attributes:
        name: its name in recipes, plans and manifests.
        packed: whether it is quantized.
        meaning: description of the recipe action with this name.
        independent: whether pieces can be encoded in any order without each other, and decoded
            without large state in memory.
        checks: whether encoding itself refuses NaN and infinity; otherwise the caller must.
        per_expert: whether a fused stack of experts is written as one matrix per expert, with gate
            and up separated; otherwise it stays one 3-D tensor.
        joined: whether weights that engines fuse (`qwen35.model.fused`) must be packed together.
        chooses_scales: whether it uses `EncodingRequest.settings` and activation statistics.
        surveys: whether encoding any row needs the largest magnitude of its matrix
            (`EncodingRequest.largest`), which takes a second read.
        scale_modes: the ways of choosing scales (`qwen35.codecs.fp8.layout.ScaleMode`) that it has,
            if it `chooses_scales`.
        needs_importance: whether it is unusable without the importance of each column.
        widens: whether values other than BF16 are converted to float32 before encoding.
        banded: whether every conversion is judged by bands (`qwen35.verification.bands`).
        refines: whether it uses `EncodingRequest.refine`.
        layouts: the codecs that store the same codes, by the name of the layout (``--layout``).
        quantized_inputs: whether it has a scale of the layer's inputs, which statistics give.
        with_inputs: the codec of the same weights that has `quantized_inputs`, if there is one.
        served_inputs: how servers quantize the layer's inputs when the model runs; empty if they do
            not (`quantizes_inputs`, `input_quantizer`).
        packable: the weights it can hold, for error messages.
        marks: endings of the last segment of names, one of which each of its weights has; where no
            tensor has any, it is not asked for `companions`.
        endings: what the names of tensors that belong to another weight end with.
        spared: kinds of weights that group rules skip.
        method: ``quant_method`` in config.json.
        container: the file format; a key of `qwen35.planning.containers.CONTAINERS`.
        suffix: suffix of artifact names.
        tags: tags for the model card.
        title: its name in `inspect`; `label` if empty.
        described: its description in model cards; `label` if empty.
        toolkit: its name in the predecessor of this package.
        library: the library that loads it, by its Hub name; empty if none does.
        trains: whether peft trains adapters on it.
        dialect: the dialect (`qwen35.codecs.dialect`) of the only files that may hold it.
        load_format: the ``load_format`` argument SGLang needs.
        libraries: modules its engine needs besides transformers.
        served: whether vLLM and SGLang serve it although transformers does not load it.
        loads: whether transformers loads it; other codecs are decoded first.
        loads_experts: whether transformers loads experts in it, if it `loads` or `loads_with`.
        in_memory: whether transformers keeps it packed in memory.
        tiled: whether tensor parallelism can only split at tile boundaries (`tensor_parallel`).
    """

    name: ClassVar[str]
    packed: ClassVar[bool] = True
    meaning: ClassVar[str] = ""
    independent: ClassVar[bool] = True
    checks: ClassVar[bool] = False
    per_expert: ClassVar[bool] = False
    joined: ClassVar[bool] = False
    chooses_scales: ClassVar[bool] = False
    scale_modes: ClassVar[tuple[str, ...]] = ()
    surveys: ClassVar[bool] = False
    needs_importance: ClassVar[bool] = False
    widens: ClassVar[bool] = False
    banded: ClassVar[bool] = False
    refines: ClassVar[bool] = False
    layouts: ClassVar[Mapping[str, str]] = {}
    quantized_inputs: ClassVar[bool] = False
    with_inputs: ClassVar[str] = ""
    served_inputs: ClassVar[str] = ""
    packable: ClassVar[str] = "linear layers"
    marks: ClassVar[tuple[str, ...]] = ("",)
    endings: ClassVar[tuple[str, ...]] = ()
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
    dialect: ClassVar[str] = ""
    load_format: ClassVar[str] = ""
    libraries: ClassVar[tuple[str, ...]] = ()
    served: ClassVar[bool] = False
    loads: ClassVar[bool] = False
    loads_experts: ClassVar[bool] = True
    in_memory: ClassVar[bool] = False
    tiled: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The display name."""
        return self.name.upper()

    @property
    def op(self) -> str:
        """The operation a plan shows for a weight encoded this way."""
        return self.name

    @property
    def tool_title(self) -> str:
        """The quantization tool whose layout it has, if servers read it."""
        return ""

    @property
    def loads_with(self) -> str:
        """The library with which transformers loads it, where `loads` does not say so."""
        return ""

    @property
    def cache_form(self) -> CacheForm | None:
        """How scales of a KV cache are written beside its weights; None if they have no place."""
        return None

    @property
    def tolerance(self) -> str:
        """The largest differences that `judge` misses; empty if it sees all."""
        return ""

    # --- stored weights

    def weight_name(self, name: str) -> str:
        """Return the name of the weight whose first tensor is called `name`."""
        return name

    def companions(self, tensors: Mapping[str, StoredTensor], name: str) -> list[str] | None:
        """Return the companions of the first tensor of a weight, in the order of parts.

        None means that this codec does not hold the weight. The first codec to return a list claims
        it, so recognize weights by unambiguous names, or by names and dtypes. `mismatch` checks
        shapes, `problem` everything else.
        """
        del tensors, name
        return None

    def problem(self, tensors: Mapping[str, StoredTensor], name: str) -> TensorError | None:
        """Return the problem with the tensors found by `companions`, or None."""
        del tensors, name
        return None

    def mismatch(self, weight: Weight, expected: TensorSpec) -> TensorError | None:
        """Return why a stored weight does not match the one the config requires, or None.

        By default its tensors must have the shapes that `layout` returns for it, and the dtypes
        that it returns for any float dtype of the weight.
        """
        layouts = [
            self.layout(TensorSpec(expected.name, dtype, expected.shape)) for dtype in FLOAT_DTYPES
        ]
        for part, specs in zip(weight.parts, zip(*layouts, strict=True), strict=False):
            if part.spec.shape != specs[0].shape:
                found, expected_shape = f"shape {list(part.spec.shape)}", list(specs[0].shape)
                expected_text = f"{expected_shape} by config.json"
                return TensorError(part.spec.name, found, expected=expected_text)
            dtypes = list(dict.fromkeys(spec.dtype for spec in specs))
            if part.spec.dtype not in dtypes:
                found = f"dtype {part.spec.dtype}"
                return TensorError(part.spec.name, found, expected=" or ".join(dtypes))
        return None

    def numel(self, weight: Weight) -> int:
        """Return the number of weights; override it if an element packs several."""
        return weight.main.spec.numel

    @abstractmethod
    def open(self, reader: Readable, weight: Weight, spec: TensorSpec) -> StoredValues:
        """Open the values of a stored weight; `spec` is the decoded weight.

        NaN and infinity among the values are refused on use, not here.

        Raises:
            TensorError: the scales or other decoding parameters are damaged.
        """

    def check(self, reader: Readable, weight: Weight) -> None:  # noqa: B027
        """Check a weight that is copied without being decoded.

        Raises:
            TensorError: the weight is damaged.
        """

    def quantizes_inputs(self, quantization: Mapping[str, Any]) -> Callable[[str], bool | None]:
        """Return whether servers quantize the inputs of a packed module, given its name.

        None: in another way than `input_quantizer`, or there is no telling.

        Args:
            quantization: ``quantization_config``, which may be malformed.
        """
        del quantization
        return lambda _: bool(self.served_inputs)

    def input_quantizer(self, reader: Readable, weight: Weight) -> InputQuantizer:
        """Return what servers do to the inputs of the layer of a weight, if `served_inputs`.

        Raises:
            TensorError: the stored scale of the inputs is damaged.
        """
        raise NotImplementedError

    # --- encoding

    @abstractmethod
    def layout(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """Return the tensors that a weight becomes, that of its values first."""

    def fits(self, spec: TensorSpec) -> str:
        """Return why a weight of this shape cannot be packed; empty if it can.

        Such a weight is copied, and the plan shows this reason.
        """
        del spec
        return ""

    def searches(self, columns: int) -> bool:
        """Return whether it uses `EncodingRequest.search` for rows of so many columns."""
        del columns
        return False

    def packs(self, role: Role) -> bool:
        """Return whether weights of this role may be packed.

        Rules that name an unpackable weight are refused; group rules skip it (`spared`).
        """
        return role.info.kind == "linear"

    def grain(self, spec: TensorSpec) -> int:
        """Return the number of rows whose multiples are valid cut points."""
        del spec
        return 1

    @abstractmethod
    def encode(self, request: EncodingRequest) -> Encoding:
        """Start encoding a weight."""

    def kernel(self, device: str) -> Kernel | None:
        """Return the kernel for ``cpu`` or a GPU; None if the codec has no kernels.

        Raises:
            UsageError: the device does not exist, or a library for it is missing.
        """
        del device
        return None

    def memory(self, spec: TensorSpec) -> int:
        """Return the memory in bytes that encoding a weight takes besides its piece."""
        del spec
        return 0

    def refining_memory(self, spec: TensorSpec) -> int:
        """Return the memory in bytes that refining takes, beside `memory` and what is written."""
        del spec
        return 0

    def decoding_memory(self, spec: TensorSpec) -> int:
        """Return the memory in bytes that decoding a weight takes besides its piece."""
        del spec
        return 0

    # --- loading by engines

    def config(self, modules: Sequence[LoaderModule], prefix: str, dtype: str) -> dict[str, Any]:
        """Return ``quantization_config`` for config.json.

        Args:
            modules: every weight in the output.
            prefix: prefix of the names of text tensors.
            dtype: the checkpoint's dtype, by its safetensors name.

        Raises:
            UsageError: no engine could load the combination.
        """
        del prefix, dtype
        return {"quant_method": self.method or self.name, "ignore": self._unpacked(modules)}

    def documents(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON files beside config.json that loaders read, given its section."""
        del quantization
        return {}

    def documents_findings(
        self, quantization: Mapping[str, Any], read: Callable[[str], Any]
    ) -> Iterator[Finding]:
        """Yield contradictions between ``quantization_config`` and the `documents`.

        Args:
            quantization: ``quantization_config``, which may be malformed.
            read: returns the parsed file of this name, or raises an `InputError`.
        """
        del quantization, read
        yield from ()

    def _unpacked(self, modules: Sequence[LoaderModule]) -> list[str]:
        """Return the names of all matrices in other codecs."""
        names = (m.module for m in modules if m.codec != self.name and len(m.spec.shape) == 2)
        return sorted(names)

    def config_findings(
        self, quantization: Mapping[str, Any], modules: Sequence[LoaderModule], *, vision: bool
    ) -> Iterator[Finding]:
        """Yield contradictions between ``quantization_config`` and the weights.

        The default matches the default `config`; override both together.
        """
        del vision
        if not any(module.codec == self.name for module in modules):
            message = f"promises {self.label}, but nothing is packed"
            yield Finding("quantization-config", "config.json", message)
        ignored, unpacked = quantization.get("ignore"), self._unpacked(modules)
        if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
            yield Finding("skip-list", "config.json", "ignore is not a list of names")
            return
        for name in sorted(set(ignored) ^ set(unpacked)):
            missing = "not packed, and missing from ignore"
            message = missing if name in unpacked else "in ignore, but packed"
            yield Finding("skip-list", name, message)

    def tensor_parallel(
        self, config: ModelConfig, modules: Sequence[LoaderModule], ranks: int
    ) -> Iterator[Finding]:
        """Yield the weights that cannot be split across `ranks` GPUs."""
        del config, modules, ranks
        yield from ()

    def notes(self, modules: Sequence[LoaderModule], dtype: str) -> Iterator[str]:
        """Yield notes for users of the output."""
        del modules, dtype
        yield from ()

    # --- verification

    @abstractmethod
    def judge(
        self,
        reader: Readable,
        weight: Weight,
        spec: TensorSpec,
        original: Iterator[Piece],
        result: WeightComparison,
    ) -> None:
        """Compare a stored weight with its original; add errors and findings to `result`.

        Args:
            reader: reads the artifact.
            weight: the stored weight.
            spec: the decoded weight.
            original: the entire original in pieces of whole grains, in source file order.
            result: empty; findings are about its `subject`.

        Raises:
            InputError: a part cannot be read or decoded.
        """

    def misread(
        self, reader: Readable, weight: Weight, quantization: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield why an engine that obeys ``quantization_config`` decodes a weight to others.

        Raises:
            InputError: a part cannot be read.
        """
        del reader, weight, quantization
        yield from ()

    def whole_scale(self, reader: Readable, weight: Weight) -> float | None:
        """Return the scale of the whole, which weights share that engines fuse; None without one.

        Raises:
            InputError: it cannot be read.
        """
        del reader, weight
        return None

    def too_far(self, errors: Mapping[str, float]) -> str:
        """Return why a weight as a whole is too far from its original; empty if it is not.

        Args:
            errors: the errors that `judge` put into its result.
        """
        del errors
        return ""


def stacked(spec: TensorSpec) -> tuple[int, int]:
    """Return (rows, row) of a weight with all leading dimensions merged."""
    row = spec.shape[-1] if spec.shape else 1
    return (spec.numel // row if row else 0), row
