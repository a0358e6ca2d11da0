"""Compare the streamed pass with a forward pass of the model loaded whole.

    python -m benchmarks.forward [--work DIR] [--size 0.8B|tiny] [--rounds 3] [--windows 4]

Makes a random checkpoint with real shapes and measures processes, in turn: our pass, a layer at a
time with hidden states in files, and transformers with the model in memory. Both compute in
float32 over the same windows of 512 tokens, with logits of the second half of each, as `qwen35
evaluate` does. A further candidate is what `evaluate --streamed` takes for one candidate more,
its divergence included. Formats whose inputs servers quantize would be run twice; these are not.
Start-up is measured on one window of the embedded checkpoint, and subtracted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.measuring import (
    ASSET,
    QWEN35,
    ROOT,
    Comparison,
    Cost,
    arguments,
    made,
    measure,
    report,
)

STREAMED = """
import sys, tempfile
from pathlib import Path
import numpy as np
import torch
from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Reader, open_folder
from qwen35.forward.batch_size import pass_sizes
from qwen35.forward.blocks import MTP, blocks
from qwen35.forward.builder import Builder
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.forward.forward_stream import ForwardStream, Track
from qwen35.forward.head import Head
from qwen35.forward.stream_folder import StreamFolder
from qwen35.progress import Silent
torch.set_num_threads(int(sys.argv[4]))
windows = np.load(sys.argv[2])[: int(sys.argv[3])]
checkpoint, items = take(open_folder(Path(sys.argv[1])), tower=False)
parts = [block for block in blocks(items) if block.name != MTP]
count, length = windows.shape
sizes = pass_sizes(parts, checkpoint.config, length=length, count=count, itemsize=4, memory=None)
sizes = sizes.side_by_side(torch.get_num_threads(), count, None)
with Reader(checkpoint) as reader, tempfile.TemporaryDirectory() as folder:
    builder = Builder(StoredWeights(reader, checkpoint.config, items), "float32", "cpu")
    head = Head(builder)
    if sys.argv[5] == "decode":
        for block in parts:
            builder.build(block)
        for _ in head.pieces():
            pass
    else:
        with StreamFolder(Path(folder) / "work", "", restart=True) as work:
            stream = ForwardStream(builder, parts, windows, sizes, work, Silent())
            stream.run()
            with torch.inference_mode():
                for start, ids in stream.batches():
                    states = stream.load(Track().file(stream.current), start, len(ids))
                    head.logits(states[:, length // 2 :].flatten(0, 1))
"""
WHOLE = """
import sys
import numpy as np
import torch, transformers
transformers.logging.disable_progress_bar()
torch.set_num_threads(int(sys.argv[4]))
kind = transformers.AutoModelForImageTextToText
model = kind.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
windows = np.load(sys.argv[2])[: int(sys.argv[3])]
with torch.inference_mode():
    for window in windows:
        ids = torch.from_numpy(window)[None].long()
        model(input_ids=ids, use_cache=False, logits_to_keep=len(window) // 2)
"""
OURS, ONE = "the streamed pass", "the streamed pass, one thread"
THEIRS = "forward pass of the model in transformers, float32"
FURTHER, EXPECTED = "a further candidate, nf4", "the streamed pass, and decoding nf4"
COMPARISONS = (
    Comparison(OURS, THEIRS, ("cpu", "memory")),
    Comparison(OURS, ONE, ("wall",)),
    Comparison(FURTHER, EXPECTED, ("cpu",)),
)


class Routes:
    """The processes to measure.

    Args:
        source: the checkpoint.
        packed: two candidates made from it.
        saved: the windows.
        count: how many of them.
        threads: of torch.
    """

    def __init__(
        self, source: Path, packed: tuple[Path, Path], saved: Path, count: int, threads: int
    ) -> None:
        self._source, self._packed, self._saved = source, packed, saved
        self._count, self._threads = count, threads

    def once(self) -> dict[str, Cost]:
        """Measure every route once."""
        threads = self._threads
        start, small = self._ours(ASSET, 1, threads), self._theirs(ASSET, 1)
        costs = {
            OURS: self._ours(self._source, self._count, threads).beyond(start),
            THEIRS: self._theirs(self._source, self._count).beyond(small),
            ONE: self._ours(self._source, self._count, 1).beyond(start),
        }
        two, one = self._evaluated(self._packed), self._evaluated(self._packed[:1])
        decoded = self._ours(self._packed[1], self._count, threads, "decode").beyond(start)
        costs[FURTHER] = two.beyond(one)
        costs[EXPECTED] = costs[OURS].then(decoded)
        return costs

    def _ours(self, model: Path, count: int, threads: int, what: str = "forward") -> Cost:
        return self._python(STREAMED, model, count, threads, what)

    def _theirs(self, model: Path, count: int) -> Cost:
        return self._python(WHOLE, model, count, self._threads)

    def _python(self, code: str, model: Path, count: int, threads: int, *more: str) -> Cost:
        command = [sys.executable, "-c", code, model, self._saved, count, threads, *more]
        return measure(command, None, _environment(threads))

    def _evaluated(self, candidates: tuple[Path, ...]) -> Cost:
        given = ("--text", ASSET / "eval.txt", "--context", 512, "--chunks", self._count)
        command = [*QWEN35, "evaluate", self._source, *candidates, *given, "--streamed", "--quiet"]
        command += ["--threads", self._threads]
        return measure(command, None, _environment(self._threads))


def _environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


def packed(source: Path, recipe: str, work: Path) -> Path:
    """Return an output of a recipe; what exists is kept."""
    out = work / f"{source.name}-{recipe}"
    if not out.exists():
        command = [*QWEN35, "convert", source, out, "--recipe", recipe, "--quiet"]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
    return out


def main() -> None:
    args = arguments(__doc__, windows={"type": int, "default": 4})
    source = made("checkpoint", args.size, args.work)
    saved = made("windows", args.size, args.work)
    both = packed(source, "int4", args.work), packed(source, "nf4", args.work)
    routes = Routes(source, both, saved, args.windows, args.threads)
    title = f"Streamed pass, {source.name}, {args.windows} windows, {args.threads} threads"
    report(args, title, routes.once, COMPARISONS)


if __name__ == "__main__":
    main()
