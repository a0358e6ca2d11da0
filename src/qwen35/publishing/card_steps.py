"""The steps in a model card: commands that make and measure an artifact, and how it is served."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import PurePosixPath
from typing import Any

from qwen35.checkpoint.split_gguf import by_model
from qwen35.codecs.registry import CODECS
from qwen35.display import counted, printable
from qwen35.errors import UsageError
from qwen35.planning.gguf_files.mixes import CONVERTED, DRAFTED, MIX
from qwen35.planning.gguf_files.tensor_names import name_pattern
from qwen35.planning.layers import spell_layers
from qwen35.planning.manifest import recipe_json
from qwen35.planning.recipe import adjusted_recipe, built_in, load_recipe
from qwen35.planning.rules import KEPT, Recipe, Rule
from qwen35.publishing.markdown import as_code, as_text

__all__ = [
    "HeldTensors",
    "InputFile",
    "ServerOption",
    "adapter_options",
    "context_of",
    "held_tensors",
    "input_files",
    "make_command",
    "matched",
    "measured_on",
    "server_options",
]

_PLAIN = {"name", "format", "rules", "encoder"}
"""Keys of a manifest's recipe that need no option."""

_KNOWN = {
    *("types", "projector", "drop_mtp", "mtp_file", "upstream_counters", "imatrix", "imatrix_name"),
    "adapter_only",
    "kv_cache",
    "split_max_size",
    *("codes", "hessians"),
}
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


@dataclass(frozen=True)
class InputFile:
    """A file beside the source that an artifact was made from.

    Args:
        option: of the commands that take it.
        name: its name, or where it is on the Hub.
        sha256: of its content.
        value: stands for it in commands.
    """

    option: str
    name: str
    sha256: str
    value: str = "FILE"


@dataclass(frozen=True)
class ServerOption:
    """Something that servers do by a flag.

    Args:
        purpose: what they do.
        vllm: the flag of vLLM, as Markdown.
        sglang: the flag of SGLang, as Markdown.
    """

    purpose: str
    vllm: str
    sglang: str


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
    patterns = recipe.rules[:count]
    adjustments = _adjustments(replace(recipe, rules=recipe.rules[count:]))
    known = {"projector": (None, *CONVERTED), "mtp_file": (None, *DRAFTED)}
    if adjustments is None or any(row.get(key) not in types for key, types in known.items()):
        return ""
    words = [f"qwen35 {recipe.container.verb}", _word(source), "OUT", *adapter_options(manifest)]
    words += [f"--recipe {recipe.name}", *adjustments]
    words += [f"--mtp-from {_word(name)}" for name in [_donor(manifest)] if name]
    words += [*_options(row), *_scales(manifest)]
    words += [f"--tensor-type {_word(f'{rule.match}={rule.action}')}" for rule in patterns]
    return _wrapped(words)


def adapter_options(manifest: Mapping[str, Any]) -> list[str]:
    """Return the options that merge an artifact's adapters: names, weights, onto what."""
    rows = _table(manifest, "source").get("adapters", [])
    weights = [row["weight"] for row in rows]
    values = ["" if weight == 1 else f"={weight:g}" for weight in weights]
    named = zip(rows, values, strict=True)
    formats = dict.fromkeys(row["onto"] for row in rows if row.get("onto"))
    adapters = [f"--adapter {_word(row['name'] + value)}" for row, value in named]
    return adapters + [f"--onto {_word(name)}" for name in formats]


def _adjustments(recipe: Recipe) -> list[str] | None:
    """Return the options that make a built-in recipe this one; None if there are none."""
    if recipe_json(load_recipe(recipe.name, recipe.container.name)) == recipe_json(recipe):
        return []
    codec = CODECS.get(recipe.format)
    kept = dict.fromkeys(rule.match for rule in recipe.rules if rule.reason == KEPT)
    for layout, inputs, without_mtp in product(
        (None, *(codec.layouts if codec else ())), (False, True), (False, True)
    ):
        try:
            adjusted = adjusted_recipe(
                recipe.name,
                keep=tuple(kept),
                layout=layout,
                quantized_inputs=inputs,
                drop_mtp=without_mtp,
            )
        except UsageError:  # the recipe has no such form
            continue
        if recipe_json(adjusted) == recipe_json(recipe):
            options = [f"--keep {_word(role)}" for role in kept]
            options += [f"--layout {layout}"] if layout else []
            options += ["--activations"] if inputs else []
            return options + (["--drop-mtp"] if without_mtp else [])
    return None


def _options(row: Mapping[str, Any]) -> Iterator[str]:
    types = row.get("types")
    if isinstance(types, list):
        yield f"--types {_word(','.join(map(str, types)))}"
    if row.get("imatrix"):
        name = str(row.get("imatrix_name"))
        yield f"--imatrix {_word(name if name.startswith('hf:') else PurePosixPath(name).name)}"
    if hessians := _table(row, "hessians"):
        yield f"--codes {_word(str(row.get('codes')))}"
        yield f"--hessian {_word(str(hessians.get('name')))}"
    if row.get("projector"):
        yield "--mmproj" if row["projector"] == "F16" else f"--mmproj {row['projector']}"
    if row.get("mtp_file"):
        yield f"--mtp separate --mtp-type {row['mtp_file']}"
    if row.get("split_max_size"):
        yield f"--split-max-size {_word(str(row['split_max_size']))}"
    flags = {"adapter_only": "--adapter-only", "drop_mtp": "--drop-mtp"}
    flags |= {"upstream_counters": "--upstream-counters"}
    yield from (flag for key, flag in flags.items() if row.get(key))


