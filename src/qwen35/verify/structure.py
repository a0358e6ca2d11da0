"""Structure: headers, index, config and manifest of an artifact agree. No weight is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen35.checkpoint.inventory import Item, match
from qwen35.checkpoint.place import Place
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import INDEX_NAME, Checkpoint, read_json
from qwen35.codecs import nf4
from qwen35.errors import Finding, InputError
from qwen35.model.config import ModelConfig
from qwen35.plan.manifest import read_manifest
from qwen35.verify.fp8 import fp8_findings

__all__ = ["Structure", "check_structure", "is_skipped"]

Kind = Literal["plain", "nf4", "fp8"]


@dataclass(frozen=True)
class Structure:
    """What the structural check saw.

    Args:
        findings: what is wrong.
        items: the artifact's weights that fit its config.
        manifest: its qwen35.json, if it has one.
    """

    findings: tuple[Finding, ...]
    items: tuple[Item, ...]
    manifest: Mapping[str, Any] | None

    @property
    def kind(self) -> Kind:
        """How the weights are stored."""
        storages = {item.weight.storage for item in self.items}
        return "nf4" if "nf4" in storages else "fp8" if "fp8" in storages else "plain"


def check_structure(place: Place, checkpoint: Checkpoint) -> Structure:
    """Check the structure of the artifact at `place`.

    Args:
        place: its files.
        checkpoint: the same, opened leniently.
    """
    findings = [_finding("packing", problem) for problem in checkpoint.problems]
    items, problems = match(checkpoint)
    known = {finding.subject for finding in findings}
    findings += [_finding("tensors", p) for p in problems if p.subject not in known]
    findings += _config_findings(checkpoint, items)
    findings += _index_findings(place, checkpoint)
    findings += _template_findings(place, checkpoint)
    manifest = None
    try:
        manifest = read_manifest(place)
    except InputError as error:
        findings.append(_finding("manifest", error))
    if manifest is not None:
        findings += _manifest_findings(place, checkpoint, manifest)
    return Structure(tuple(findings), items, manifest)


def _finding(check: str, error: InputError) -> Finding:
    message = str(error).removeprefix(f"{error.subject}: ")
    return Finding(check, error.subject, message)


def _config_findings(checkpoint: Checkpoint, items: tuple[Item, ...]) -> Iterator[Finding]:
    config = checkpoint.config
    if config.mtp_layers and not checkpoint.layout.mtp:
        message = f"mtp_num_hidden_layers is {config.mtp_layers}, but there is no mtp tensor"
        yield Finding("mtp", "config.json", message)
    method = (config.quantization or {}).get("quant_method")
    for storage, expected in (("nf4", "bitsandbytes"), ("fp8", "fp8")):
        count = sum(item.weight.storage == storage for item in items)
        if count and method != expected:
            message = f"quant_method is {method!r}, but {count} weights are packed {storage}"
            yield Finding("quantization-config", "config.json", message)
    if method == "bitsandbytes":
        packed = [item for item in items if item.weight.storage == "nf4"]
        yield from _nf4_findings(config, items, packed)
    elif method == "fp8":
        yield from fp8_findings(config, items)


def _nf4_findings(
    config: ModelConfig, items: tuple[Item, ...], packed: list[Item]
) -> Iterator[Finding]:
    quantization = config.quantization or {}
    if not packed:
        yield Finding("quantization-config", "config.json", "promises NF4, but nothing is packed")
    for key, expected in (("load_in_4bit", True), ("bnb_4bit_quant_type", "nf4")):
        if quantization.get(key) != expected:
            message = f"{key} is {quantization.get(key)!r}, expected {expected!r}"
            yield Finding("quantization-config", "config.json", message)
    yield from _companion_findings(packed, bool(quantization.get("bnb_4bit_use_double_quant")))
    yield from _skip_findings(config, items)


def _companion_findings(packed: Iterable[Item], double: bool) -> Iterator[Finding]:
    for item in packed:
        name = item.weight.name
        nested = item.weight.part(".nested_absmax") is not None
        if nested != double:
            found = "doubly quantized" if nested else "quantized once"
            message = f"{found}, but bnb_4bit_use_double_quant is {double}"
            yield Finding("quantization-config", name, message)
        for suffix, (dtype, shape) in nf4.parts_layout(item.spec, nested=nested).items():
            part = item.weight.part(suffix)
            assert part is not None  # grouped by them
            if (part.spec.dtype, part.spec.shape) != (dtype, shape):
                found = f"{part.spec.dtype} {list(part.spec.shape)}"
                message = f"{found}, expected {dtype} {list(shape)}"
                yield Finding("companions", f"{name}{suffix}", message)


def is_skipped(module: str, skip: Iterable[str]) -> bool:
    """Whether transformers leaves `module` unpacked, by ``llm_int8_skip_modules``.

    An entry matches as a pattern from the name's start up to a dot, or as its end.
    Source: transformers 5.23 ``quantizers_utils.should_convert_module``.
    """
    return any(_starts(entry, module) or module.endswith(entry) for entry in skip)


def _starts(entry: str, module: str) -> bool:
    try:
        return re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _skip_findings(config: ModelConfig, items: tuple[Item, ...]) -> Iterator[Finding]:
    skip = (config.quantization or {}).get("llm_int8_skip_modules") or []
    if not isinstance(skip, list) or not all(isinstance(entry, str) for entry in skip):
        message = "llm_int8_skip_modules is not a list of names"
        yield Finding("skip-list", "config.json", message)
        return
    if not is_skipped("lm_head", skip):
        message = "lm_head is not in llm_int8_skip_modules, so transformers would pack the head"
        yield Finding("skip-list", "lm_head", message)
    for item in items:
        if item.role.info.kind != "linear" or item.role.scope == "mtp":
            continue
        module = item.spec.name.removesuffix(".weight")
        if not config.architecture.vision:
            module = module.replace("model.language_model.", "model.", 1)
        packed = item.weight.storage == "nf4"
        if is_skipped(module, skip) == packed:
            message = (
                "packed, but llm_int8_skip_modules says it is not"
                if packed
                else "not packed, and missing from llm_int8_skip_modules"
            )
            yield Finding("skip-list", module, message)


def _index_findings(place: Place, checkpoint: Checkpoint) -> Iterator[Finding]:
    for name in place.sizes():
        if name.endswith(".safetensors") and name not in checkpoint.file_sizes:
            yield Finding("files", name, f"not in {INDEX_NAME}: no loader reads it")
    if INDEX_NAME not in place.sizes():
        return
    metadata = read_json(place, INDEX_NAME).get("metadata")
    stated = metadata if isinstance(metadata, dict) else {}
    total = stated.get("total_size", "missing")
    nbytes = sum(part.spec.nbytes for w in checkpoint.weights for part in w.parts)
    if total != nbytes and not checkpoint.problems:
        yield Finding("index", INDEX_NAME, f"total_size is {total}, the tensors have {nbytes}")


def _template_findings(place: Place, checkpoint: Checkpoint) -> Iterator[Finding]:
    name = "chat_template.jinja"
    if name not in checkpoint.sidecars:
        return
    from qwen35.plan.template import compiles

    try:
        compiles(place.read(name, 0, place.sizes()[name]).decode(), name)
    except (InputError, UnicodeDecodeError) as error:
        yield Finding("template", name, str(error).removeprefix(f"{name}: "))


def _manifest_findings(
    place: Place, checkpoint: Checkpoint, manifest: Mapping[str, Any]
) -> Iterator[Finding]:
    sizes = place.sizes()
    for name, entry in manifest["files"].items():
        if name not in sizes:
            yield Finding("files", name, f"missing, but {MANIFEST_NAME} lists it")
        elif sizes[name] != entry["size"]:
            yield Finding("files", name, f"{sizes[name]} bytes, expected {entry['size']}")
        elif not name.endswith(".safetensors"):
            digest = hashlib.sha256(place.read(name, 0, sizes[name])).hexdigest()
            if digest != entry["sha256"]:
                yield Finding("hash", name, f"changed since it was written (sha256 {digest[:12]})")
    stored = {
        part.spec.name: (part.file, f"{part.spec.dtype} {list(part.spec.shape)}")
        for weight in checkpoint.weights
        for part in weight.parts
    }
    planned = {
        name: (file, text)
        for file, tensors in manifest["tensors"].items()
        for name, text in tensors.items()
    }
    yield from _table_findings(stored, planned)


def _table_findings(
    stored: Mapping[str, tuple[str, str]], planned: Mapping[str, tuple[str, str]]
) -> Iterator[Finding]:
    for name, (file, text) in planned.items():
        if name not in stored:
            yield Finding("plan", name, f"planned for {file} as {text}, but not there")
        elif stored[name] != (file, text):
            found = " in ".join(reversed(stored[name]))
            yield Finding("plan", name, f"{found}, planned as {text} in {file}")
    for name in sorted(stored.keys() - planned.keys()):
        yield Finding("plan", name, "not in the plan")
