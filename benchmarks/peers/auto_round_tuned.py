"""Quantize with AutoRound's learned rounding, in its own environment (benchmarks/codes_peers.py).

    python -I auto_round_tuned.py SOURCE WINDOWS.npy OUT SCHEME FORMAT STEPS IGNORED...

AutoRound 0.16.1 needs some help here:

- It takes a text model alone for one, so the source is saved without its tower.
- Token ids given as tensors get a padding mask, which its full-attention layers refuse; texts do
  not. So windows are decoded, each with some tokens more, which it cuts off again.
- Batches must be whole: the last windows are left out.
- Its GGUF converter names an architecture that gguf 0.19.0 does not know, knows tokenizers by a
  hash (that of the embedded checkpoint is its own), and counts a layer of multi-token prediction
  that transformers did not load. None of this affects weights.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4
"""Windows a step; AutoRound's own choice is 8, which takes twice the time."""

source, windows, out, scheme, form, steps, *ignored = sys.argv[1:]

if form.startswith("gguf"):
    architectures: Any = gguf.MODEL_ARCH
    if not hasattr(architectures, "DFLASH"):
        architectures.DFLASH = architectures.QWEN3
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

    get_conversion()  # imports this module
    converter = sys.modules["conversion.base"]
    converter.TextModel.get_vocab_base_pre = lambda *_: "qwen35"
    converter.ModelBase.no_mtp = True

from auto_round import AutoRound  # noqa: E402

ids = np.load(windows)
context, flat = ids.shape[1], ids.reshape(-1)
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [
    tokenizer.decode(flat[first : first + context + 64])
    for first in range(0, flat.size - context, context)
]
texts = texts[: len(texts) // BATCH * BATCH]
with tempfile.TemporaryDirectory() as folder:
    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    calibration = Path(folder) / "calibration.json"
    calibration.write_text(json.dumps(texts), "utf-8")
    AutoRound(
        folder,
        scheme=scheme,
        dataset=str(calibration),
        seqlen=context,
        nsamples=len(texts),
        batch_size=BATCH,
        iters=int(steps),
        device_map="cpu",
        enable_torch_compile=False,
        **({"ignore_layers": ",".join(ignored)} if ignored else {}),
    ).quantize_and_save(out, format=form)
