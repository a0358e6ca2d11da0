"""What config.json tells MLX about quantized weights, and whether it is true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen35.codecs.codec import LoaderModule
from qwen35.codecs.mlx.layout import FORMATS, MlxFormat, format_of
from qwen35.codecs.mlx.mlx_names import mlx_name
from qwen35.errors import Finding

__all__ = ["quantization_section", "section_findings"]

_SECTION = "quantization"


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
    if not isinstance(section, dict):
        if packed:
            message = f"no {_SECTION}, but {len(packed)} modules are packed"
            yield Finding("quantization-config", "config.json", message)
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
        if isinstance(section[path], dict):
            yield Finding("skip-list", path, f"in {_SECTION}, but not packed")


def _said(section: Mapping[str, Any], path: str) -> MlxFormat | None:
    own = section.get(path, section)
    if not isinstance(own, dict):
        return None
    return format_of(own.get("mode", "affine"), own.get("bits"), own.get("group_size"))


def _shown(kind: MlxFormat | None) -> str:
    if kind is None:
        return "no format of MLX"
    return f"{kind.bits} bits ({kind.mode}) in groups of {kind.group}"
