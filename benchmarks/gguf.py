"""Compare one pass to GGUF with an F16 file and llama_model_quantize, in one run.

    python benchmarks/gguf.py [--work DIR] [--size 0.8B] [--runs 3] [--no-imatrix]

Makes a random checkpoint with real shapes with a random importance matrix and measures processes:
`qwen35 gguf` for four types at once; the same for F16 alone, then llama_model_quantize on that file
for each type; one type alone, by our kernels, by one thread of them and by `--encoder ggml`; `cp`
of the source. A first run, not counted, compiles our kernels. CPU time and peak memory are the
operating system's figures for the whole process; start-up is measured separately and subtracted
where the table says so. Only ratios within one run are meaningful; the range over rounds is shown
beside each ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if sys.path[0] != str(ROOT):  # files in this folder would shadow libraries
    sys.path[0] = str(ROOT)

from benchmarks.nf4 import SHARD, Cost, make_checkpoint, measure, median
from gguf import GGUFWriter

from qwen35.checkpoint.source import open_folder
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.gguf_files.mixes import FILE_TYPES, quantizable
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe

ASSET = ROOT / "assets" / "qwen3.5-tiny"
TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
QUANTIZE = """
import ctypes, sys
import llama_cpp
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
if sys.argv[1:]:
    source, target, code, threads, imatrix = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(code), int(threads)
    alive = []
    if imatrix:
        from pathlib import Path
        import numpy as np
        from qwen35.planning.gguf_files.imatrix import read_imatrix
        entries = read_imatrix(Path(imatrix)).entries
        array = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))()
        for slot, (name, entry) in zip(array, entries.items()):
            values = entry.values
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            alive.append(values)
        params.imatrix = array
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), params) == 0
"""


def prepare(size: str, work: Path) -> tuple[Path, Path]:
    """Write the checkpoint, with the embedded one's tokenizer, and an importance matrix."""
    source = make_checkpoint(size, work)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ASSET / name, source / name)
    path = work / f"{size}.imatrix.gguf"
    if path.exists():
        return source, path
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("F32",))
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
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
    return source, path


def ours(source: Path, out: Path, types: str, threads: int, *more: str) -> list[str]:
    """Return the command for `qwen35 gguf`."""
    command = [sys.executable, "-m", "qwen35.cli.main", "gguf", str(source), str(out), "--quiet"]
    return [*command, "--types", types, "--threads", str(threads), *more]


def theirs(f16: Path, out: Path, code: int, threads: int, imatrix: str) -> list[str]:
    """Return the command for llama_model_quantize."""
    return [sys.executable, "-c", QUANTIZE, str(f16), str(out), str(code), str(threads), imatrix]


def total(costs: list[Cost]) -> Cost:
    """Return the total cost of consecutive processes."""
    return Cost(
        sum(cost.wall for cost in costs),
        sum(cost.cpu for cost in costs),
        max(cost.memory for cost in costs),
    )


def once(source: Path, work: Path, imatrix: str, threads: int) -> dict[str, Cost]:
    """Measure every route once."""
    more = ("--imatrix", imatrix) if imatrix else ()
    many, half, single = work / "many", work / "half", work / "single"
    costs = {
        "cp of the source": measure(["cp", str(source / SHARD), str(work / "copy")], work / "copy")
    }
    costs["four types in one pass"] = measure(
        ours(source, many, ",".join(TYPES), threads, *more), many
    )
    f16 = measure(ours(source, half, "F16", threads), half)
    (file,) = half.glob("*.gguf")
    quantized = {
        kind: measure(
            theirs(file, work / "theirs.gguf", FILE_TYPES[kind].code, threads, imatrix),
            work / "theirs.gguf",
        )
        for kind in TYPES
    }
    costs["F16 + llama_model_quantize x 4"] = total([f16, *quantized.values()])
    costs["F16 alone"] = f16
    costs |= {f"llama_model_quantize {kind}": cost for kind, cost in quantized.items()}
    for kind in ("Q4_K_M", "Q6_K"):
        costs[f"{kind} alone"] = measure(ours(source, single, kind, threads, *more), single)
    costs["Q4_K_M alone, one thread"] = measure(ours(source, single, "Q4_K_M", 1, *more), single)
    forced = (*more, "--encoder", "ggml")
    costs["Q4_K_M alone, --encoder ggml"] = measure(
        ours(source, single, "Q4_K_M", threads, *forced), single
    )
    nothing = [*ours(source, work / "none", "Q4_K_M", threads, *more), "--dry-run"]
    costs["start-up of qwen35 gguf"] = measure(nothing, work / "none")
    costs["start-up of llama_cpp"] = measure([sys.executable, "-c", QUANTIZE], work / "none")
    return costs


def ratios(costs: dict[str, Cost]) -> dict[str, float]:
    """Return the published figures."""
    many, chain = costs["four types in one pass"], costs["F16 + llama_model_quantize x 4"]
    own, other = costs["start-up of qwen35 gguf"].cpu, costs["start-up of llama_cpp"].cpu
    found = {
        "wall, one pass / F16 and four quantizations": many.wall / chain.wall,
        "CPU, one pass / F16 and four quantizations": many.cpu / chain.cpu,
        "CPU / wall of the pass (processors busy)": many.cpu / many.wall,
        "wall, one pass / cp": many.wall / costs["cp of the source"].wall,
        "wall, Q4_K_M by one thread / by all": costs["Q4_K_M alone, one thread"].wall
        / costs["Q4_K_M alone"].wall,
        "peak memory, our kernels / --encoder ggml": costs["Q4_K_M alone"].memory
        / costs["Q4_K_M alone, --encoder ggml"].memory,
    }
    for kind in ("Q4_K_M", "Q6_K"):
        whole = costs[f"llama_model_quantize {kind}"].cpu
        found[f"CPU, {kind} / llama_model_quantize"] = costs[f"{kind} alone"].cpu / whole
        mine = costs[f"{kind} alone"].cpu - own
        found[f"CPU beyond start-up, {kind} / llama_model_quantize"] = mine / (whole - other)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--size", default="0.8B")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-imatrix", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source, imatrix = prepare(args.size, args.work)
    given = "" if args.no_imatrix else str(imatrix)
    measure(ours(ASSET, args.work / "many", ",".join(TYPES), 1), args.work / "many")
    rounds = [once(source, args.work, given, args.threads) for _ in range(args.runs)]
    costs = {name: median([one[name] for one in rounds]) for name in rounds[0]}
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    nbytes = (source / SHARD).stat().st_size
    print(f"Qwen3.5-{args.size}, {nbytes / 1e9:.2f} GB of bf16, {args.runs} runs")
    print(f"{'median of the runs':<40} {'wall s':>8} {'CPU s':>8} {'peak MB':>9}")
    for name, cost in costs.items():
        print(f"{name:<40} {cost.wall:>8.2f} {cost.cpu:>8.2f} {cost.memory:>9.0f}")
    found = [ratios(one) for one in rounds]
    for name, value in ratios(costs).items():
        each = [one[name] for one in found]
        print(f"{name:<56} {value:>8.3f}  ({min(each):.3f} to {max(each):.3f})")
    (args.work / "gguf.json").write_text(json.dumps({n: vars(c) for n, c in costs.items()}))


if __name__ == "__main__":
    main()
