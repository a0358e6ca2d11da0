"""Runs llama.cpp's own converter on several checkpoints; a process of its own, for its imports.

    python upstream_convert.py LLAMA_CPP < jobs.json

A job is ``{"model", "out", "type": "f32|f16|bf16|q8_0", "mmproj": bool, "mtp": true, false or
"alone"}``; with ``"keys": true`` only the keys that config.json decides are written to ``out``, as
JSON. The one thing changed is the recognition of the tokenizer: the converter knows vocabularies by
a hash of ids.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> None:
    """Convert one checkpoint."""
    import torch
    from conversion import get_model_class  # type: ignore[import-not-found]
    from conversion.base import (  # type: ignore[import-not-found]
        ModelBase,
        ModelType,
        TextModel,
        get_model_architecture,
        gguf,
    )

    TextModel.get_vocab_base_pre = lambda *_: "qwen35"
    kinds = gguf.LlamaFileType
    types = {"f32": kinds.ALL_F32, "f16": kinds.MOSTLY_F16, "bf16": kinds.MOSTLY_BF16}
    types["q8_0"] = kinds.MOSTLY_Q8_0
    model = Path(job["model"])
    kind = ModelType.MMPROJ if job["mmproj"] else ModelType.TEXT
    with torch.inference_mode():
        architecture = get_model_architecture(ModelBase.load_hparams(model, False), kind)
        found = get_model_class(architecture, mmproj=job["mmproj"])
        if not job["mmproj"]:
            found.no_mtp, found.mtp_only = not job["mtp"], job["mtp"] == "alone"
        converter = found(model, types[job["type"]], Path(job["out"]))
        if not job.get("keys"):
            converter.write()
            return
        converter.set_gguf_parameters()
        keys = {name: row.value for name, row in converter.gguf_writer.kv_data[0].items()}
        Path(job["out"]).write_text(json.dumps(keys))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    logging.disable(logging.WARNING)
    for row in json.load(sys.stdin):
        run(row)
