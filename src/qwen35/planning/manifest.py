"""The manifest (qwen35.json): an output's source, recipe and tool versions, and its file hashes."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.header import json_bytes, json_size
from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint, read_json
from qwen35.codecs.registry import quantized_weights
from qwen35.errors import InputError, UsageError
from qwen35.planning.container import Container
from qwen35.planning.layers import parse_layers, spell_layers
from qwen35.planning.recorded_adapters import are_recorded
from qwen35.planning.refinement import CODES, is_refined_record, refined_record
from qwen35.planning.rules import Recipe, Rule
from qwen35.planning.source_card import card_words, source_card
from qwen35.tensors import TensorSpec
from qwen35.version import __version__

if TYPE_CHECKING:
    from qwen35.planning.output_plan import Plan

__all__ = [
    "MANIFEST_VERSION",
    "amendment_notes",
    "card_of",
    "first_entries",
    "manifest_bytes",
    "manifest_entries",
    "manifest_size",
    "manifest_versions",
    "quantized_source",
    "read_manifest",
    "recipe_json",
    "recipe_of",
    "recorded_donor",
    "source_json",
    "source_of",
    "tensor_of",
    "work_key",
]

MANIFEST_VERSION = 1
"""Increase it when a reader of older manifests would misread a newer one."""

_NO_HASH = "0" * 64

_REPOSITORY = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
_REVISION = re.compile(r"[\w.][\w./-]*", re.ASCII)


def manifest_bytes(
    plan: Plan, hashes: Mapping[str, str], kept: Mapping[tuple[str, str], str] | None = None
) -> bytes:
    """Render a plan's manifest.

    Args:
        plan: the executed plan.
        hashes: SHA-256 of every file in `Plan.file_sizes`.
        kept: file and weight to whether it has refined codes (`refined_record`).
    """
    return json_bytes(_entries(plan, hashes, kept or {}))


def _entries(
    plan: Plan, hashes: Mapping[str, str], kept: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    request = plan.container.request_json(plan)
    return manifest_entries(
        plan.checkpoint,
        request["recipe"],
        plan.digest,
        dict(plan.file_sizes()),
        hashes,
        scale_choice=request.get("calibration"),
        tensors=plan.container.tensors_json(plan),
        notes=plan.notes,
    ) | refined_record(plan, kept)


def manifest_entries(
    checkpoint: Checkpoint,
    recipe: Mapping[str, Any],
    digest: str,
    sizes: Mapping[str, int],
    hashes: Mapping[str, str],
    *,
    scale_choice: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, str]] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the entries of a manifest; calibration outputs have no `Plan`.

    Args:
        checkpoint: the source.
        recipe: name, format and rules, as plain values.
        digest: the plan's digest.
        sizes: bytes of every file except the manifest.
        hashes: SHA-256 of every file.
        scale_choice: how scales were chosen, as plain values.
        tensors: each file's tensors, with type and shape.
        notes: the plan's notes.
    """
    return {
        "manifest": MANIFEST_VERSION,
        "tool": manifest_versions(),
        "source": source_json(checkpoint) | _quantized_json(checkpoint) | _card_json(checkpoint),
        "recipe": recipe,
        "calibration": scale_choice,
        "plan": digest,
        "files": {name: {"size": size, "sha256": hashes[name]} for name, size in sizes.items()},
        "tensors": tensors or {},
        "notes": list(notes),
    }


def manifest_size(plan: Plan) -> int:
    """Return the manifest's exact size; all hashes are equally long, so none is needed."""
    return json_size(_entries(plan, {name: _NO_HASH for name, _ in plan.file_sizes()}, {}))


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values, for `recipe_of`."""
    rules = [_rule_row(rule) for rule in recipe.rules]
    return {"name": recipe.name, "format": recipe.format, "rules": rules}


def _rule_row(rule: Rule) -> list[str]:
    """Return a rule as a manifest row; layers come last, then codes, if it has any."""
    layers = [] if rule.layers is None else [spell_layers(rule.layers)]
    codes = [f"{_CODES}{rule.codes}"] if rule.codes else []
    return [rule.match, rule.action, rule.reason, *layers, *codes]


_CODES = "codes="


def manifest_versions() -> dict[str, str]:
    """Return the versions of everything that can affect the output's bytes."""
    libraries = {name: version(name) for name in ("jinja2", "numba", "numpy")}
    return {"qwen35": __version__, "python": platform.python_version(), **libraries}


def work_key(plan: Plan) -> dict[str, Any]:
    """Return everything that decides an output's bytes; a run resumes only if it is unchanged.

    That is the plan, the source (a commit, or the size and modification time of each file) and the
    tool versions.
    """
    tool = manifest_versions()
    for name in plan.container.libraries:
        with suppress(PackageNotFoundError):  # optional: not every type needs it
            tool[name] = version(name)
    checkpoint = plan.checkpoint
    source = source_json(checkpoint)
    if not checkpoint.repo:  # times are compared for equality alone, so clocks do not matter
        source["files"] = _stamps(checkpoint)
    if checkpoint.donor and not checkpoint.donor.repo:
        source["mtp_files"] = _stamps(checkpoint.donor)
    return {"plan": plan.digest, "source": source, "tool version": tool}


