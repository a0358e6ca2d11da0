"""The safetensors container."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.sidecars import sidecar_names
from qwen35.codecs.registry import CODECS, packings
from qwen35.errors import UsageError
from qwen35.planning.container import Container, ContainerInputs, ContainerOptions, EditedFile

if TYPE_CHECKING:
    from qwen35.checkpoint.source import Checkpoint
    from qwen35.codecs.codec import Codec
    from qwen35.planning.output_plan import Plan
    from qwen35.planning.rules import Recipe

__all__ = ["ACTIONS", "SafetensorsContainer"]

ACTIONS: dict[str, str] = {
    "drop": "not written",
    "keep": "copied as stored, packed or not",
    **{
        name: codec.meaning
        for name, codec in CODECS.items()
        if codec.container == "safetensors" and codec.meaning
    },
}
"""The actions of rules, with their meaning."""


class SafetensorsContainer(Container):
    """Shards, index, config.json and sidecars."""

    name = "safetensors"
    verb = "convert"
    formats = ("stored", *packings("safetensors"))
    recipes = "a built-in recipe"
    engine = (("torch", "transformers"), "nf4")

    # Imports are late: listing recipes and actions must stay cheap.

    def action(self, recipe: str, rule: str, action: str, kind: str) -> str:
        """Return the action: one of `ACTIONS`; of the packing ones, only the format's own."""
        if action not in ACTIONS:
            raise UsageError(rule, f"action {action!r}", expected=" or ".join(ACTIONS))
        codec = CODECS.get(action)
        if codec is not None and codec.packed and not _goes_with(codec, kind):
            hint = f'give it format = "{action}"'
            raise UsageError(recipe, f"packs as {codec.label}", hint=hint)
        return action

    def options(self, **values: Any) -> ContainerOptions:
        """Return `SafetensorsOptions`."""
        from qwen35.planning.safetensors_files.safetensors_options import SafetensorsOptions

        return SafetensorsOptions(**values)

    def make(self, checkpoint: Checkpoint, recipe: Recipe, options: Any) -> Plan:
        """Plan the output."""
        from qwen35.planning.safetensors_files.safetensors_plan import make

        return make(checkpoint, recipe, options)

    def request_json(self, plan: Plan, *, whole: bool = False) -> dict[str, Any]:
        """Return recipe and calibration."""
        from qwen35.planning.safetensors_files.safetensors_manifest import request_json

        return request_json(plan, whole=whole)

    def request_from_manifest(
        self, manifest: Mapping[str, Any], inputs: ContainerInputs
    ) -> tuple[Recipe, ContainerOptions]:
        """Return the recipe and options recorded in a manifest."""
        from qwen35.planning.safetensors_files.safetensors_manifest import request_from_manifest

        return request_from_manifest(self, manifest, inputs)

    def tensors_json(self, plan: Plan) -> dict[str, dict[str, str]]:
        """Map each file's tensors to dtype and shape."""
        return {
            file.name: {out.name: _described(out.dtype, out.shape) for out in file.head_tensors}
            for file in plan.files
        }

    def amendable(self, *, vision: bool) -> tuple[str, ...]:
        """Return the sidecars; config.json and the index belong to the weights."""
        return sidecar_names(vision=vision)

    def with_template(
        self, folder: Path, names: Collection[str], template: str
    ) -> dict[str, EditedFile]:
        """Return the file that loaders prefer to any other template."""
        del folder, names
        return {"chat_template.jinja": EditedFile(template.encode())}

    def kind(self, plan: Plan) -> str:
        """Return the codec that packs weights, of several the recipe's; ``plain`` if none does."""
        packings = {step.packing for step in plan.steps if step.packing}
        return (
            plan.recipe.format if plan.recipe.format in packings else min(packings, default="plain")
        )

    def has_vision(self, plan: Plan) -> bool:
        """Whether the vision tower is written."""
        return any(step.role.scope == "visual" and step.targets for step in plan.steps)

    def suffix(self, plan: Plan) -> str:
        """Return the suffix of its codec."""
        return CODECS[self.kind(plan)].suffix

    def text(self, plan: Plan, threads: int) -> str:
        """Render a plan for people."""
        from qwen35.planning.safetensors_files.safetensors_display import plan_text

        return plan_text(plan, threads)

    def json(self, plan: Plan, threads: int) -> dict[str, Any]:
        """Return a plan as plain values."""
        from qwen35.planning.safetensors_files.safetensors_display import plan_json

        return plan_json(plan, threads)

    def packed_json(self, plan: Plan) -> dict[str, int]:
        """Return the number of weights per packing codec."""
        return dict(Counter(step.packing for step in plan.steps if step.packing))

    def written_text(self, plan: Plan) -> str:
        """Summarize the packed weights per codec."""
        from qwen35.planning.safetensors_files.safetensors_display import packed_text

        return packed_text(plan)


@cache
def _described(dtype: str, shape: tuple[int, ...]) -> str:
    """Return type and shape; one string for the tensors of all experts."""
    return f"{dtype} {list(shape)}"


def _goes_with(codec: Codec, kind: str) -> bool:
    """Return whether one config.json can describe weights of a codec beside those of a format."""
    other = CODECS.get(kind)
    return codec.name == kind or bool(other and codec.method and codec.method == other.method)
