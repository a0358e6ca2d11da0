"""What a manifest says was asked for: enough to write its GGUF files again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.errors import InputError, UsageError
from qwen35.gguf.imatrix import Imatrix, read_imatrix
from qwen35.gguf.plan import Asked
from qwen35.gguf.rules import Recipe, Rule, pattern_rules
from qwen35.gguf.types import FILE_TYPES
from qwen35.plan.manifest import recipe_of

__all__ = ["asked_again"]

_KEYS = {"name", "rules", "types", "patterns", "projector", "drop_mtp", "upstream_counters"}


def asked_again(manifest: Mapping[str, Any], imatrix: Path | None) -> Asked:
    """Return what the manifest of GGUF files says was asked for.

    Args:
        manifest: parsed.
        imatrix: the importance matrix they were made with, if any.

    Raises:
        InputError: the manifest is malformed, or this is another importance matrix.
        UsageError: the importance matrix is not given, or there was none.
    """
    recipe = manifest.get("recipe")
    if not isinstance(recipe, dict) or not recipe.keys() >= _KEYS:
        hint = "an older version wrote it: make the files again by `qwen35 gguf`"
        raise InputError(MANIFEST_NAME, "does not say what was asked for", hint=hint)
    recipe_of(manifest)  # refuses malformed rules
    types, count = recipe["types"], recipe["patterns"]
    if not isinstance(types, list) or not FILE_TYPES.keys() >= set(map(str, types)):
        raise InputError(MANIFEST_NAME, "malformed types", expected=", ".join(FILE_TYPES))
    if not isinstance(count, int) or recipe["projector"] not in (None, *FILE_TYPES):
        raise InputError(MANIFEST_NAME, "a malformed recipe", expected="that of GGUF files")
    rows = [tuple(map(str, row)) for row in recipe["rules"]]
    patterns, rules = rows[:count], rows[count:]
    by_role = tuple(Rule(m, m, kind, why, required=False) for m, kind, why in rules)
    return Asked(
        types=tuple(types),
        recipe=Recipe(str(recipe["name"]), "", by_role),
        rules=pattern_rules([f"{match}={kind}" for match, kind, _ in patterns], []),
        imatrix=_imatrix(recipe, imatrix),
        projector=recipe["projector"],
        drop_mtp=bool(recipe["drop_mtp"]),
        upstream_counters=bool(recipe["upstream_counters"]),
    )


def _imatrix(recipe: Mapping[str, Any], path: Path | None) -> Imatrix | None:
    if path is None:
        if recipe.get("imatrix"):
            made = f"made with the importance matrix {recipe.get('imatrix_name')}"
            raise UsageError(MANIFEST_NAME, made, hint="give it: --imatrix")
        return None
    imatrix = read_imatrix(path, name=str(recipe.get("imatrix_name") or path))
    if imatrix.digest != recipe.get("imatrix"):
        raise InputError(str(path), "not the importance matrix that the manifest names")
    return imatrix
