"""The steps in a model card: commands that make and measure an artifact, and how it is served."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from qwen35.display import printable
from qwen35.planning.gguf_files.mixes import MIX
from qwen35.planning.gguf_files.tensor_names import name_pattern
from qwen35.planning.layers import spell_layers
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.planning.rules import Recipe
from qwen35.publishing.markdown import as_code, as_text

__all__ = ["HeldTensors", "context_of", "held_tensors", "make_command", "measured_on"]

_PLAIN = {"name", "format", "rules", "encoder"}
"""Keys of a manifest's recipe that need no option."""

_KNOWN = {"types", "projector", "drop_mtp", "upstream_counters", "imatrix", "imatrix_name"}
_PARAMETERS = {
    "rms": ("--rms-factor", "rms_factor"),
    "percentile": ("--calib-percentile", "percentile"),
    "mse": ("--mse-grid-size", "grid_size"),
}
"""Mode of choosing scales to its option, and the key of its value."""

_WIDTH = 90


@dataclass(frozen=True)
class HeldTensors:
    """A rule of the recipe that gives tensors a type of their own.

    Args:
        match: pattern on names in the file, or the rule's own match.
        kind: the type.
        count: tensors of the file with the most of them; 0 if not counted.
        reason: why.
    """

    match: str
    kind: str
    count: int
    reason: str


def make_command(recipe: Recipe, manifest: Mapping[str, Any], source: str) -> str:
    """Return the command that writes an artifact; empty if a built-in recipe does not decide it.

    Args:
        recipe: the recipe.
        manifest: of the artifact.
        source: repository and commit.
    """
    row = manifest["recipe"]
    count = row.get("patterns", 0)
    unknown = row.keys() - _PLAIN - _KNOWN - {"patterns"}
    names = built_in(recipe.container.name)
    if unknown or type(count) is not int or count < 0 or recipe.name not in names:
        return ""
    rules, patterns = recipe.rules[count:], recipe.rules[:count]
    if load_recipe(recipe.name, recipe.container.name).rules != rules:
        return ""
    if row.get("projector") not in (None, "F16"):
        return ""
    words = [f"qwen35 {recipe.container.verb}", _word(source), "OUT"]
    words += [f"--recipe {recipe.name}", *_options(row), *_scales(manifest)]
    words += [f"--tensor-type {_word(f'{rule.match}={rule.action}')}" for rule in patterns]
    return _wrapped(words)


def _options(row: Mapping[str, Any]) -> Iterator[str]:
    types = row.get("types")
    if isinstance(types, list):
        yield f"--types {_word(','.join(map(str, types)))}"
    if row.get("imatrix"):
        name = str(row.get("imatrix_name"))
        yield f"--imatrix {_word(name if name.startswith('hf:') else PurePosixPath(name).name)}"
    flags = {"projector": "--mmproj", "drop_mtp": "--drop-mtp"}
    flags["upstream_counters"] = "--upstream-counters"
    yield from (flag for key, flag in flags.items() if row.get(key))


def _scales(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield how scales were chosen, if any were."""
    chosen = _table(manifest, "calibration")
    mode, statistics = chosen.get("mode"), _table(chosen, "activations")
    if mode:
        yield f"--calib-mode {_word(str(mode))}"
    if isinstance(mode, str) and mode in _PARAMETERS:
        option, key = _PARAMETERS[mode]
        yield f"{option} {_word(str(chosen.get(key)))}"
    if statistics:
        yield f"--activation-stats {_word(str(statistics.get('name')))}"


def _word(text: str) -> str:
    return shlex.quote(printable(text))


def _wrapped(words: list[str]) -> str:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > _WIDTH:
            lines.append("   ")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return " \\\n".join(lines)


def held_tensors(recipe: Recipe, manifest: Mapping[str, Any]) -> Iterator[HeldTensors]:
    """Yield the rules of GGUF files that do not leave the type to the mix."""
    files = [tensors for file, tensors in manifest["tensors"].items() if file.endswith(".gguf")]
    for rule in recipe.rules:
        if rule.action in (MIX, "drop"):
            continue
        names = name_pattern(rule.match)
        count = max((_held(tensors, names, rule.action) for tensors in files), default=0)
        match = names or rule.match
        if rule.layers is not None:
            match += f", layers {spell_layers(rule.layers)}"
        yield HeldTensors(match, rule.action.upper(), count, rule.reason)


def _held(tensors: Mapping[str, Any], names: str, kind: str) -> int:
    found = (str(text) for name, text in tensors.items() if names and fnmatchcase(name, names))
    return sum(text.partition(" ")[0].lower() == kind.lower() for text in found)


def measured_on(report: Any, plan: object) -> str:
    """Return what a report's figures compare, on which text; and which columns are not ours.

    Args:
        report: the parsed report.json, of any form.
        plan: the plan of the artifact: other candidates were measured beside it.
    """
    base, text, tokens = (_table(report, key) for key in ("base", "text", "tokens"))
    chunks, context = tokens.get("chunks"), tokens.get("context")
    if not base or type(chunks) is not int or type(context) is not int:
        return ""
    where = f" on {as_code(text['name'])}" if "name" in text else ""
    sentence = (
        f"All columns were measured in one sweep{where} ({chunks} chunks of {context} tokens), "
        f"against {as_code(base.get('name'))} "
        f"({as_text(base.get('stored'))} in {as_text(base.get('engine'))})."
    )
    rows = report.get("candidates")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    others = [as_code(row.get("name")) for row in rows if row.get("plan") != plan]
    if others and len(others) < len(rows):
        sentence += f" Not a file of this repository, for comparison: {', '.join(others)}."
    return sentence


def _table(report: Any, key: str) -> Mapping[str, Any]:
    value = report.get(key) if isinstance(report, dict) else None
    return value if isinstance(value, dict) else {}


def context_of(config: Any) -> int | None:
    """Return the longest context by config.json; None if it does not say."""
    for section in (_table(config, "text_config"), config if isinstance(config, dict) else {}):
        length = section.get("max_position_embeddings")
        if type(length) is int and length > 0:
            return length
    return None