def _stamps(checkpoint: Checkpoint) -> dict[str, list[int]]:
    return {name: list(stamp) for name, stamp in checkpoint.stamps.items()}


def source_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's origin as manifests record it."""
    adapters = [adapter.to_json() for adapter in checkpoint.adapters]
    merged: dict[str, Any] = {"file": checkpoint.within[0]} if checkpoint.within else {}
    merged |= {"adapters": adapters} if adapters else {}
    if checkpoint.donor:
        merged["mtp_from"] = source_json(checkpoint.donor)
    if checkpoint.repo:
        return {"repo": checkpoint.repo, "revision": checkpoint.revision, **merged}
    folder = checkpoint.root.resolve() if checkpoint.root else PurePath(checkpoint.name)
    return {"folder": folder.name, **merged}


def _quantized_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the number of quantized weights by format; nothing for an unquantized source.

    They are the reference of every figure, and they are not the original weights.
    """
    counts = quantized_weights(checkpoint.weights)
    return {"quantized": counts} if counts else {}


def _card_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the source's model card says; nothing without one."""
    card = source_card(checkpoint)
    return {"card": card} if card else {}


def read_manifest(place: FileLocation) -> Mapping[str, Any] | None:
    """Read and check an artifact's manifest; None if it has none.

    Raises:
        InputError: the manifest is malformed, or has another version.
    """
    if MANIFEST_NAME not in place.sizes():
        return None
    manifest = read_json(place, MANIFEST_NAME)
    if not isinstance(manifest, dict) or manifest.get("manifest") != MANIFEST_VERSION:
        raise InputError(MANIFEST_NAME, "not a manifest of this version of qwen35")
    for key, (is_valid, expected) in _ENTRIES.items():
        if (key in manifest or key in _REQUIRED) and not is_valid(manifest.get(key)):
            raise InputError(MANIFEST_NAME, f"malformed {key}", expected=expected)
    return manifest


def quantized_source(manifest: Mapping[str, Any] | None) -> dict[str, int]:
    """Return how many weights the source of an artifact held quantized, by format, if recorded."""
    source = manifest.get("source") if manifest else None
    counts = source.get("quantized") if isinstance(source, dict) else None
    rows = counts.items() if isinstance(counts, dict) else ()
    return {label: count for label, count in rows if type(count) is int}


def _are_amendments(rows: object) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("when"), str)
        and isinstance(row.get("why"), str)
        and isinstance(row.get("files"), dict)
        and all(map(_is_file_name, row["files"]))
        and all(was is None or _is_file_entry(was) for was in row["files"].values())
        for row in rows
    )


def amendment_notes(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each amendment: the files, when and why."""
    for row in manifest.get("amended", []):
        why = f": {row['why']}" if row["why"] else ""
        yield f"amended {row['when'][:10]}, {', '.join(row['files'])}{why}"


def first_entries(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of each file as it was written, before any amendment; None: it was added."""
    first: dict[str, Any] = {}
    for row in manifest.get("amended", []):
        first = {**row["files"], **first}
    return first


def _is_file_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int  # bool is an int
        and 0 <= entry["size"] < 2**63
        and isinstance(entry.get("sha256"), str)
    )


def _are_files(entries: object) -> bool:
    return isinstance(entries, dict) and all(
        _is_file_name(name) and _is_file_entry(entry) for name, entry in entries.items()
    )


def _is_file_name(name: str) -> bool:
    """Whether a name stays in the artifact's folder."""
    return bool(name) and name[0] != "/" and ".." not in name.split("/") and "\0" not in name


def _are_tensors(tables: object) -> bool:
    return isinstance(tables, dict) and all(
        isinstance(table, dict) and all(map(_is_tensor, table.values()))
        for table in tables.values()
    )


def _is_tensor(text: object) -> bool:
    return isinstance(text, str) and _TENSOR.fullmatch(text) is not None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_text, values))


def _are_versions(values: object) -> bool:
    return (
        isinstance(values, dict)
        and _is_text(values.get("qwen35"))
        and _are_texts([*values.values()])
    )


def _is_source(source: object) -> bool:
    donor = source.get("mtp_from", {}) if isinstance(source, dict) else {}
    return are_recorded(source) and isinstance(donor, dict) and _are_texts([*donor.values()])


_TENSOR = re.compile(r"(\w{1,20}) \[((?:\d{1,19}(?:, \d{1,19})*)?)\]", re.ASCII)
"""A tensor as manifests record it: dtype and shape."""

