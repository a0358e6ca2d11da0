"""Tuning of each container; the rest of this package is the same for all containers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.codec import Codec
from qwen35.codecs.ggml.codec import GGML, codec_name
from qwen35.codecs.ggml.types import FLOATS, GGML_TYPES, ggml_type
from qwen35.codecs.registry import CODECS
from qwen35.errors import UsageError
from qwen35.planning.containers import container_of
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.gguf_files.metadata import ALIGNMENT
from qwen35.planning.gguf_files.mixes import quantizable
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rules import Recipe
from qwen35.planning.step import Step
from qwen35.writing.write import write

if TYPE_CHECKING:
    from qwen35.codecs.input_quantizers import InputQuantizer
    from qwen35.planning.gguf_files.imatrix import Imatrix

__all__ = ["TUNABLE", "Tunable", "tunable_of"]


class Tunable(ABC):
    """The choices for artifacts of one container.

    Attributes:
        typed: whether the user may name the types and give an importance matrix.
        rounds_inputs: whether llama.cpp runs it, which rounds the inputs of products.
        loaded: bytes that a weight takes in the engine's memory; 0 for those of its file.
        exact: the lossless choice.
        exact_recipe: the built-in recipe with only that choice, if rules cannot express it.
        remedy: hint for weights that no choice fits.
        needs: flags that go with a tuned recipe, so that all else is as it was planned.
    """

    typed: ClassVar[bool] = False
    rounds_inputs: ClassVar[bool] = False
    loaded: ClassVar[int] = 0
    exact: ClassVar[str]
    exact_recipe: ClassVar[str] = ""
    remedy: ClassVar[str] = ""
    needs: ClassVar[str] = ""

    @abstractmethod
    def choices(self, kind: str, types: Iterable[str]) -> tuple[str, ...]:
        """Return the choices, the exact one last.

        Args:
            kind: the format.
            types: as named by the user; the defaults if empty.

        Raises:
            UsageError: there is no such type, or only one that quantizes nothing.
        """

    @abstractmethod
    def codec(self, choice: str) -> Codec:
        """Return the codec of a choice."""

    @abstractmethod
    def base(self, kind: str) -> str:
        """Return the built-in recipe for weights outside all units."""

    @abstractmethod
    def default_action(self, kind: str) -> str:
        """Return the base recipe's action for every unit; empty if it differs by unit."""

    @abstractmethod
    def plan(self, checkpoint: Checkpoint, recipe: Recipe, imatrix: Imatrix | None) -> Plan:
        """Plan an artifact."""

    @abstractmethod
    def steps(self, plan: Plan) -> Iterator[Step]:
        """Yield the steps of a base plan whose type can be chosen, in order."""

    def stored(self, nbytes: int) -> int:
        """Return the bytes a tensor of `nbytes` takes in a file."""
        return nbytes

    def input_rounding(self, choice: str) -> InputQuantizer | None:
        """Return what the engine does to the inputs of products with a choice; None if nothing."""
        del choice
        return None

    def size(self, plan: Plan, kinds: Mapping[str, str], planned: Callable[[], Plan]) -> int:
        """Return the bytes of the weight files.

        Args:
            plan: by the base recipe.
            kinds: tensor to choice.
            planned: returns the plan with these choices.
        """
        del plan, kinds
        return sum(file.nbytes for file in planned().files)

    @abstractmethod
    def reference(self, checkpoint: Checkpoint, folder: Path) -> str:
        """Return the unquantized model for the engine that runs artifacts; write it if needed."""


