"""Write the model card from the manifest and the folder, with huggingface_hub's card classes."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Self

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.sidecars import LEGAL, MANIFEST_NAME
from qwen35.checkpoint.source import read_json
from qwen35.checkpoint.split_gguf import title_of
from qwen35.codecs.codec import Codec
from qwen35.codecs.dialect import Program
from qwen35.codecs.kv_cache import CACHE_ENDINGS
from qwen35.codecs.plain.codec import Plain
from qwen35.codecs.registry import (
    CODECS,
    DIALECTS,
    codec_of,
    dialect_of,
    group,
    is_packed,
    packings,
)
from qwen35.display import printable
from qwen35.errors import InputError
from qwen35.model.model_config import parse_config
from qwen35.model.roles import role_of
from qwen35.planning.containers import container_from_manifest
from qwen35.planning.gguf_files.gguf_container import GgufContainer
from qwen35.planning.manifest import amendment_notes, card_of, recipe_of, source_of, tensor_of
from qwen35.planning.refinement import SEARCHED, refined_codes, refined_on
from qwen35.planning.rules import Recipe, Rule
from qwen35.publishing.card_models import CardModel, card_models
from qwen35.publishing.card_steps import (
    HeldTensors,
    InputFile,
    ServerOption,
    adapter_options,
    context_of,
    held_tensors,
    input_files,
    make_command,
    matched,
    measured_on,
    server_options,
)
from qwen35.publishing.markdown import as_code, as_text
from qwen35.publishing.modelfile import (
    gguf_adapters,
    gguf_drafts,
    gguf_models,
    is_split,
    merge_command,
)
from qwen35.tensors import StoredTensor, Weight
from qwen35.verification.template_comparison import stored_templates

__all__ = ["CardMeasurements", "card_text"]

_LICENSES = {"Apache License": "apache-2.0", "MIT License": "mit"}
"""First words of a LICENSE file to the Hub's identifier."""

_PRIVATE = ("not copied: ", "left behind: ")
"""How notes start that list a source's other files; the second is an older spelling."""

_MAIN = ("Mean KLD", "Same top p, %", "Bytes")
"""The rows of an evaluation that a card shows; report.json has them all."""

