"""What users read when something is wrong: every sentence and finding, as golden text.

Test modules with the mark `sentences` may provoke only what is in golden/sentences.txt, word for
word. ``make golden-sentences`` writes that file anew: read the difference as a user would.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from qwen35.errors import Finding, Qwen35Error, unknown_name
from qwen35.planning.containers import CONTAINERS
from qwen35.planning.recipe import built_in
from qwen35.planning.safetensors_files.safetensors_container import ACTIONS

__all__ = ["check", "said"]

_GOLDEN = Path(__file__).parent / "golden" / "sentences.txt"

_OF = (
    "qwen35.planning.",
    "qwen35.verification.",
    "qwen35.codecs.comparison",
    "qwen35.codecs.fp8.config",
    "qwen35.codecs.nf4.config",
)
_NAME = (
    r"\b(?:model|mtp|blk|v|mm|visual|linear_attn|self_attn|mlp)\.(?!safetensors)[\w.]*\w"
    r"|\b\w+\.weight\b"
)
_CHANGING = (
    (_NAME, "NAME"),
    (r"(?<=not valid TOML )\(.*\)|(?<=a plain question )\(.*\)", "(WHY)"),
    (r"(?<=transformers cannot load it )\(.*\)|(?<=preprocessor )\(.*\)", "(WHY)"),
    (r"(?<=Jinja template, line )\d+: .*(?=; )", "N: WHY"),
    (r"\b(?:[0-9a-f]{12}|[0-9a-f]{64})\b", "HASH"),
    (r"\b\d[\d,]* (?:of \d[\d,]* )?(?=bytes|codes|scales|values)", "N "),
    (r"(?<=relative error )[\d.]+|(?<=expected )\d{4,}", "N"),
    (rf"\b{re.escape(platform.node())}\b", "HOST"),
)
"""What depends on random weights, versions and machines, or is the same for many weights."""

_LISTS = {
    **{built_in(name): f"RECIPES of {name}" for name in CONTAINERS},
    CONTAINERS["safetensors"].formats: "FORMATS",
    tuple(ACTIONS): "ACTIONS",
}
"""What a recipe or a codec more makes longer."""


@contextmanager
def said(base: Path) -> Iterator[set[str]]:
    """Collect what `_OF` says meanwhile; folders under `base` are left out of it."""
    seen: set[str] = set()
    folder = re.compile(rf"{re.escape(str(base))}/[^/\s:]+")

    def note(sentence: str) -> None:
        frame = sys._getframe(2)
        if frame.f_code is unknown_name.__code__:
            frame = frame.f_back or frame
        module = frame.f_globals["__name__"]
        if not module.startswith(_OF):
            return
        sentence = folder.sub("FOLDER", sentence)
        for pattern, instead in _CHANGING:
            sentence = re.sub(pattern, instead, sentence)
        for names, instead in _LISTS.items():
            sentence = sentence.replace(", ".join(names), instead)
            sentence = sentence.replace(" or ".join(names), instead)
        seen.add(f"{module}: {sentence}".replace("\n", "\\n"))

    make_error, make_finding = Qwen35Error.__init__, Finding.__init__

    def error(self: Qwen35Error, *args: str, **more: str) -> None:
        make_error(self, *args, **more)
        note(str(self))

    def finding(self: Finding, *args: str, **more: str) -> None:
        make_finding(self, *args, **more)
        note(f"[{self.check}] {self.subject}: {self.message}")

    with patch.object(Qwen35Error, "__init__", error), patch.object(Finding, "__init__", finding):
        yield seen


def check(seen: set[str]) -> None:
    """Compare with the golden ones, or add to the file that ``QWEN35_SENTENCES`` names."""
    if path := os.environ.get("QWEN35_SENTENCES"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(f"{sentence}\n" for sentence in seen)
    else:
        strange = sorted(seen - set(_GOLDEN.read_text("utf-8").splitlines()))
        assert not strange, "not in golden/sentences.txt: if it reads well, make golden-sentences"
