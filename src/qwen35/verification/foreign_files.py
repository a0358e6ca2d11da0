"""Files and keys that no checkpoint needs: they run code, or are loaded over the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen35.checkpoint.locations import FileLocation
from qwen35.errors import Finding, InputError
from qwen35.model.named_code import code_keys
from qwen35.verification.settings_comparison import settings_of

__all__ = ["foreign_findings", "foreign_notes"]

_PICKLES = re.compile(r".*\.(bin|ckpt|pickle|pkl|pt|pth|joblib|npy|h5|msgpack)\Z", re.IGNORECASE)
_LEFTOVERS = re.compile(
    r"(training_args\.bin|optimizer\.(bin|pt)|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth)\Z"
)
"""What transformers' trainer leaves beside the weights; no loader of the model reads it."""

_CODE = (".py", ".pyc", ".so")
_PROGRAMS = "custom_generate"
_ADAPTER = re.compile(r"adapter_(model\..*|config\.json)\Z")
_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def foreign_findings(place: FileLocation) -> Iterator[Finding]:
    """Yield files that run code when they are loaded, adapters, and keys that name code."""
    for name in sorted(place.sizes()):
        if name.endswith(_CODE):
            yield Finding("files", name, "a program: no checkpoint of this family needs one")
        elif _ADAPTER.match(name):
            yield Finding("files", name, "an adapter: transformers would load it over the weights")
        elif _PICKLES.match(name) and not _LEFTOVERS.match(name):
            found = "not safetensors: some loaders prefer it, and a pickle runs code"
            yield Finding("files", name, found)
    if _PROGRAMS in place.folders():
        found = "programs for generate(): no checkpoint of this family needs one"
        yield Finding("files", f"{_PROGRAMS}/", found)
    for name in _CONFIGS:
        try:
            settings = settings_of(place, name) or {}
        except InputError:  # other checks name what cannot be read
            continue
        for key in code_keys(settings):
            found = "names code to be loaded from elsewhere: this family needs none"
            yield Finding("files", name, f"{key[:80]} {found}")


def foreign_notes(place: FileLocation) -> Iterator[str]:
    """Yield notes on pickles that no loader of the model reads."""
    for name in sorted(place.sizes()):
        if _LEFTOVERS.match(name):
            yield f"{name}: a pickle that training left, which runs code when it is loaded"
