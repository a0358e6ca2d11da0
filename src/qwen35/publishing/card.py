"""Write the model card from the manifest and the folder, with huggingface_hub's card classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Self

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import read_json
from qwen35.codecs.codec import Codec
from qwen35.codecs.plain.codec import Plain
from qwen35.codecs.registry import CODECS, codec_of, group, is_packed, packings
from qwen35.model.roles import role_of
from qwen35.planning.containers import container_from_manifest
from qwen35.planning.gguf_files.gguf_container import GgufContainer
from qwen35.planning.manifest import recipe_of, source_of
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.planning.rules import Recipe, Rule
from qwen35.publishing.modelfile import gguf_models
from qwen35.tensors import StoredTensor, TensorSpec, Weight

__all__ = ["CardMeasurements", "card_text"]

_LICENSES = {"Apache License": "apache-2.0", "MIT License": "mit"}
"""First words of a LICENSE file to the Hub's identifier."""

_RECIPE_ONLY = {"name", "format", "rules"}
"""A manifest's keys of a recipe that was used without further options."""


@dataclass(frozen=True)
class CardMeasurements:
    """The table of an evaluation report.

    Args:
        columns: headings.
        rows: one value per column.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def parse(cls, table: Any) -> Self | None:
        """Read a table; return None if it is malformed."""
        if not isinstance(table, dict):
            return None
        columns, rows = table.get("columns"), table.get("rows")
        if not isinstance(columns, list) or not isinstance(rows, list) or not columns:
            return None
        if not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
            return None
        return cls(tuple(map(str, columns)), tuple(map(tuple, rows)))

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return {"columns": list(self.columns), "rows": [list(row) for row in self.rows]}


@dataclass(frozen=True)
class _Treatment:
    """A row of the card's table: a rule of the recipe and its effect."""

    match: str
    stored: str
    count: int
    reason: str


def card_text(
    place: LocalFolder,
    manifest: Mapping[str, Any],
    repo: str,
    base_model: str | None = None,
    measures: CardMeasurements | None = None,
) -> str:
    """Return README.md of an artifact.

    Args:
        place: its folder.
        manifest: its manifest.
        repo: the repository's name.
        base_model: the base model; by default the manifest's source.
        measures: the table of an evaluation, if there is one.

    Raises:
        InputError: the manifest lacks a key that the card needs.
    """
    from huggingface_hub import ModelCard, ModelCardData

    facts = _Facts(place, manifest, base_model)
    data = ModelCardData(
        base_model=facts.base_model,
        base_model_relation="quantized" if facts.base_model and facts.codec.packed else None,
        library_name=facts.codec.library or None,
        license=facts.license,
        pipeline_tag="image-text-to-text" if facts.vision else "text-generation",
        tags=["qwen3_5", *facts.codec.tags],
    )
    template = resources.files("qwen35.publishing").joinpath("card.md.jinja").read_text("utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        repo=repo,
        name=repo.split("/")[-1],
        facts=facts,
        title=facts.codec.described or facts.codec.label,
        measures=asdict(measures) if measures else None,
        manifest=manifest,
    )
    return str(card).rstrip() + "\n"


class _Facts:
    """The values for the template."""

    def __init__(
        self, place: LocalFolder, manifest: Mapping[str, Any], base_model: str | None
    ) -> None:
        self._place = place
        self._manifest = manifest
        self._recipe = recipe_of(manifest, container_from_manifest(manifest))
        self.source, self.revision = source_of(manifest)
        self.base_model = base_model or self.source
        self.recipe = self._recipe.name
        self.gguf = gguf_models(place)
        self.mmproj = sorted(n for n in place.sizes() if n.startswith("mmproj-"))
        self.weights = _weights(manifest)
        self.codec = _codec(self.weights, gguf=bool(self.gguf))
        self.vision = bool(self.mmproj) or any(
            role_of(weight.name).scope == "visual" for weight in self.weights
        )

    @property
    def license(self) -> str | None:
        """The licence according to LICENSE; None without that file."""
        sizes = self._place.sizes()
        if "LICENSE" not in sizes:
            return None
        start = self._place.read("LICENSE", 0, min(sizes["LICENSE"], 400))
        text = start.decode(errors="replace").strip()
        return next((name for head, name in _LICENSES.items() if text.startswith(head)), "other")

    @property
    def files(self) -> list[tuple[str, int]]:
        """Name and size of each file in the manifest."""
        return [(name, entry["size"]) for name, entry in self._manifest["files"].items()]

    @property
    def total(self) -> int:
        """Bytes of these files."""
        return sum(size for _, size in self.files)

    @property
    def treatments(self) -> list[_Treatment]:
        """The effect of each rule of the recipe; rules that match no tensor are left out."""
        return list(_treatments(self._recipe, self.weights)) if self.weights else []

    @property
    def command(self) -> str:
        """The command that writes this artifact, if a built-in recipe alone determines it."""
        name = self._recipe.name
        if not self.source or self._manifest["recipe"].keys() != _RECIPE_ONLY:
            return ""
        container = self._recipe.container
        if name not in built_in(container.name):
            return ""
        if load_recipe(name, container.name).rules != self._recipe.rules:
            return ""
        return f"qwen35 {container.verb} {self.source}@{self.revision} OUT --recipe {name}"

    @property
    def model_class(self) -> str:
        """The transformers class that loads it."""
        return "AutoModelForImageTextToText" if self.vision else "AutoModelForCausalLM"

    @property
    def architecture(self) -> str:
        """The architecture in config.json."""
        if "config.json" not in self._place.sizes():
            return ""
        config = read_json(self._place, "config.json")
        names = config.get("architectures") if isinstance(config, dict) else None
        return str(names[0]) if isinstance(names, list) and names else ""


def _weights(manifest: Mapping[str, Any]) -> tuple[Weight, ...]:
    """Group the manifest's tensors into weights."""
    stored: dict[str, StoredTensor] = {}
    for file, tensors in manifest["tensors"].items():
        if not file.endswith(".safetensors"):
            continue
        for name, text in tensors.items():
            dtype, _, shape = str(text).partition(" ")
            sizes = tuple(int(part) for part in shape.strip("[]").split(",") if part.strip())
            stored[name] = StoredTensor(TensorSpec(name, dtype, sizes), file, 0)
    return group(stored)[0]


def _codec(weights: tuple[Weight, ...], *, gguf: bool) -> Codec:
    """Return the codec that describes an artifact."""
    if gguf:  # all ggml types have the same description
        return next(iter(packings(GgufContainer.name).values()))
    packed = {weight.storage for weight in weights if is_packed(weight)}
    return CODECS[min(packed, default=Plain.name)]


def _treatments(recipe: Recipe, weights: tuple[Weight, ...]) -> Iterator[_Treatment]:
    counts: Counter[tuple[Rule, str]] = Counter()
    for weight in weights:
        rule = recipe.rule_for(role_of(weight.name))
        stored = codec_of(weight).label if is_packed(weight) else weight.main.spec.dtype
        counts[rule, stored] += 1
    for rule in recipe.rules:
        if rule.action == "drop":
            yield _Treatment(rule.match, "dropped", 0, rule.reason)
        for stored in sorted(stored for met, stored in counts if met is rule):
            yield _Treatment(rule.match, stored, counts[rule, stored], rule.reason)
