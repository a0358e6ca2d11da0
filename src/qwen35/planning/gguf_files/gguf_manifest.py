"""GGUF files in their manifest: the recipe and options, written and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import InputError, UsageError
from qwen35.planning.container import Container, ContainerInputs
from qwen35.planning.gguf_files.gguf_options import GgufOptions
from qwen35.planning.gguf_files.imatrix import Imatrix, imatrix_file, read_imatrix
from qwen35.planning.gguf_files.mixes import CONVERTED, DRAFTED, FILE_TYPES
from qwen35.planning.gguf_files.type_patterns import pattern_rules
from qwen35.planning.manifest import recipe_json, recipe_of
from qwen35.planning.output_plan import Plan
from qwen35.planning.refinement import Refinement
from qwen35.planning.rules import Recipe

__all__ = ["request_from_manifest", "request_json"]

_KEYS = {"name", "rules", "types", "patterns", "projector", "drop_mtp", "upstream_counters"}


def request_json(plan: Plan, *, whole: bool = False) -> dict[str, Any]:
    """Return the recipe and the other options.

    Args:
        plan: of the files.
        whole: include what changes no byte, for workers.
    """
    options = plan.options
    assert isinstance(options, GgufOptions)
    imatrix = options.imatrix
    entries = {
        "upstream_counters": options.upstream_counters,
        "imatrix": imatrix.digest if imatrix else None,
        "imatrix_name": imatrix.name if imatrix else None,
        "patterns": sum(rule.pattern is not None for rule in plan.recipe.rules),
        "types": list(options.types),
        "projector": options.projector,
        "drop_mtp": options.drop_mtp,
    }
    if options.mtp_file:
        entries["mtp_file"] = options.mtp_file
    if options.split_max_size is not None:
        entries["split_max_size"] = options.split_max_size
    if options.adapter_only:
        entries["adapter_only"] = True
    entries |= options.refinement.to_json()
    if whole:
        entries["encoder"] = options.encoder
    return {"recipe": {**recipe_json(plan.recipe), **entries}}


def request_from_manifest(
    container: Container, manifest: Mapping[str, Any], inputs: ContainerInputs
) -> tuple[Recipe, GgufOptions]:
    """Return the recipe and options recorded in a manifest or work order.

    Raises:
        InputError: the record is malformed, or names another importance matrix.
        UsageError: the importance matrix is missing, or none was used.
    """
    row = manifest.get("recipe")
    if not isinstance(row, dict) or not row.keys() >= _KEYS:
        hint = "an older version wrote it: make the files again with `qwen35 gguf`"
        raise InputError(MANIFEST_NAME, "does not record the options", hint=hint)
    if inputs.activations is not None:
        raise UsageError("--activation-stats", "are for FP8", hint="leave it out")
    types, count = row["types"], row["patterns"]
    names = [str(name) for name in types] if isinstance(types, list) else []
    if not names or len(set(names)) < len(names) or not FILE_TYPES.keys() >= set(names):
        raise InputError(MANIFEST_NAME, "malformed types", expected=", ".join(FILE_TYPES))
    alone = row.get("adapter_only") and not set(CONVERTED) >= set(names)
    if type(count) is not int or count < 0 or _foreign(row) or alone:
        raise InputError(MANIFEST_NAME, "a malformed recipe", expected="that of GGUF files")
    limit = row.get("split_max_size")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(MANIFEST_NAME, f"split_max_size {limit!r:.80}", expected="bytes of a file")
    return _recipe(manifest, container, count), GgufOptions(
        types=tuple(names),
        imatrix=_imatrix(row, inputs),
        projector=row["projector"],
        drop_mtp=bool(row["drop_mtp"]),
        mtp_file=row.get("mtp_file"),
        upstream_counters=bool(row["upstream_counters"]),
        split_max_size=limit,
        adapter_only=bool(row.get("adapter_only")),
        refinement=Refinement.from_json(row, inputs.hessians),
        encoder=str(row.get("encoder", "auto")),
    )


def _foreign(row: Mapping[str, Any]) -> bool:
    """Whether a file beside the models has a type that it cannot have."""
    known = {"projector": CONVERTED, "mtp_file": DRAFTED}
    return any(row.get(key) not in (None, *types) for key, types in known.items())


def _recipe(manifest: Mapping[str, Any], container: Container, count: int) -> Recipe:
    """Return the recipe, with its first `count` rules as patterns on names."""
    recipe = recipe_of(manifest, container)
    lines = [f"{rule.match}={rule.action}" for rule in recipe.rules[:count]]
    try:
        compiled = pattern_rules(lines, [])
    except UsageError as error:
        raise InputError(MANIFEST_NAME, f"a malformed pattern ({error})") from error
    # Compiling gives a fresh reason; the recorded one must go into the manifest again.
    patterns = [
        replace(rule, reason=recorded.reason)
        for rule, recorded in zip(compiled, recipe.rules[:count], strict=True)
    ]
    return replace(recipe, rules=(*patterns, *recipe.rules[count:]))


def _imatrix(row: Mapping[str, Any], inputs: ContainerInputs) -> Imatrix | None:
    path = inputs.imatrix
    if path is None:
        if row.get("imatrix"):
            found = f"made with the importance matrix {row.get('imatrix_name')}"
            raise UsageError(MANIFEST_NAME, found, hint="give it: --imatrix")
        return None
    path = imatrix_file(path)
    imatrix = read_imatrix(path, name=str(row.get("imatrix_name") or path))
    if imatrix.digest != row.get("imatrix"):
        raise InputError(str(path), "not the importance matrix that the manifest names")
    return imatrix