_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "files": (_are_files, "size and sha256 of each"),
    "tensors": (_are_tensors, "a table for each file: type and shape of every tensor"),
    "added": (_are_files, "size and sha256 of each file"),
    "amended": (_are_amendments, "when, why and the earlier entry of each file"),
    "tool": (_are_versions, "the version of qwen35 and of each library"),
    "plan": (_is_text, "a digest"),
    "source": (_is_source, "adapters: name, weight, sha256 and config_sha256 of each"),
    "notes": (_are_texts, "sentences"),
    "refined": (is_refined_record, "of each file, a digit for each matrix of a weight"),
}
"""Entry to its check and what is expected: nothing below asks again what type a value has."""

_REQUIRED = {"files", "tensors"}


def tensor_of(name: str, text: str) -> TensorSpec:
    """Return a tensor from its text in a manifest that was read, such as ``BF16 [2, 3]``."""
    found = _TENSOR.fullmatch(text)
    assert found is not None  # `read_manifest` checks it
    sizes = found[2].split(", ") if found[2] else []
    return TensorSpec(name, found[1], tuple(map(int, sizes)))


def source_of(manifest: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the source's repository and commit; both None if it was a folder.

    Raises:
        InputError: the manifest is malformed.
    """
    source = manifest.get("source")
    if not isinstance(source, dict):
        raise InputError(MANIFEST_NAME, "names no source")
    repo, revision = source.get("repo"), source.get("revision")
    if repo is None:
        return None, None
    if not (
        isinstance(repo, str)
        and isinstance(revision, str)
        and _REPOSITORY.fullmatch(repo)
        and _REVISION.fullmatch(revision)
    ):  # both go into addresses and commands
        raise InputError(MANIFEST_NAME, "a malformed source", expected="repo and revision")
    return repo, revision


def card_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model card of an artifact's source says, if recorded."""
    source = manifest.get("source")
    return card_words(source.get("card") if isinstance(source, dict) else None)


def recorded_donor(manifest: Mapping[str, Any], given: str | None) -> str:
    """Return the checkpoint whose MTP layer an output has; empty if that is its source's own.

    Args:
        manifest: a manifest that was read, or an empty one.
        given: the checkpoint that the user gave.

    Raises:
        UsageError: it was a folder, and none is given.
    """
    source = manifest.get("source")
    donor = source.get("mtp_from") if isinstance(source, dict) else None
    if given is not None or not donor:
        return given or ""
    repo, revision = source_of({"source": donor})
    if repo is None:
        found = f"made with the MTP layer of a folder called {donor.get('folder', '')[:80]!r}"
        raise UsageError(MANIFEST_NAME, found, hint="give it: --mtp-from DIR")
    return f"{repo}@{revision}"


def recipe_of(manifest: Mapping[str, Any], container: Container) -> Recipe:
    """Return the recipe as recorded; its own file may have changed since.

    Args:
        manifest: parsed.
        container: the output's container.

    Raises:
        InputError: the manifest is malformed.
    """
    recipe = manifest.get("recipe")
    if not isinstance(recipe, dict) or not {"name", "format"} <= recipe.keys():
        raise InputError(MANIFEST_NAME, "names no recipe")
    rows = recipe.get("rules", [])
    if not isinstance(rows, list):
        raise InputError(MANIFEST_NAME, "a malformed recipe", expected="a list of rules")
    name, kind = recipe["name"], recipe["format"]
    if not isinstance(name, str) or kind not in container.formats:
        raise InputError(MANIFEST_NAME, "a malformed recipe", expected="its name and format")
    rules = tuple(map(_rule_of, rows))
    try:  # a manifest is foreign input: refuse unknown actions here, not deep in planning
        for rule in rules:
            container.action(f"recipe {name}", f"recipe {name}", rule.action, kind)
    except UsageError as error:
        raise InputError(MANIFEST_NAME, f"a malformed recipe ({error.message})") from error
    return Recipe(name, kind, "", rules, container)


def _rule_of(row: Any) -> Rule:
    if not isinstance(row, list) or not 3 <= len(row) <= 5 or not all(map(_is_text, row[:3])):
        raise InputError(MANIFEST_NAME, "a malformed recipe", expected="match, action and reason")
    match, action, reason, *layers = row
    codes = ""
    if layers and isinstance(layers[-1], str) and layers[-1].startswith(_CODES):
        codes = layers.pop().removeprefix(_CODES)
    if codes not in ("", *CODES) or len(layers) > 1:
        raise InputError(MANIFEST_NAME, "a malformed recipe", expected="match, action and reason")
    try:
        parsed = parse_layers(MANIFEST_NAME, layers[0]) if layers else None
    except UsageError as error:
        raise InputError(MANIFEST_NAME, error.found, expected=error.expected) from error
    return Rule(match, action, reason, layers=parsed, codes=codes)
