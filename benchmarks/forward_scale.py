"""Compute what the streamed pass takes at published sizes: reads, time, memory and disk.

    python -m benchmarks.forward_scale [--sizes Qwen3.5-27B Qwen3.5-397B-A17B] [--windows 128]
        [--processors 16] [--bf16 160] [--float32 90] [--read 1.25] [--types 5]

Nothing is run. Sizes follow from headers, as in the plans of the verbs. Rates: `--bf16` and
`--float32` are 1e9 operations per second of processor time (docs/benchmarks.md: 2.0e12 operations
of `calibrate`, and 2.6e12 of the streamed pass, divided by their CPU seconds beyond start-up);
`--read` is GB/s from the files, an assumption. The next layer is not read meanwhile, so times add
up. Prices also encode every weight in `--types` types, at ENCODED weights a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.open import describe
from qwen35.checkpoint.reconciled import take
from qwen35.forward.batch_size import pass_sizes
from qwen35.forward.blocks import HEAD, MTP, blocks
from qwen35.model.model_config import ModelConfig

CONTEXT = 512
BACKWARD = 4
"""Work of both passes of prices in forward passes: forward, again, and twice as much back."""

ENCODED = 1e7
"""Weights of one k-quant that a processor encodes and compares in a second (docs/tune.md)."""


@dataclass(frozen=True)
class Size:
    """A published size.

    Args:
        name: of it.
        nbytes: of the text model's layers, and of the head, in bf16.
        active: weights of the layers that a token is multiplied with.
        head: weights of the head.
        layers: their number.
        hidden: width of the states.
        memory: bytes of the pass, by bytes of a number.
    """

    name: str
    nbytes: int
    active: int
    head: int
    layers: int
    hidden: int
    memory: dict[int, int]


def size_of(name: str, windows: int, processors: int) -> Size:
    """Return what follows from the headers of a size."""
    checkpoint, items = take(describe(name), tower=False)
    config, parts = checkpoint.config, blocks(items)
    parts = [block for block in parts if block.name != MTP]
    memory = {}
    for itemsize in (2, 4):
        sizes = pass_sizes(
            parts, config, length=CONTEXT, count=windows, itemsize=itemsize, memory=None
        )
        memory[itemsize] = sizes.side_by_side(processors, windows, None).nbytes
    active = sum(_active(config, block.items) for block in parts)
    head = config.dims["vocab"] * config.dims["hidden"]
    layers = sum(block.name != HEAD for block in parts)
    nbytes = sum(block.nbytes for block in parts) + 2 * head
    return Size(name, nbytes, active, head, layers, config.dims["hidden"], memory)


def _active(config: ModelConfig, items: Sequence[InventoryItem]) -> int:
    share = 1.0
    if config.moe:
        share = config.text_raw["num_experts_per_tok"] / config.dims["experts"]
    shares = (share if item.role.info.kind == "experts" else 1 for item in items)
    return int(sum(s * item.spec.numel for s, item in zip(shares, items, strict=True)))


def rows(one: Size, args: argparse.Namespace) -> Iterator[tuple[str, int, float, int, int]]:
    """Yield (what, bytes read, seconds, bytes of memory, bytes on disk)."""
    tokens = args.windows * CONTEXT
    work, scored = 2 * one.active * tokens, 2 * one.head * tokens // 2
    states = tokens * one.hidden
    bf16, float32 = (args.processors * rate * 1e9 for rate in (args.bf16, args.float32))
    layers = one.nbytes - 2 * one.head

    def seconds(reads: int, busy: float) -> float:
        return float(reads / (args.read * 1e9)) + busy

    yield "calibrate", layers, seconds(layers, work / bf16), one.memory[2], 2 * 2 * states
    shared = seconds(layers, work / bf16 / 8)
    yield "calibrate --workers 8", 8 * layers, shared, one.memory[2], 2 * 2 * states
    evaluate = 2 * (work + scored) / float32
    reads = 2 * one.nbytes
    yield "evaluate, one candidate", reads, seconds(reads, evaluate), one.memory[4], 4 * 4 * states
    prices = (BACKWARD * work + 2 * scored) / float32
    encoded = args.types * one.nbytes / 2 / ENCODED / args.processors
    disk = 4 * states * (one.layers + 3)
    for name, share in (("tune", 1), ("tune --sample 8", 8)):
        busy = prices + encoded / share
        yield name, reads, seconds(reads, busy), one.memory[4], disk


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["Qwen3.5-27B", "Qwen3.5-397B-A17B"])
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--processors", type=int, default=16, help="of each machine")
    parser.add_argument("--bf16", type=float, default=160)
    parser.add_argument("--float32", type=float, default=90)
    parser.add_argument("--read", type=float, default=1.25)
    parser.add_argument("--types", type=int, default=5)
    args = parser.parse_args()
    print("| | | reads | time | memory | disk |\n|---|---|---|---|---|---|")
    for name in args.sizes:
        one = size_of(name, args.windows, args.processors)
        for what, reads, seconds, memory, disk in rows(one, args):
            figures = f"{reads / 1e9:,.0f} GB | {seconds / 60:,.0f} min | {memory / 1e9:.1f} GB"
            print(f"| {name.removeprefix('Qwen3.5-')} | {what} | {figures} | {disk / 1e9:.1f} GB |")


if __name__ == "__main__":
    main()
