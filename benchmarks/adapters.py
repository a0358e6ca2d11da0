"""Measure which weights an adapter that was trained on NF4 belongs into: docs/adapters.md.

    python -m benchmarks.adapters [--steps 40] [--seeds 3] [--rate 3e-3]

Trains QLoRA adapters on the embedded checkpoint in NF4, on pages of this documentation, and merges
each into the original weights and into the decoded NF4 ones (``--onto nf4``). Both are compared
with the model as it was trained, NF4 with the adapter beside it, on pages that it has not seen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

import qwen35
from benchmarks.measuring import ASSET, ROOT
from qwen35.engines.torch_model import TorchModel

TRAINED = ("gguf", "servers", "verify", "publish", "scale", "recipes", "pipeline", "calibrate")
HELD_OUT = ("evaluate", "tune", "fp8", "migration", "resume")
"""Pages of docs/."""
CONTEXT, BATCH, RANK = 64, 2, 8
ROWS = ("beside NF4, as trained", "merged into decoded NF4", "merged into the original")


def chunks(pages: Sequence[str], count: int) -> torch.Tensor:
    """Return tokens spread over pages, [count, CONTEXT]."""
    tokenizer, share = AutoTokenizer.from_pretrained(ASSET), count // len(pages) + 1
    texts = [(ROOT / "docs" / f"{page}.md").read_text("utf-8") for page in pages]
    ids = [tokenizer(text)["input_ids"][: share * CONTEXT] for text in texts]
    flat = torch.tensor([one for page in ids for one in page[: len(page) // CONTEXT * CONTEXT]])
    return flat.view(-1, CONTEXT)[:count]


def decoded(folder: Path) -> Any:
    """Return the packed model with its weights decoded to float32, as each product does."""
    from bitsandbytes.functional import dequantize_4bit

    model = TorchModel(folder, exact=True).model
    for name, module in list(model.named_modules()):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        weight = dequantize_4bit(module.weight.data, state).float()
        plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def train(base: Path, out: Path, steps: int, seed: int, rate: float) -> None:
    """Train an adapter on the packed base and save it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model: Any = get_peft_model(decoded(base), config)
    data = chunks(TRAINED, steps * BATCH)
    order = torch.randperm(len(data)).repeat(1 + steps * BATCH // len(data))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.train()
    for step in range(steps):
        batch = data[order[BATCH * step : BATCH * (step + 1)]]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


def compared(models: Mapping[str, Any], data: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Return of each model its mean divergence from the first one and its loss, in nats."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.inference_mode():
        for row in data:  # one at a time, for memory
            reference = None
            for name, model in models.items():
                logits = model(input_ids=row[None]).logits[0, :-1]
                log_p = torch.log_softmax(logits.float(), -1)
                reference = log_p if reference is None else reference
                divergence = (reference.exp() * (reference - log_p)).sum(-1).mean()
                loss = -log_p.gather(1, row[1:, None]).mean()
                found[name].append((float(divergence), float(loss)))
    return {
        name: (mean(row[0] for row in rows), mean(row[1] for row in rows))
        for name, rows in found.items()
    }


def measure(folder: Path, seed: int, steps: int, rate: float) -> dict[str, tuple[float, float]]:
    """Train, merge, and return divergence and loss of each row."""
    base, adapter = folder / "nf4", folder / f"adapter-{seed}"
    train(base, adapter, steps, seed, rate)
    models = {ROWS[0]: PeftModel.from_pretrained(decoded(base), adapter).eval()}
    for name, onto in zip(ROWS[1:], ("nf4", None), strict=True):
        out = folder / f"{onto}-{seed}"
        qwen35.merge(ASSET, adapter, out, onto=onto)
        models[name] = TorchModel(out, exact=True).model
    return compared(models, chunks(HELD_OUT, 24))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        qwen35.convert(ASSET, folder / "nf4", recipe="nf4")
        untrained = {
            "the original": TorchModel(ASSET, exact=True).model,
            "NF4, no adapter": decoded(folder / "nf4"),
        }
        for name, (divergence, loss) in compared(untrained, chunks(HELD_OUT, 24)).items():
            print(f"{name:26}   KLD {divergence:.5f}  loss {loss:.4f}", flush=True)
        for seed in range(args.seeds):
            rows = measure(folder, seed, args.steps, args.rate)
            for name, (divergence, loss) in rows.items():
                print(f"{name:26} {seed} KLD {divergence:.5f}  loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
