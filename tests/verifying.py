"""Short ways to verify an artifact, and to break a copy of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from checkpoints import Tensors
from qwen35.checkpoint.open import fetch
from qwen35.codecs.modelopt import hf_quant_config
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import Verdict, verify
from running import load_all, read_config

PIECE = 64 * 256
"""Values of a piece, where the fixture `small_pieces` has it so that weights have several."""


def check(artifact: Path, source: Path | None = None, **more: Any) -> Verdict:
    """Verify from headers, or beside a source by numbers."""
    opened = open_artifact(str(artifact))
    if source is None:
        return verify(opened, **more)
    return verify(opened, source=fetch(str(source)), depth="numbers", threads=1, **more)


def rewrite(folder: Path, change: Callable[[Tensors], object], *, forget: bool = True) -> None:
    """Change the tensors of an artifact; without its manifest unless told."""
    tensors = load_all(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if forget:
        (folder / "qwen35.json").unlink()


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json of an artifact, and forget its manifest."""
    config = read_config(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "qwen35.json").unlink()


def agree(folder: Path) -> Path:
    """Write hf_quant_config.json of an artifact, if it has one, as its config.json has it."""
    path = folder / "hf_quant_config.json"
    if path.exists():
        path.write_text(json.dumps(hf_quant_config(read_config(folder)["quantization_config"])))
    return folder


def edited(
    artifact: Path,
    folder: Path,
    change: Callable[[Tensors], object] | None = None,
    config: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """Return a copy of an artifact with something wrong, without its manifest."""
    copy = Path(shutil.copytree(artifact, folder))
    (copy / "qwen35.json").unlink(missing_ok=True)
    if change is not None:
        tensors = load_all(copy)
        change(tensors)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            copy / "model.safetensors",
            metadata={"format": "pt"},
        )
    if config is not None:
        parsed = read_config(copy)
        config(parsed)
        (copy / "config.json").write_text(json.dumps(parsed))
    return copy


def found(verdict: Verdict) -> set[tuple[str, str]]:
    """Return check and subject of each finding."""
    return {(f.check, f.subject) for f in verdict.findings}