def _donor(manifest: Mapping[str, Any]) -> str:
    """Return the checkpoint whose MTP layer an artifact has, if that is not its source's."""
    donor = _table(_table(manifest, "source"), "mtp_from")
    repo = donor.get("repo")
    return f"{repo}@{donor.get('revision')}" if repo else str(donor.get("folder", ""))


def _scales(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield how scales were chosen, if any were."""
    chosen = _table(manifest, "calibration")
    mode, statistics = chosen.get("mode"), _table(chosen, "activations")
    if mode:
        yield f"--calib-mode {_word(str(mode))}"
    if isinstance(mode, str) and mode in _PARAMETERS:
        option, key = _PARAMETERS[mode]
        yield f"{option} {_word(str(chosen.get(key)))}"
    cache = _table(manifest["recipe"], "kv_cache")
    if cache:
        yield f"--kv-cache {_word(str(cache.get('type')))}"
        statistics = statistics or _table(cache, "activations")
    if statistics:
        yield f"--activation-stats {_word(str(statistics.get('name')))}"


def input_files(manifest: Mapping[str, Any]) -> Iterator[InputFile]:
    """Yield the files beside the source that an artifact was made from, with their options."""
    row = manifest["recipe"]
    for adapter in _table(manifest, "source").get("adapters", []):
        yield InputFile("--adapter", adapter["name"], adapter["sha256"], "DIR")
    if row.get("imatrix"):
        yield InputFile("--imatrix", str(row.get("imatrix_name")), str(row["imatrix"]))
    if hessians := _table(row, "hessians"):
        name, digest = (str(hessians.get(key)) for key in ("name", "sha256"))
        yield InputFile("--hessian", name, digest, "DIR")
    for table in (_table(manifest, "calibration"), _table(row, "kv_cache")):
        statistics = _table(table, "activations")
        if statistics:
            name, digest = (str(statistics.get(key)) for key in ("name", "sha256"))
            yield InputFile("--activation-stats", name, digest)
            return


def server_options(*, tools: bool, mtp: bool, cache: bool) -> Iterator[ServerOption]:
    """Yield what servers can do with an artifact, by flags of their own.

    Sources: Qwen's model cards and SGLang's page on Qwen3.5 for tools and MTP, where vLLM 0.32
    calls the method mtp; vLLM's ``attention.py``, SGLang's ``configure_kv_cache_dtype``.

    Args:
        tools: whether the chat template writes tool calls as this family does.
        mtp: whether it has the layer for multi-token prediction.
        cache: whether it has scales of a KV cache in FP8.
    """
    if tools:
        parser = "`--tool-call-parser qwen3_coder`"
        choice = "`--enable-auto-tool-choice --tool-call-parser qwen3_coder`"
        yield ServerOption("call tools", choice, parser)
    if mtp:
        speculation = (
            "`--speculative-algo NEXTN --speculative-num-steps 3 "
            "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4`"
        )
        config = """`--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'`"""
        yield ServerOption("predict several tokens at a time (MTP)", config, speculation)
    if cache:
        flag = "`--kv-cache-dtype bfloat16`"
        yield ServerOption(
            "keep keys and values in FP8, with the scales here",
            "`--kv-cache-dtype fp8`, the default by config.json",
            "`--kv-cache-dtype fp8_e4m3`",
        )
        yield ServerOption("keep them in bf16", f"{flag}; older versions ignore it", flag)


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
    stored = manifest["tensors"]
    models = by_model(file for file in stored if file.endswith(".gguf"))
    files = [{name: kind for f in files for name, kind in stored[f].items()} for files in models]
    for rule in recipe.rules:
        if rule.action in (MIX, "drop"):
            continue
        names = name_pattern(rule.match)
        count = max((_held(tensors, names, rule.action) for tensors in files), default=0)
        yield HeldTensors(
            matched(names or rule.match, rule), rule.action.upper(), count, rule.reason
        )


def matched(match: str, rule: Rule) -> str:
    """Return `match` with the layers of a rule, if it has any."""
    return match if rule.layers is None else f"{match}, layers {spell_layers(rule.layers)}"


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
        f"All columns were measured in one sweep{where} ({counted(chunks, 'chunk')} of "
        f"{context} tokens), "
        f"against {as_code(base.get('name'))} "
        f"({as_text(base.get('stored'))} in {as_text(base.get('engine'))})."
    )
    rows = report.get("candidates")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    others = [as_code(row.get("name")) for row in rows if row.get("plan") != plan]
    if others and len(others) < len(rows):
        sentence += f" Not a file of this repository, for comparison: {', '.join(others)}."
    if report.get("simulations"):
        sentence += (
            " Columns with “inputs quantized” simulate servers, which quantize the inputs of "
            "packed layers too; all others are of weights alone."
        )
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
