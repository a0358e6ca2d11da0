"""Quantize with llm-compressor's GPTQ, in its own environment (benchmarks/codes_peers.py).

    python -I llm_compressor_gptq.py SOURCE WINDOWS.npy OUT SCHEME IGNORED...

WINDOWS.npy holds token ids, [windows, context]. Modules whose names contain one of IGNORED stay as
they are. All other settings are llm-compressor's own.
"""

import sys

import numpy as np
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForImageTextToText, AutoTokenizer

source, windows, out, scheme, *ignored = sys.argv[1:]
ids = np.load(windows)
model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
oneshot(
    model=model,
    tokenizer=AutoTokenizer.from_pretrained(source),
    dataset=Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    ),
    recipe=GPTQModifier(
        targets="Linear", scheme=scheme, ignore=[f"re:.*{name}.*" for name in ignored]
    ),
    max_seq_length=ids.shape[1],
    num_calibration_samples=len(ids),
    shuffle_calibration_samples=False,
)
model.save_pretrained(out, save_compressed=True)
