"""Golden hashes of what llama.cpp's converter writes, and how they are made anew.

    make golden        # or: python tests/golden_gguf.py LLAMA_CPP

needs the source of llama.cpp as llama-cpp-python's source package brings it. It rewrites
``tests/golden/gguf.json``; do so when the embedded checkpoint or the pinned version changes.

``ssm_a`` (``-exp(A_log)``) is compared by value: torch rounds ``exp`` differently on different
processors, we always to nearest. Its bytes count as zeros in the hash.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import ASSET
from gguf_models import VARIANTS, make_variant
from qwen35.checkpoint.gguf_header import read_container

__all__ = ["CASES", "GOLDEN", "Case", "converted", "fingerprint", "weights_hash"]

GOLDEN = Path(__file__).parent / "golden" / "gguf.json"
_SKIPPED = ("deep", "grouped", "moe-8")
"""Variants that differ only in what llama-quantize looks at."""


@dataclass(frozen=True)
class Case:
    """One file of the converter: checkpoint, type, whether it is the projector's, MTP layers."""

    model: str
    type: str
    mmproj: bool = False
    mtp: bool | str = True

    @property
    def key(self) -> str:
        """Its name in the golden file."""
        text = "mtp" if self.mtp == "alone" else "text" if self.mtp else "text-without-mtp"
        kind = "mmproj" if self.mmproj else text
        return f"{self.model} {kind} {self.type}"


CASES: tuple[Case, ...] = (
    *(
        Case(model, kind, mtp=model != "text")
        for model in ("asset", *(name for name in VARIANTS if name not in _SKIPPED))
        for kind in ("F32", "F16", "BF16")
    ),
    *(Case("asset", kind, mmproj=True) for kind in ("F32", "F16", "BF16", "Q8_0")),
    *(Case("moe", kind, mmproj=True) for kind in ("F16",)),
    *(Case("asset", kind, mtp=False) for kind in ("F16",)),
    *(Case("asset", kind, mtp="alone") for kind in ("F16", "BF16", "Q8_0")),
    *(Case(model, "Q8_0", mtp="alone") for model in ("moe", "moe-per-expert", "odd-rows")),
)


def model_folder(model: str, work: Path) -> Path:
    """Return the checkpoint of a case; variants are made in `work`, once."""
    if model == "asset":
        return ASSET
    folder = work / f"Tiny-{model}-1B"
    return folder if folder.exists() else make_variant(work, model)


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Return the hash of a file without the bytes of ``ssm_a``, and those values."""
    content = bytearray(path.read_bytes())
    decays: list[int] = []
    for entry in read_container(path).tensors.values():
        if entry.name.endswith(".ssm_a"):
            span = slice(entry.begin, entry.begin + entry.nbytes)
            decays += np.frombuffer(bytes(content[span]), "<u4").tolist()
            content[span] = bytes(entry.nbytes)
    return {"sha256": hashlib.sha256(content).hexdigest(), "ssm_a": decays}


def converted(llama: Path, work: Path) -> Iterator[tuple[Case, Path]]:
    """Run the converter on every case; yield its files."""
    jobs = []
    outputs = []
    for case in CASES:
        out = work / f"{case.key.replace(' ', '-')}.gguf"
        outputs.append((case, out))
        jobs.append(
            {
                "model": str(model_folder(case.model, work)),
                "out": str(out),
                "type": case.type.lower(),
                "mmproj": case.mmproj,
                "mtp": case.mtp,
            }
        )
    script = Path(__file__).with_name("upstream_convert.py")
    command = [sys.executable, str(script), str(llama)]
    subprocess.run(command, input=json.dumps(jobs), text=True, check=True, capture_output=True)
    yield from outputs


def main() -> None:
    """Write the golden file."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = {case.key: fingerprint(path) for case, path in converted(Path(sys.argv[1]), work)}
        models = sorted({case.model for case in CASES})
        weights = {model: weights_hash(model_folder(model, work)) for model in models}
    GOLDEN.write_text(json.dumps({"weights": weights, "files": files}, indent=1) + "\n")


if __name__ == "__main__":
    main()
