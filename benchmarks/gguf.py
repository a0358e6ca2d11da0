"""Compare `qwen35 gguf` with an F16 file and llama_model_quantize.

    python -m benchmarks.gguf [--work DIR] [--size 0.8B|tiny] [--rounds 3]

Makes a random checkpoint with real shapes and a random importance matrix, and measures processes,
in turn: `qwen35 gguf` for four types in one pass; the same for F16 alone, then llama_model_quantize
on that file for each type; Q4_K_M alone by both, with and without the importance matrix, by one
thread of ours, and by our pass with ggml's encoder; `cp` of the source. CPU time and peak memory
are the operating system's, for the whole process.
"""

from __future__ import annotations

import shutil
import sys
from functools import reduce
from pathlib import Path

from benchmarks.measuring import (
    ASSET,
    QWEN35,
    Comparison,
    Cost,
    arguments,
    made,
    measure,
    remove,
    report,
    weights,
)

TYPES = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
QUANTIZE = """
import ctypes, sys
import llama_cpp
from qwen35.planning.gguf_files.mixes import FILE_TYPES
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
source, target, kind, threads, imatrix = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = FILE_TYPES[kind].code, int(threads)
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
MANY, CHAIN = (
    f"`gguf --types {','.join(TYPES)}`",
    "our F16 file, then `llama_model_quantize` four times",
)
OURS, THEIRS = "`gguf --types Q4_K_M`", "`llama_model_quantize` of an F16 file to Q4_K_M"
PLAIN = ", no importance matrix"
ONE, FORCED = f"{OURS}, one thread", "`gguf --types Q4_K_M --encoder ggml`"
COPY = "`cp` of the source's weights"
COMPARISONS = (
    Comparison(MANY, CHAIN, headline=True),
    Comparison(OURS, THEIRS, headline=True),
    Comparison(OURS + PLAIN, THEIRS + PLAIN),
    Comparison(OURS, FORCED),
    Comparison(OURS, ONE, ("wall",)),
    Comparison(MANY, COPY, ("wall", "cpu")),
)


def ours(source: Path, out: Path, types: str, threads: int, *more: object) -> list[object]:
    """Return the command for `qwen35 gguf`."""
    given = ("--types", types, "--threads", threads, "--quiet", *more)
    return [*QWEN35, "gguf", source, out, *given]


def once(source: Path, imatrix: Path, work: Path, threads: int) -> dict[str, Cost]:
    """Measure every route once."""
    many, half, single, copy = (work / name for name in ("many", "half", "single", "copy"))
    quantized, matrix = work / "theirs.gguf", ("--imatrix", imatrix)
    copy.mkdir(exist_ok=True)

    def theirs(kind: str, given: object) -> Cost:
        (f16,) = half.glob("*.gguf")
        command = [sys.executable, "-c", QUANTIZE, f16, quantized, kind, threads, given]
        return measure(command, quantized)

    def alone(threads: int, *more: object) -> Cost:
        return measure(ours(source, single, "Q4_K_M", threads, *more), single)

    tiny = ours(ASSET, many, ",".join(TYPES), threads)
    costs = {"`gguf` of the embedded checkpoint, four types": measure(tiny, many)}
    costs[COPY] = measure(["cp", *weights(source), copy])
    costs[MANY] = measure(ours(source, many, ",".join(TYPES), threads, *matrix), many)
    costs["`gguf --types F16`"] = measure(ours(source, half, "F16", threads), half)
    each = [theirs(kind, imatrix) for kind in TYPES]
    costs[CHAIN] = reduce(Cost.then, each, costs["`gguf --types F16`"])
    costs[THEIRS] = each[0]
    costs[OURS] = alone(threads, *matrix)
    costs[ONE] = alone(1, *matrix)
    costs[FORCED] = alone(threads, *matrix, "--encoder", "ggml")
    costs[OURS + PLAIN] = alone(threads)
    costs[THEIRS + PLAIN] = theirs("Q4_K_M", "")
    for path in (many, half, single, copy, quantized):
        remove(path)
    return costs


def main() -> None:
    args = arguments(__doc__)
    source = made("checkpoint", args.size, args.work)
    imatrix = made("imatrix", args.size, args.work)
    warm = args.work / "many"
    measure(ours(ASSET, warm, ",".join(TYPES), 1, "--imatrix", made("imatrix", "tiny", args.work)))
    shutil.rmtree(warm)
    measure(["cat", *weights(source)])
    title = f"GGUF with an importance matrix, {source.name}, {args.threads} threads"
    report(args, title, lambda: once(source, imatrix, args.work, args.threads), COMPARISONS)


if __name__ == "__main__":
    main()
