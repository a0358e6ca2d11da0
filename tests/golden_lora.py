"""Golden hashes of what llama.cpp's converter of adapters writes, and how they are made anew.

    make golden        # or: python tests/golden_lora.py LLAMA_CPP

needs the source of llama.cpp as llama-cpp-python's source package brings it. It rewrites
``tests/golden/lora.json``. Only adapters with one rank and one alpha are here: the converter leaves
out what else decides their effect.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from golden_gguf import model_folder
from lora_models import write_adapter

__all__ = ["CASES", "GOLDEN", "adapter_of", "converted", "digest"]

GOLDEN = Path(__file__).parent / "golden" / "lora.json"

CASES: tuple[tuple[str, str], ...] = (
    *(("asset", kind) for kind in ("F32", "F16", "BF16", "Q8_0")),
    *((model, "F32") for model in ("equal-heads", "three-to-one", "odd-rows", "moe")),
)
"""Checkpoint and type."""


def adapter_of(model: str, work: Path) -> Path:
    """Return the adapter of a checkpoint, made in `work` once; of half of them with long names."""
    out = work / f"Tuned-{model}"
    inner = "model.language_model." if model in ("asset", "three-to-one") else "model."
    return out if out.exists() else write_adapter(model_folder(model, work), out, inner=inner)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def converted(llama: Path, work: Path) -> Iterator[tuple[str, str, Path]]:
    """Run the converter on every case; yield its files."""
    paths = os.pathsep.join((str(llama), str(llama / "gguf-py")))
    environment = {**os.environ, "PYTHONPATH": paths, "NO_LOCAL_GGUF": "1", "HF_HUB_OFFLINE": "1"}
    for model, kind in CASES:
        adapter, out = adapter_of(model, work), work / f"{model}-{kind}.gguf"
        command = [sys.executable, str(llama / "convert_lora_to_gguf.py"), str(adapter)]
        command += ["--base", str(model_folder(model, work)), "--outfile", str(out)]
        command += ["--outtype", kind.lower()]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        yield model, kind, out


def main() -> None:
    """Write the golden file."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        hashes = {f"{m} {t}": digest(path) for m, t, path in converted(Path(sys.argv[1]), work)}
    GOLDEN.write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    main()
