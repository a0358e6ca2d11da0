"""The GGUF container."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.split_gguf import by_model
from qwen35.codecs.ggml.types import COMPILED, ggml_type
from qwen35.codecs.registry import CODECS
from qwen35.errors import Finding, InputError
from qwen35.planning.container import Container, ContainerInputs, ContainerOptions, EditedFile
from qwen35.planning.gguf_files.mixes import FILE_TYPES, MIX

if TYPE_CHECKING:
    from qwen35.checkpoint.source import Checkpoint
    from qwen35.planning.output_plan import Plan
    from qwen35.planning.rules import Recipe

__all__ = ["GgufContainer"]


class GgufContainer(Container):
    """GGUF files: one per file type, or several if it is split, and one for the vision tower."""

    name = "gguf"
    verb = "gguf"
    formats = ("gguf",)
    recipes = "a built-in recipe for GGUF"
    types = tuple(FILE_TYPES)
    complete = False
    libraries = ("gguf", "llama_cpp_python")
    separate = True
    engine = (("llama_cpp",), "llama-cpp")

    # Imports are late: commands without GGUF must not pay for numpy, yaml and the gguf library.

    def action(self, recipe: str, rule: str, action: str, kind: str) -> str:
        """Return the action: a ggml type in its canonical spelling, or ``mix``."""
        del recipe, kind
        return MIX if action == MIX else ggml_type(action, rule).name

    def options(self, **values: Any) -> ContainerOptions:
        """Return `GgufOptions`."""
        from qwen35.planning.gguf_files.gguf_options import GgufOptions

        return GgufOptions(**values)

    def make(self, checkpoint: Checkpoint, recipe: Recipe, options: Any) -> Plan:
        """Plan the files."""
        from qwen35.planning.gguf_files.adapter_plan import make_adapter
        from qwen35.planning.gguf_files.gguf_plan import make

        if options.adapter_only:
            return make_adapter(checkpoint, recipe, options)
        return make(checkpoint, recipe, options)

    def request_json(self, plan: Plan, *, whole: bool = False) -> dict[str, Any]:
        """Return recipe, types and importance matrix."""
        from qwen35.planning.gguf_files.gguf_manifest import request_json

        return request_json(plan, whole=whole)

    def request_from_manifest(
        self, manifest: Mapping[str, Any], inputs: ContainerInputs
    ) -> tuple[Recipe, ContainerOptions]:
        """Return the recipe and options recorded in a manifest."""
        from qwen35.planning.gguf_files.gguf_manifest import request_from_manifest

        return request_from_manifest(self, manifest, inputs)

    def tensors_json(self, plan: Plan) -> dict[str, dict[str, str]]:
        """Map each file's tensors to type and shape, in the converter's order."""
        from qwen35.planning.gguf_files.gguf_plan import files_of

        return {
            file.name: {
                part.name: f"{part.dtype} {list(part.shape)}"
                for tensor in file.tensors
                for part in file.parts(tensor)
            }
            for file in files_of(plan)
        }

    def prepare(self, plan: Plan) -> None:
        """Choose the quantizers of every type, if a tensor needs them."""
        kinds = _packed(plan)
        if kinds:
            from qwen35.codecs.ggml.quantizers import quantizer

            for kind in kinds:
                quantizer(kind, plan.options.encoder)

    def file_findings(self, plan: Plan, folder: Path) -> Iterator[Finding]:
        """Yield findings for files that are missing, unreadable, or not of the planned type."""
        from qwen35.checkpoint.gguf_header import read_container
        from qwen35.planning.gguf_files.gguf_plan import files_of

        for planned in files_of(plan):
            path = folder / planned.name
            if not path.is_file():
                yield Finding("quantization", planned.name, "missing")
                continue
            try:
                container = read_container(path)
            except InputError as error:  # a gate reports every file, so go on with the next
                yield Finding("quantization", planned.name, error.found)
                continue
            found = container.keys.get("general.file_type")
            if planned.first and found != planned.file_type.code:
                message = f"file type {found}, expected {planned.file_type.code}"
                yield Finding("quantization", planned.name, message)

    def models(self, folder: Path) -> list[Path]:
        """Return the files with a language model; of a split one the first."""
        models = by_model(sorted(path.name for path in folder.glob("*.gguf")))
        first = (folder / names[0] for names in models)
        return [path for path in first if not _is_beside(path)]

    def with_template(
        self, folder: Path, names: Collection[str], template: str
    ) -> dict[str, EditedFile]:
        """Return each model with the template among its keys; its tensors stay as they are."""
        from qwen35.checkpoint.gguf_header import is_adapter
        from qwen35.planning.gguf_files.template_edit import with_template

        files = [path for path in sorted(folder.glob("*.gguf")) if path.name in names]
        models = [p for p in files if not (p.name.startswith("mmproj-") or is_adapter(p))]
        return {path.name: with_template(path, template) for path in models}

    def head_memory(self, plan: Plan) -> int:
        """Return the bytes of the heads, and of the vocabulary while a head is rendered."""
        # While the library renders a head, the tokens exist as Python strings, many times as large.
        heads = [len(file.head) for file in plan.files]
        return sum(heads) + 16 * max(heads, default=0)

    def kind(self, plan: Plan) -> str:
        """Return the container's name: one file mixes several types."""
        del plan
        return self.name

    def has_vision(self, plan: Plan) -> bool:
        """Whether the vision tower is written."""
        return any(step.role.scope == "visual" for step in plan.steps)

    def suffix(self, plan: Plan) -> str:
        """Return the suffix of an artifact's name."""
        del plan
        return "-GGUF"

    def text(self, plan: Plan, threads: int) -> str:
        """Render a plan for people."""
        from qwen35.planning.gguf_files.gguf_display import plan_text

        return plan_text(plan, threads)

    def json(self, plan: Plan, threads: int) -> dict[str, Any]:
        """Return a plan as plain values."""
        from qwen35.planning.gguf_files.gguf_display import plan_json

        return plan_json(plan, threads)

    def written_text(self, plan: Plan) -> str:
        """Say which types ggml encoded because its bytes are others than ours; mostly none."""
        from qwen35.codecs.ggml.quantizers import differs

        own = COMPILED if plan.options.encoder == "auto" else ()
        kinds = [kind for kind in _packed(plan) if kind in own and differs(kind)]
        return f"{', '.join(kinds)} by ggml, which was built to round otherwise" * bool(kinds)


def _is_beside(path: Path) -> bool:
    """Whether a file goes with a language model: the tower, the MTP layer alone, an adapter."""
    from qwen35.checkpoint.gguf_header import is_adapter, is_draft

    return path.name.startswith("mmproj-") or is_draft(path) or is_adapter(path)


def _packed(plan: Plan) -> list[str]:
    """Return the quantized types of a plan, in the order of the table of codecs."""
    used = {target.codec for step in plan.steps for target in step.targets}
    return [codec.label for name, codec in CODECS.items() if codec.packed and name in used]