_HUB = "https://huggingface.co"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_VERSION = re.compile(r"[\w.+!-]{1,64}", re.ASCII)
_TYPE = re.compile(r"\w+", re.ASCII)


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

    def escaped(self) -> dict[str, Any]:
        """Return the main rows, or all if there are none, with their cells as Markdown."""
        main = [row for row in self.rows if row[0] in _MAIN]
        rows = [[as_text(cell) for cell in row] for row in main or self.rows]
        return {"columns": list(map(as_text, self.columns)), "rows": rows}

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
        base_model: the base model; by default the manifest's source, or the base that its card
            names.
        measures: the table of an evaluation, if there is one.

    Raises:
        InputError: the manifest lacks a key that the card needs.
    """
    from huggingface_hub import ModelCard, ModelCardData

    facts = _Facts(place, manifest, base_model, repo)
    data = ModelCardData(
        base_model=facts.bases[0] if len(facts.bases) == 1 else facts.bases or None,
        base_model_relation=facts.relation,
        datasets=facts.said.get("datasets"),
        language=facts.said.get("language"),
        library_name=facts.codec.library or None,
        license=facts.license,
        license_name=facts.said.get("license_name"),
        license_link=facts.said.get("license_link"),
        pipeline_tag="image-text-to-text" if facts.vision else "text-generation",
        tags=["qwen3_5", *facts.tags],
    )
    template = resources.files("qwen35.publishing").joinpath("card.md.jinja").read_text("utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        repo=repo,
        name=repo.split("/")[-1],
        facts=facts,
        title=facts.title,
        measures=measures.escaped() if measures else None,
        text=as_text,
        code=as_code,
        manifest=manifest,
    )
    return str(card).rstrip() + "\n"


class _Facts:
    """The values for the template."""

    def __init__(
        self, place: LocalFolder, manifest: Mapping[str, Any], base_model: str | None, repo: str
    ) -> None:
        self._place = place
        self._manifest = manifest
        self._recipe = recipe_of(manifest, container_from_manifest(manifest))
        self.source, self.revision = source_of(manifest)
        self.version = _version(manifest)
        self.said = card_of(manifest)
        given = [name for name in (base_model or self.source,) if name]
        said = (name for name in self.said.get("base_model", []) if name.lower() != repo.lower())
        self.bases: list[str] = given or list(said)  # no repository is its own base
        self.base_model = next(iter(self.bases), None)
        self.recipe = self._recipe.name
        self.gguf = gguf_models(place)
        self.drafts = gguf_drafts(place)
        self.adapter_files = gguf_adapters(place)
        self.mmproj = sorted(n for n in place.sizes() if n.startswith("mmproj-"))
        self._names = [name for tensors in manifest["tensors"].values() for name in tensors]
        self.weights = _weights(manifest, place)
        self._codecs = _codecs(self.weights, gguf=bool(self.gguf or self.adapter_files))
        self.codec = next(iter(self._codecs))
        self.vision = bool(self.mmproj) or any(
            role_of(weight.name).scope == "visual" for weight in self.weights
        )

    @property
    def relation(self) -> str | None:
        """What it is to its base, in the Hub's words."""
        if self.adapter_files and not self.gguf:
            return "adapter" if self.base_model else None
        return "quantized" if self.base_model and self.codec.packed else None

    @property
    def lora(self) -> str:
        """The first adapter's file, as a word of a command."""
        return shlex.quote(printable(self.adapter_files[0]))

    @property
    def base_link(self) -> str:
        """The base model, as a link if it is on the Hub."""
        name = str(self.base_model)
        return f"[{name}]({_HUB}/{name})" if _REPOSITORY.fullmatch(name) else as_text(name)

    @property
    def title(self) -> str:
        """The formats, and the tool whose layout they have."""
        described = [codec.described or codec.label for codec in self._codecs]
        if len(described) > 1:
            counted = zip(described, self._codecs.values(), strict=True)
            text = f"mixed precision: {', '.join(f'{count} {one}' for one, count in counted)}"
        else:
            text = described[0]
        if self.adapter_files and not self.gguf:
            text = f"a LoRA adapter of it as {text}"
        tool = self.codec.tool_title
        return f"{text}, in the layout of {tool}" if tool else text

    @property
    def tags(self) -> list[str]:
        """The tags of all formats."""
        return list(dict.fromkeys(tag for codec in self._codecs for tag in codec.tags))

    @property
    def notes(self) -> list[str]:
        """The notes on the artifact; what was not copied from a folder is its maker's business."""
        notes = self._manifest.get("notes", [])
        return [note for note in notes if not note.startswith(_PRIVATE)]

    @property
    def refined(self) -> str:
        """How refined codes were chosen, and by which text; empty if there are none."""
        codes = refined_codes(self._manifest)
        if not codes:
            return ""
        scales = " and scales" if codes == SEARCHED else ""
        texts, tokens = refined_on(self._manifest["recipe"])
        by = f", calibrated on {tokens:,} tokens of {', '.join(texts)}" if texts else ""
        return f"Refined codes{scales}: chosen by what they do to the outputs of layers{by}"

    @property
    def license(self) -> str | None:
        """The licence by the source's card, else by LICENSE in any form; None without either."""
        if "license" in self.said:
            return str(self.said["license"])
        sizes = self._place.sizes()
        name = next((name for name in LEGAL if name in sizes and name.startswith("LICENSE")), None)
        if name is None:
            return None
        start = self._place.read(name, 0, min(sizes[name], 400))
        text = start.decode(errors="replace").strip()
        return next((kind for head, kind in _LICENSES.items() if text.startswith(head)), "other")

    @property
    def files(self) -> list[tuple[str, int]]:
        """Name and size of each file in the manifest."""
        return [(name, entry["size"]) for name, entry in self._manifest["files"].items()]

    @property
    def models(self) -> list[CardModel]:
        """A row for each model of the repository, the largest first."""
        return card_models(self._manifest, self.gguf, self._report)

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
        """The command that writes this artifact, if a built-in recipe and options determine it."""
        return make_command(self._recipe, self._manifest, self.origin)

    @property
    def origin(self) -> str:
        """The source, in commands."""
        return f"{self.source}@{self.revision}" if self.source else "SOURCE"

    @property
    def inputs(self) -> list[InputFile]:
        """The files beside the source that it was made from."""
        return list(input_files(self._manifest))

    @property
    def adapters(self) -> list[str]:
        """The options of commands that merge its adapters."""
        return adapter_options(self._manifest)

    @property
    def donor_is_folder(self) -> bool:
        """Whether it has the MTP layer of a checkpoint that was in a folder."""
        donor = self._manifest["source"].get("mtp_from", {})
        return bool(donor) and "repo" not in donor

    @property
    def options(self) -> list[ServerOption]:
        """What servers do by other flags."""
        cache = any(name.endswith(CACHE_ENDINGS) for name in self._names)
        mtp = any(role_of(weight.name).scope == "mtp" for weight in self.weights)
        templates = stored_templates(self._place).values()
        tools = any("<function=" in text for text in templates)
        # How bitsandbytes and MTP go together in servers is not documented.
        return list(
            server_options(tools=tools, mtp=mtp and not self.codec.load_format, cache=cache)
        )

    @property
    def programs(self) -> list[Program]:
        """What runs it, if only the programs of a dialect do."""
        if not self.codec.dialect:
            return []
        programs = DIALECTS[self.codec.dialect].programs
        return [program for program in programs if self.vision or not program.vision]

    @property
    def loads_with(self) -> str:
        """The library with which transformers loads it; empty if it does not."""
        experts = (w for w in self.weights if role_of(w.name).info.kind == "experts")
        loads = all(codec_of(weight).loads_experts for weight in experts)
        return self.codec.loads_with if loads else ""

    @property
    def held(self) -> list[HeldTensors]:
        """GGUF: the rules that give tensors a type of their own."""
        return list(held_tensors(self._recipe, self._manifest)) if self.gguf else []

    @property
    def amendments(self) -> list[str]:
        """A sentence for each amendment."""
        notes = amendment_notes(self._manifest)
        return [text[0].upper() + text[1:] for text in notes]

    @property
    def types(self) -> list[str]:
        """GGUF: the last parts of the models' names, such as Q4_K_M, the preferred one first."""
        parts = [title_of([name]).rpartition("-")[2] for name in self.gguf]
        return [part for part in parts if _TYPE.fullmatch(part)]

    @property
    def split(self) -> list[str]:
        """GGUF: a command for each split model, which makes one file of it."""
        return [merge_command(printable(name)) for name in self.gguf if is_split(name)]

    @property
    def measured_on(self) -> str:
        """What the figures compare, on which text; empty without a report that says it."""
        return measured_on(self._report, self._manifest.get("plan")) if self._report else ""

    @property
    def _report(self) -> Any:
        known = "report.json" in self._place.sizes()
        return read_json(self._place, "report.json") if known else None

    @property
    def served(self) -> str:
        """What was found where it was served, in a sentence; empty if nobody asked."""
        entry = self._manifest.get("served")
        if not isinstance(entry, dict) or entry.get("passed") is not True:
            return ""
        server, result = entry.get("server"), entry.get("result")
        if not isinstance(result, str):
            return ""
        return f"{server if isinstance(server, str) else 'A server'}: {result}"

    @property
    def context(self) -> int | None:
        """The longest context by config.json."""
        return context_of(self._config)

    @property
    def model_class(self) -> str:
        """The transformers class that loads it."""
        return "AutoModelForImageTextToText" if self.vision else "AutoModelForCausalLM"

    @property
    def images(self) -> bool:
        """Whether transformers finds the settings with which it prepares images."""
        found = {"preprocessor_config.json", "processor_config.json"} & self._place.sizes().keys()
        return self.vision and bool(found)

    @property
    def reasons(self) -> bool:
        """Whether the chat template marks reasoning; assumed without a template."""
        templates = stored_templates(self._place).values()
        return not templates or any("</think>" in text for text in templates)

    @property
    def architecture(self) -> str:
        """The architecture in config.json."""
        config = self._config
        names = config.get("architectures") if isinstance(config, dict) else None
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def _config(self) -> Any:
        return read_json(self._place, "config.json") if "config.json" in self._place.sizes() else {}


