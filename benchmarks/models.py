"""Make the inputs of benchmarks; prints the path.

    python -m benchmarks.models checkpoint|layer|imatrix|windows SIZE WORK
    python -m benchmarks.models hollow SIZE RECIPE WORK

`checkpoint`: random bf16 weights with the shapes of a published size (0.8B), or for `tiny` the
embedded checkpoint; `layer`: one layer of such a size, its vocabulary cut to the tokenizer's;
`imatrix`: a random importance matrix for it; `windows`: token ids of the
embedded text, [windows, 512]; `hollow`: an output of a published size without its data, in sparse
files. What exists is kept.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from benchmarks.measuring import ASSET
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.header import file_layout
from qwen35.checkpoint.open import describe
from qwen35.checkpoint.source import Checkpoint, open_folder
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.model.sizes import published_config
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.gguf_files.mixes import quantizable
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe

PIECE = 2**22
SHARD = "model.safetensors-00001-of-00001.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DEEP = 188
"""Number of layers with which 9B has about 10,000 tensors in NF4."""
CONTEXT = 512


def make_checkpoint(size: str, work: Path) -> Path:
    """Write random bf16 weights with the shapes of a published size, and a tokenizer."""
    if size == "tiny":
        return ASSET
    return _written(published_config(f"Qwen3.5-{size}"), work / f"Qwen3.5-{size}")


def make_layer(size: str, work: Path) -> Path:
    """Write one layer of a published size, with a layer of the vision tower and without MTP."""
    raw = published_config(f"Qwen3.5-{size}")
    text = raw["text_config"]
    text["layer_types"] = text["layer_types"][:1]
    text["num_hidden_layers"], text["mtp_num_hidden_layers"] = 1, 0
    text["vocab_size"] = json.loads((ASSET / "config.json").read_text())["text_config"][
        "vocab_size"
    ]
    raw["vision_config"]["depth"] = 1
    return _written(raw, work / f"Qwen3.5-{size}-layer")


def _written(raw: dict[str, Any], folder: Path) -> Path:
    """Write a checkpoint with a config, unless it exists."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = parse_config(raw)
    specs = list(expected_tensors(config, CheckpointNaming.published(config)))
    head, offsets = file_layout(specs)
    generator = np.random.default_rng(0)
    pool = (generator.standard_normal(PIECE + 4096, dtype=np.float32) * np.float32(0.02)).view(
        np.uint32
    )
    bf16 = (pool >> np.uint32(16)).astype(np.uint16)
    with (folder / SHARD).open("wb") as file:
        file.write(head)
        for spec in specs:
            file.seek(offsets[spec.name])
            for start in range(0, spec.numel, PIECE):
                count = min(PIECE, spec.numel - start)
                shift = int(generator.integers(0, 4096))
                values = bf16[shift : shift + count]
                file.write(
                    values.tobytes()
                    if spec.dtype == "BF16"
                    else (values.astype(np.uint32) << np.uint32(16)).tobytes()
                )
    index = {"metadata": {}, "weight_map": dict.fromkeys(offsets, SHARD)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in TOKENIZER:
        shutil.copy(ASSET / name, folder / name)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def make_imatrix(size: str, work: Path) -> Path:
    """Write a random importance matrix for a checkpoint."""
    path = work / f"{size}.imatrix.gguf"
    if path.exists():
        return path
    source = open_folder(make_checkpoint(size, work))
    plan = make_plan(source, load_recipe("mix", "gguf"), types=("F32",))
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", CONTEXT)
    for tensor in files_of(plan)[0].tensors:
        if quantizable(tensor.name, tensor.shape) and tensor.name.startswith("blk."):
            sums = generator.exponential(size=(len(tensor.rows.slabs), tensor.row))
            writer.add_tensor(f"{tensor.name}.in_sum2", sums.astype(np.float32))
            counts = np.ones((len(tensor.rows.slabs), 1), np.float32)
            writer.add_tensor(f"{tensor.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_windows(size: str, work: Path) -> Path:
    """Write the token ids of the embedded text."""
    path = work / f"{size}.windows.npy"
    source = open_folder(make_checkpoint(size, work))
    np.save(path, read_text(source, [ASSET / "eval.txt"], context=CONTEXT).windows)
    return path


def describe_deep(folder: Path) -> Checkpoint:
    """Describe a checkpoint of 9B's geometry with more layers, written without its data."""
    raw = published_config("Qwen3.5-9B")
    text = raw["text_config"]
    text["layer_types"] = (text["layer_types"] * DEEP)[:DEEP]
    text["num_hidden_layers"] = DEEP
    config = parse_config(raw)
    specs = list(expected_tensors(config, CheckpointNaming.published(config)))
    head, offsets = file_layout(specs)
    end = max(offsets[spec.name] + spec.nbytes for spec in specs)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    with (folder / "model.safetensors").open("wb") as out:
        out.write(head)
        out.truncate(end)
    return describe(str(folder))


def make_hollow(size: str, recipe: str, work: Path) -> Path:
    """Write an output of a size, or of 9B with more layers (`deep`), without its data."""
    folder = work / f"hollow-{size}-{recipe}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = describe_deep(work / "deep") if size == "deep" else describe(f"Qwen3.5-{size}")
    plan = make_plan(source, load_recipe(recipe))
    for file in plan.files:
        with (folder / file.name).open("wb") as out:
            out.write(file.head)
            out.truncate(file.nbytes)
    for name, content in plan.documents.items():
        (folder / name).write_bytes(content)
    shutil.rmtree(work / "deep", ignore_errors=True)
    return folder


MAKERS: dict[str, Callable[..., Path]] = {
    "checkpoint": make_checkpoint,
    "layer": make_layer,
    "imatrix": make_imatrix,
    "windows": make_windows,
    "hollow": make_hollow,
}


def main() -> None:
    kind, *names, work = sys.argv[1:]
    print(MAKERS[kind](*names, Path(work)))


if __name__ == "__main__":
    main()
