"""Write the Modelfile that `ollama create` reads, for a folder of GGUF files."""

from __future__ import annotations

import shlex
from pathlib import Path

from qwen35.checkpoint.gguf_header import is_adapter, is_draft
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import read_json
from qwen35.checkpoint.split_gguf import SplitName, by_model, title_of
from qwen35.display import printable
from qwen35.errors import InputError
from qwen35.publishing.guard import bad_name

__all__ = [
    "gguf_adapters",
    "gguf_drafts",
    "gguf_models",
    "is_gguf",
    "is_split",
    "merge_command",
    "modelfile_text",
]

PREFERRED = ("Q4_K_M", "Q5_K_M", "Q4_K_S", "Q6_K", "Q8_0")
"""Types for Ollama in order of preference: first the default of its own library."""

_SUFFIX = ".gguf"
_PROJECTOR = "mmproj-"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}

_TEMPLATE = '''TEMPLATE """{{- range $i, $_ := .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""'''
"""ChatML, the frame of Qwen3.5's chat template, in Go's template language."""


def is_gguf(name: str) -> bool:
    """Return whether a name is that of a GGUF file."""
    return name.endswith(_SUFFIX)


def gguf_models(place: LocalFolder) -> list[str]:
    """Return the GGUF files of models, the preferred one first.

    Projectors, MTP layers and adapters are none.

    A split model is named by its first file, which llama.cpp takes.
    """
    models = by_model(sorted(name for name in place.sizes() if is_gguf(name)))
    names = [files[0] for files in models if not files[0].startswith(_PROJECTOR)]
    beside = {*gguf_drafts(place), *gguf_adapters(place)}
    return sorted((name for name in names if name not in beside), key=_preference)


def gguf_drafts(place: LocalFolder) -> list[str]:
    """Return the GGUF files with an MTP layer alone."""
    return sorted(n for n in place.sizes() if is_gguf(n) and is_draft(Path(str(place)) / n))


def gguf_adapters(place: LocalFolder) -> list[str]:
    """Return the GGUF files with an adapter."""
    return sorted(n for n in place.sizes() if is_adapter(Path(str(place)) / n))


def is_split(name: str) -> bool:
    """Return whether a name is that of one of several files."""
    return SplitName.parse(name) is not None


def merge_command(name: str) -> str:
    """Return the command that makes one file of a split model."""
    return f"llama-gguf-split --merge {shlex.quote(name)} {shlex.quote(_merged(name))}"


def _merged(name: str) -> str:
    return f"{title_of([name])}{_SUFFIX}"


def _preference(name: str) -> tuple[int, str]:
    stem = title_of([name])
    ranks = [i for i, kind in enumerate(PREFERRED) if stem.endswith(f"-{kind}")]
    return (ranks[0] if ranks else len(PREFERRED)), name


def modelfile_text(place: LocalFolder) -> str:
    """Return the Modelfile of a folder with at least one GGUF file.

    It loads text only: support for a separate projector depends on Ollama's version, so that line
    is a comment. Ollama takes no split files (https://github.com/ollama/ollama/issues/5245), so
    comments say how to merge them.

    Raises:
        InputError: no GGUF file is a model, or a name is not for other systems.
    """
    models = gguf_models(place)
    if not models:
        raise InputError(str(place), "no GGUF file of a model in it, only projectors")
    first, *others = map(_from, sorted(models, key=is_split))
    lines = ["# ollama create NAME -f Modelfile"]
    if any(map(is_split, models)):
        lines.append("# Ollama takes one file a model; first make one of several:")
        lines += [f"# {merge_command(name)}" for name in models if is_split(name)]
    lines.append(first)
    lines += [f"# other sizes: {line}" for line in others]
    projectors = sorted(name for name in place.sizes() if name.startswith(_PROJECTOR))
    lines += [f"# for pictures, where Ollama takes it: {_from(name)}" for name in projectors]
    lines += ["", _TEMPLATE, 'PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"']
    lines += _sampling(place)
    return "\n".join(lines) + "\n"


def _from(name: str) -> str:
    """Return the instruction that loads a file; Ollama reads the rest of the line as its name."""
    problem = bad_name(name)
    if problem:
        raise InputError(printable(name), problem, hint="rename it")
    return f"FROM ./{_merged(name)}"


def _sampling(place: LocalFolder) -> list[str]:
    """Return the sampling defaults of generation_config.json, if there is one."""
    if "generation_config.json" not in place.sizes():
        return []
    settings = read_json(place, "generation_config.json")
    if not isinstance(settings, dict):
        raise InputError("generation_config.json", "not a JSON object")
    values = ((name, settings.get(name)) for name in _SAMPLING)
    return [
        f"PARAMETER {_OLLAMA_NAMES.get(name, name)} {value}"
        for name, value in values
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