def _version(manifest: Mapping[str, Any]) -> str:
    """Return the version of qwen35 that wrote an artifact: it goes into a command."""
    version: str = manifest.get("tool", {}).get("qwen35", "")
    if not _VERSION.fullmatch(version):
        raise InputError(MANIFEST_NAME, "names no version of qwen35")
    return version


def _weights(manifest: Mapping[str, Any], place: LocalFolder) -> tuple[Weight, ...]:
    """Group the manifest's tensors into weights; a dialect also takes config.json."""
    stored: dict[str, StoredTensor] = {}
    for file, tensors in manifest["tensors"].items():
        if not file.endswith(".safetensors"):
            continue
        for name, text in tensors.items():
            if not name.endswith(CACHE_ENDINGS):
                stored[name] = StoredTensor(tensor_of(name, text), file, 0)
    dialect = dialect_of(stored)
    if dialect is None:
        return group(stored)[0]
    config = parse_config(dialect.family_config(read_json(place, "config.json")))
    named = dialect.family_tensors(stored, config)
    return group(named.tensors, named.held)[0]


def _codecs(weights: tuple[Weight, ...], *, gguf: bool) -> dict[Codec, int]:
    """Return the codecs that describe an artifact, with their weights, the most frequent first."""
    if gguf:  # all ggml types have the same description
        return {next(iter(packings(GgufContainer.name).values())): 0}
    packed = Counter(weight.storage for weight in weights if is_packed(weight))
    counts = packed.most_common() or [(Plain.name, len(weights))]
    return {CODECS[name]: count for name, count in counts}


def _treatments(recipe: Recipe, weights: tuple[Weight, ...]) -> Iterator[_Treatment]:
    counts: Counter[tuple[Rule, str]] = Counter()
    for weight in weights:
        rule = recipe.rule_for(role_of(weight.name))
        stored = codec_of(weight).label if is_packed(weight) else weight.main.spec.dtype
        counts[rule, stored] += 1
    for rule in recipe.rules:
        match = matched(rule.match, rule)
        if rule.action == "drop":
            yield _Treatment(match, "dropped", 0, rule.reason)
        for stored in sorted(stored for met, stored in counts if met is rule):
            yield _Treatment(match, stored, counts[rule, stored], rule.reason)
