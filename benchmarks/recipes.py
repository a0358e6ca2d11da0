"""Measure bytes and divergence of GGUF recipes on the embedded checkpoint.

    python -m benchmarks.recipes [--windows 8]

Prints bytes and, like `qwen35 evaluate`, the mean Kullback-Leibler divergence from the F32
file, in llama.cpp, over held-out text. The importance matrix is collected with transformers on
other text, including the tied head. This is how the rules of `q8-gates-plus` were chosen.
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
import torch
import transformers
from gguf import GGUFWriter

from benchmarks.measuring import ASSET
from qwen35.checkpoint.source import open_folder
from qwen35.evaluation.evaluation_run import evaluate
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.gguf_files.imatrix import Imatrix, read_imatrix
from qwen35.planning.gguf_files.tensor_names import UntypedTensor
from qwen35.planning.gguf_files.type_patterns import pattern_rules
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write

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


def gather(batch: list[list[int]], tensors: Sequence[UntypedTensor], path: Path) -> Imatrix:
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
        found = sums.get(tensor.rows.item.weight.name.removesuffix(".weight"))
        if found is None:
            continue
        means = tensor.rows.columns(found.float().numpy()[None])
        writer.add_tensor(f"{tensor.name}.in_sum2", means)
        counts = np.full((1, 1), len(batch) * WINDOW, np.float32)
        writer.add_tensor(f"{tensor.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_imatrix(path)


def windows(text: str, count: int) -> list[list[int]]:
    """Return `count` windows of token ids."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(ASSET)
    ids = tokenizer(text)["input_ids"]
    return [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def make_files(types: tuple[str, ...], imatrix: Imatrix, work: Path) -> dict[str, list[Path]]:
    """Write every row with and without the importance matrix; return row to files."""
    checkpoint, files = open_folder(ASSET), {}
    for i, (name, (recipe, lines)) in enumerate(ROWS.items()):
        rules, made = pattern_rules(lines, []), []
        for matrix in (None, imatrix):
            rows = load_recipe(recipe, "gguf").preceded(rules)
            plan = make_plan(checkpoint, rows, types=types, imatrix=matrix)
            out = write(plan, work / f"{i}-{matrix is not None}").out
            made += [out / file.name for file in plan.files]
        files[name] = made
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--types", default="Q4_K_M,Q5_K_M")
    args = parser.parse_args()
    text = (ASSET / "eval.txt").read_text()
    half = len(text) // 2
    types = tuple(args.types.split(","))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = make_plan(open_folder(ASSET), load_recipe("mix", "gguf"), types=("F32",))
        reference = write(base, work / "f32").out / base.files[0].name
        imatrix = gather(windows(text[half:], 16), files_of(base)[0].tensors, work / "i.gguf")
        (work / "text").write_text(text[:half])
        files = make_files(types, imatrix, work)
        every = [str(path) for made in files.values() for path in made]
        report = evaluate(str(reference), every, work / "text", chunks=args.windows)
        found = {row.model.path: row.comparison.kld.value for row in report.candidates}
        print(f"{'':<34}" + "".join(f"{kind:>12}{'KLD':>10}{'imatrix':>10}" for kind in types))
        table = {}
        for name, made in files.items():
            pairs = list(zip(made[: len(types)], made[len(types) :], strict=True))
            cells = [(plain.stat().st_size, found[plain], found[best]) for plain, best in pairs]
            table[name] = dict(zip(types, cells, strict=True))
            shown = "".join(
                f"{size:>12,}{plain:>10.5f}{best:>10.5f}" for size, plain, best in cells
            )
            print(f"{name:<34}{shown}", flush=True)
    print(json.dumps(table), file=sys.stderr)


if __name__ == "__main__":
    main()