class _Safetensors(Tunable):
    """Whether each weight is packed."""

    loaded = 4  # float32
    exact = "plain"
    exact_recipe = "bf16"

    def choices(self, kind: str, types: Iterable[str]) -> tuple[str, ...]:
        del types
        return (kind, self.exact)

    def codec(self, choice: str) -> Codec:
        return CODECS[choice]

    def base(self, kind: str) -> str:
        return kind

    def default_action(self, kind: str) -> str:
        return kind

    def plan(self, checkpoint: Checkpoint, recipe: Recipe, imatrix: Imatrix | None) -> Plan:
        del imatrix
        return make_plan(checkpoint, recipe)

    def steps(self, plan: Plan) -> Iterator[Step]:
        for step in plan.steps:
            if step.packing and not step.targets[0].copied:
                yield step

    def reference(self, checkpoint: Checkpoint, folder: Path) -> str:
        if not checkpoint.adapters and not checkpoint.within:
            return str(checkpoint.folder())
        plan = make_plan(checkpoint, load_recipe(self.exact_recipe))
        return str(write(plan, folder / "merged", keep=False).out)


class _Gguf(Tunable):
    """Which ggml type each tensor gets."""

    typed = rounds_inputs = True
    exact = "f16"
    remedy = "add q8_0 or f16"

    types = (
        *("q3_K", "iq4_xs", "q4_K", "q5_K", "q6_K", "q8_0", "f16"),
        # Weights as coarse as in the k-quants of their size, but inputs far less rounded.
        *("iq4_nl", "q5_0", "q5_1"),
    )
    file_type = "Q4_K_M"
    """The file type of artifacts: decides weights outside all units, such as the MTP layer."""
    needs = f" --types {file_type}"

    def choices(self, kind: str, types: Iterable[str]) -> tuple[str, ...]:
        del kind
        names = tuple(types) or self.types
        found = {ggml_type(name.strip(), "--types").name for name in names} - {self.exact}
        floats = ", ".join(sorted(found & set(FLOATS)))
        if floats or not found:  # nothing would be gained by measuring them
            hint = f"name quantized types; {self.exact} is always one of the choices"
            raise UsageError("--types", floats or f"only {self.exact}", hint=hint)
        # Those of one size have an order too, by which an interrupted run knows itself.
        by_size = sorted(found, key=lambda name: (GGML_TYPES[name].size((256,)), name))
        return (*by_size, self.exact)

    def codec(self, choice: str) -> Codec:
        return CODECS[codec_name(choice)]

    def input_rounding(self, choice: str) -> InputQuantizer | None:
        rounding: InputQuantizer = next(c for c in GGML if c.kind.name == choice).input_rounding
        return rounding

    def base(self, kind: str) -> str:
        del kind
        return "mix"

    def default_action(self, kind: str) -> str:
        del kind
        return ""

    def plan(self, checkpoint: Checkpoint, recipe: Recipe, imatrix: Imatrix | None) -> Plan:
        return make_plan(checkpoint, recipe, types=(self.file_type,), imatrix=imatrix)

    def steps(self, plan: Plan) -> Iterator[Step]:
        """Yield steps in the order of the file."""
        by_name = {step.outputs[0].name: step for step in plan.steps}
        for tensor in files_of(plan)[0].tensors:
            if quantizable(tensor.name, tensor.shape):
                yield by_name[tensor.name]

    def stored(self, nbytes: int) -> int:
        return nbytes + -nbytes % ALIGNMENT

    def size(self, plan: Plan, kinds: Mapping[str, str], planned: Callable[[], Plan]) -> int:
        del planned  # types do not change the header's length, and planning a vocabulary is slow
        [file] = files_of(plan)
        return file.size_with({**file.kinds, **kinds})

    def reference(self, checkpoint: Checkpoint, folder: Path) -> str:
        plan = make_plan(checkpoint, load_recipe("mix", "gguf"), types=("F16",))
        return str(write(plan, folder / "F16", keep=False).out)


TUNABLE: dict[str, Tunable] = {"safetensors": _Safetensors(), "gguf": _Gguf()}
"""Container to its tuning."""


def tunable_of(kind: str) -> Tunable:
    """Return the tuning of the container of a format.

    Raises:
        InputError: there is no such format.
    """
    return TUNABLE[container_of(kind).name]
