"""What config.json tells MLX about quantized weights, and whether it is true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.mlx.layout import FORMATS, MlxFormat, format_of
from qwen35.codecs.mlx.mlx_names import mlx_name
from qwen35.display import cut
from qwen35.errors import Finding

__all__ = ["SECTIONS", "quantization_section", "section_findings"]

_SECTION = "quantization"
_OTHERS = {
    "model_file": "MLX would run that file in place of its own model, and refuses",
    "quantize_activations": "MLX rounds inputs too, or refuses",
}
SECTIONS = (_SECTION, "quantization_config", *_OTHERS)
"""Keys of config.json that only MLX reads."""

_GROUP = "group_size"
_KEYS = frozenset({"group_size", "bits", "mode"})
"""Settings of a module; with any other, mlx-lm does not load it, or quantizes its inputs too."""

_USUAL = {"affine": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
"""Bits and groups of ``mx.quantize`` where none are given, by mode."""


def _packed(modules: Sequence[LoaderModule]) -> dict[str, MlxFormat]:
    """Return the formats of quantized modules by their names in MLX."""
    return {mlx_name(m.module): FORMATS[m.codec] for m in modules if m.codec in FORMATS}


def quantization_section(modules: Sequence[LoaderModule]) -> dict[str, Any]:
    """Return the section of config.json: the most frequent format, and the others by module.

    As in mlx-lm, a module with integers does not name its mode: older versions take none.
    """
    packed = _packed(modules)
    usual = Counter(packed.values()).most_common(1)[0][0]
    section: dict[str, Any] = usual.settings()
    for path, kind in sorted(packed.items()):
        if kind is not usual:
            own = kind.settings()
            if kind.affine:
                del own["mode"]
            section[path] = own
    return section


def section_findings(
    quantization: Mapping[str, Any], modules: Sequence[LoaderModule]
) -> Iterator[Finding]:
    """Yield contradictions between config.json and the weights.

    Args:
        quantization: both sections, as the dialect reads them.
        modules: every weight.
    """
    packed = _packed(modules)
    section, copy = quantization.get(_SECTION), quantization.get("quantization_config")
    yield from _beside(quantization)
    yield from _form_findings(section, len(packed))
    if not isinstance(section, dict):
        return
    if copy is not None and copy != section:
        message = f"quantization_config is not the same as {_SECTION}: loaders differ in which"
        yield Finding("quantization-config", "config.json", f"{message} they read")
    for path, kind in packed.items():
        said = _said(section, path)
        if said != kind:
            message = f"{_SECTION} says {_shown(said)}, its tensors have {_shown(kind)}"
            yield Finding("quantization-config", path, message)
    plain = {mlx_name(m.module) for m in modules} - packed.keys()
    for path in sorted(plain & section.keys()):
        if section[path]:
            yield Finding("skip-list", path, f"in {_SECTION}, but not packed")
    yield from _strange_keys(section, packed)


def _beside(quantization: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield other keys of config.json with which MLX does not compute what is stored."""
    for key, what in _OTHERS.items():
        if quantization.get(key):
            message = f"{key} is {cut(ascii(quantization[key]), 80)}: {what}"
            yield Finding("config", "config.json", message)


def _form_findings(section: object, packed: int) -> Iterator[Finding]:
    """Yield why loaders do not take the section at all."""
    message = ""
    if isinstance(section, dict):
        missing = [key for key in (_GROUP, "bits") if key not in section]
        if missing:
            message = f"{_SECTION} lacks {' and '.join(missing)}, without which no loader takes it"
    elif packed:
        message = f"no {_SECTION}, but {packed} modules are packed"
    elif section is not None:
        message = f"{_SECTION} is {ascii(section)[:80]}, expected an object: no loader takes it"
    if message:
        yield Finding("quantization-config", "config.json", message)


def _strange_keys(section: Mapping[str, Any], packed: Mapping[str, MlxFormat]) -> Iterator[Finding]:
    for path in packed:
        own = section.get(path)
        given = own.items() if isinstance(own, dict) else ()
        strange = [key for key, value in given if key not in _KEYS and value is not False]
        if strange:
            message = f"{_SECTION} gives it {cut(ascii(strange), 80)}, no setting of weights"
            yield Finding("quantization-config", path, message)


def _said(section: Mapping[str, Any], path: str) -> MlxFormat | None:
    """Return the format of a module; a module's own settings need no group and no bits."""
    own = section.get(path, True)
    if own is True:
        return format_of(section.get("mode", "affine"), section.get("bits"), section.get(_GROUP))
    if not isinstance(own, dict) or not own:
        return None
    mode = own.get("mode", "affine")
    bits, group = _USUAL.get(mode, (None, None)) if isinstance(mode, str) else (None, None)
    return format_of(mode, _given(own, "bits", bits), _given(own, _GROUP, group))


def _given(own: Mapping[str, Any], key: str, usual: int | None) -> object:
    return usual if own.get(key) is None else own[key]


def _shown(kind: MlxFormat | None) -> str:
    if kind is None:
        return "no format of MLX"
    return f"{kind.bits} bits ({kind.mode}) in groups of {kind.group}"
