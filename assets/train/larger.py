"""Train a larger checkpoint on plain text: python assets/train/larger.py --out FOLDER.

34 million parameters of text, which `benchmarks/codes.py` measures on. It has the embedded
checkpoint's architecture, tokenizer, training text and held-out text; the vision tower is not
trained, there is no multi-token prediction, and it answers no questions. All is seeded, and in
float32: the same Python, torch, machine and number of threads give the same files. It takes less
than two hours of CPU time on processors that have no unit for bfloat16, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from batches import text_batches
from check import held_out_rows, token_stream, with_perplexity
from checkpoint import config, save_settings, save_weights, stored_tensors, write_json
from corpus import load_corpus
from learning import Clock, Progress, hidden_states, optimised, text_loss, token_loss

ASSET = Path(__file__).resolve().parent.parent / "qwen3.5-tiny"
SEED, RATE, STEPS, TOKENS = 11, 2e-3, 750, 1024
LAYERS = 6
GEOMETRY: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 1536,
    "layer_types": ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(LAYERS)],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "mtp_num_hidden_layers": 0,
    "num_attention_heads": 8,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
}
"""What differs from the embedded checkpoint; rows are multiples of 256, as k-quants need."""


def larger_config() -> dict[str, Any]:
    """The content of config.json."""
    settings: dict[str, Any] = json.loads(json.dumps(config()))
    settings["text_config"] |= GEOMETRY
    settings["vision_config"]["out_hidden_size"] = GEOMETRY["hidden_size"]
    return settings


def train(model: Qwen3_5ForConditionalGeneration, stream: torch.Tensor, steps: int) -> None:
    """Train on rows of plain text."""
    weights = list(model.model.language_model.parameters())
    groups = [
        {"params": [one for one in weights if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in weights if one.ndim == 1], "weight_decay": 0.0},
    ]
    tools: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))]
    batches, note = text_batches(stream, SEED, TOKENS), Progress()
    for batch in optimised(model, tools, batches, steps, note):
        states = hidden_states(model, batch)
        plain, loss = token_loss(states, model.lm_head.weight, batch.targets)
        loss.backward()
        note.add("text", plain.item())


def run(folder: Path, steps: int) -> None:
    """Train, and write the checkpoint into a new folder."""
    clock, corpus = Clock(), load_corpus()
    tokenizer = Tokenizer.from_file(str(ASSET / "tokenizer.json"))
    torch.manual_seed(SEED)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config.from_dict(larger_config())).float()
    train(model, token_stream(tokenizer, corpus.train), steps)
    folder.mkdir(parents=True)
    save_settings(folder)
    write_json(folder / "config.json", larger_config())
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(ASSET / name, folder / name)
    (folder / "eval.txt").write_text(corpus.held_out, encoding="utf-8")
    tensors = stored_tensors(model, {})
    save_weights(tensors, folder)
    held = held_out_rows(token_stream(tokenizer, (corpus.held_out,)))
    report = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "steps": steps,
        "training": clock.minutes(),
        "parameters": sum(t.numel() for t in tensors.values()),
        "held_out": with_perplexity(text_loss(model, held)),
    }
    write_json(folder / "training.json", report)
    sys.stderr.write(f"{json.dumps(report)}\n")


def main() -> None:
    """Parse the command line and run the training."""
    parser = argparse.ArgumentParser(description="Train a larger checkpoint for benchmarks.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fresh = options.out.with_name(f"{options.out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    run(fresh, options.steps)
    fresh.rename(options.out)


if __name__ == "__main__":
    main()
