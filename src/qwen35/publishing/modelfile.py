"""Write the Modelfile that `ollama create` reads, for a folder of GGUF files."""

from __future__ import annotations

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.source import read_json
from qwen35.display import printable
from qwen35.errors import InputError
from qwen35.publishing.guard import bad_name

__all__ = ["gguf_models", "is_gguf", "modelfile_text"]

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
    """Return the GGUF files of models, not projectors, the preferred one first."""
    names = [name for name in place.sizes() if is_gguf(name)]
    return sorted((name for name in names if not name.startswith(_PROJECTOR)), key=_preference)


def _preference(name: str) -> tuple[int, str]:
    stem = name.removesuffix(_SUFFIX)
    ranks = [i for i, kind in enumerate(PREFERRED) if stem.endswith(f"-{kind}")]
    return (ranks[0] if ranks else len(PREFERRED)), name


def modelfile_text(place: LocalFolder) -> str:
    """Return the Modelfile of a folder with at least one GGUF file.

    It loads text only: support for a separate projector depends on Ollama's version, so that line
    is a comment.

    Raises:
        InputError: no GGUF file is a model, or a name is not for other systems.
    """
    models = gguf_models(place)
    if not models:
        raise InputError(str(place), "no GGUF file of a model in it, only projectors")
    first, *others = map(_from, models)
    lines = ["# ollama create NAME -f Modelfile", first]
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
    return f"FROM ./{name}"


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
