"""What recipes for GGUF cost in bytes and give in divergence, on the embedded checkpoint.

    python benchmarks/recipes.py [--windows 8]

Prints bytes and the mean Kullback-Leibler divergence from the F32 file, in llama.cpp, over held-out
text. The importance matrix is gathered with transformers over other text, tied head included. This
is how the rules of `q8-gates-plus` were chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / "tests")

import torch
import transformers
from gguf import GGUFWriter

from qwen35.checkpoint.source import open_folder
from qwen35.engines.llama import Llama
from qwen35.gguf.imatrix import Imatrix, read_imatrix
from qwen35.gguf.names import Tensor
from qwen35.gguf.plan import Asked, make_plan
from qwen35.gguf.rules import load_recipe, pattern_rules
from qwen35.gguf.write import write

ASSET = ROOT / "assets" / "qwen3.5-tiny"
WINDOW = 512
GATES_F32 = r"blk\..*ssm_(alpha|beta)=f32"
ROWS: dict[str, tuple[str, Sequence[str]]] = {
    "mix": ("mix", ()),
    "q8-gates": ("q8-gates", ()),
    "q8-gates, alpha and beta q8_0": ("q8-gates", (r"ssm_(alpha|beta)=q8_0",)),
    "q8-gates, alpha and beta f32": ("q8-gates", (GATES_F32,)),
    "q8-gates, attn_k and attn_v q8_0": ("q8-gates", (r"attn_(k|v)\.=q8_0",)),
    "q8-gates-plus": ("q8-gates-plus", ()),
    "  and attn_* q8_0": ("q8-gates-plus", (r"attn_(q|k|v|output)\.=q8_0",)),
    "  and token_embd q8_0": ("q8-gates-plus", ("token_embd=q8_0",)),
}


def windows(text: str, count: int) -> list[list[int]]:
    """Return `count` windows of token ids."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(ASSET)
    ids = tokenizer(text)["input_ids"]
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def gather(batch: list[list[int]], tensors: Sequence[Tensor], path: Path) -> Imatrix:
    """Sum the squares of every linear layer's inputs, as llama-imatrix does; write and read it."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        ASSET, dtype=torch.float32
    )
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].double().square().sum(dim=(0, 1))
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "visual" not in name:
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor(batch))
    sums["model.language_model.embed_tokens"] = sums["lm_head"]  # tied: the head's inputs count
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["eval.txt"])
    writer.add_uint32("imatrix.chunk_count", len(batch))
    writer.add_uint32("imatrix.chunk_size", WINDOW)
    for tensor in tensors:
        found = sums.get(tensor.slabs[0].item.weight.name.removesuffix(".weight"))
        if found is None:
            continue
        if tensor.transform == "columns":
            found = found.reshape(tensor.keys, -1, tensor.head).transpose(0, 1).reshape(-1)
        writer.add_tensor(f"{tensor.name}.in_sum2", found.float().numpy()[None])
        counts = np.full((1, 1), len(batch) * WINDOW, np.float32)
        writer.add_tensor(f"{tensor.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_imatrix(path)


def log_probabilities(path: Path, batch: list[list[int]]) -> torch.Tensor:
    """Return log probabilities after each token, [tokens, vocabulary] in float64."""
    model = Llama(path)
    rows = [torch.from_numpy(model.logits(ids)) for ids in batch]
    model.close()
    return torch.log_softmax(torch.cat(rows).double(), dim=-1)


def divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence in nats a token."""
    return float((reference.exp() * (reference - found)).sum(dim=-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--types", default="Q4_K_M,Q5_K_M")
    args = parser.parse_args()
    text = (ASSET / "eval.txt").read_text()
    half = len(text) // 2
    batch = windows(text[:half], args.windows)
    checkpoint = open_folder(ASSET)
    types = tuple(args.types.split(","))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = make_plan(checkpoint, Asked(("F32",), load_recipe("mix")))
        out = write(base, work / "f32").out
        imatrix = gather(windows(text[half:], 16), base.files[0].tensors, work / "i.gguf")
        reference = log_probabilities(out / base.files[0].name, batch)
        print(f"{'':<34}" + "".join(f"{kind:>12}{'KLD':>10}{'imatrix':>10}" for kind in types))
        table: dict[str, Any] = {}
        for i, (name, (recipe, lines)) in enumerate(ROWS.items()):
            rules = pattern_rules(lines, [])
            cells: dict[str, list[float]] = {}
            for matrix in (None, imatrix):
                plan = make_plan(
                    checkpoint, Asked(types, load_recipe(recipe), rules, imatrix=matrix)
                )
                made = write(plan, work / f"{i}-{matrix is not None}").out
                for file in plan.files:
                    value = divergence(reference, log_probabilities(made / file.name, batch))
                    row = cells.setdefault(file.file_type.name, [file.head.nbytes])
                    row.append(value)
            table[name] = cells
            shown = "".join(f"{c[0]:>12,}{c[1]:>10.5f}{c[2]:>10.5f}" for c in cells.values())
            print(f"{name:<34}{shown}", flush=True)
    print(json.dumps(table), file=sys.stderr)


if __name__ == "__main__":
    main()
