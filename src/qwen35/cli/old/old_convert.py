"""Convert a Qwen3.5 f16/bf16 checkpoint into bitsandbytes NF4 (now: qwen35 convert --recipe nf4).

Weights stream from disk one at a time, on the CPU; no GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from qwen35.checkpoint.open import fetch
from qwen35.cli.console import Console
from qwen35.codecs.nf4.config import skip_modules
from qwen35.codecs.registry import is_packed
from qwen35.display import size
from qwen35.errors import ConfigError
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe

ROOTS = ("model.visual", "model.language_model.embed_tokens", "lm_head")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--model", default="unsloth/Qwen3.5-0.8B", help="Hub id or folder (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("./Qwen3.5-0.8B-bnb-4bit"),
        help="folder to write (default: ./%(default)s)",
    )
    parser.add_argument("--low-vram", action="store_true", help="accepted, always on")
    parser.add_argument(
        "--verbose", action="store_true", help="print every skipped or replaced module"
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the command."""
    from qwen35.writing.write import check_before, write

    check_before(args.output, overwrite=args.overwrite, device="cpu")
    output.line(_resources("before load"))
    output.line("⏳ Reading headers (weights stream from disk; none are loaded) …")
    plan = make_plan(fetch(args.model, token=args.hf_token), load_recipe("nf4"))
    if not plan.checkpoint.config.architecture.vision:
        raise ConfigError(
            args.model,
            "a text-only checkpoint",
            expected="a vision-language one",
            hint="use `qwen35 convert MODEL OUT --recipe nf4`",
        )
    output.line(f"✅ Headers read: {len(plan.steps)} tensors, {size(plan.checkpoint.nbytes)}.\n")
    output.line("⏳ Restoring quantized skip layers to full precision …")
    for line in _restored(plan) if args.verbose else ():
        output.line(line)
    output.line(f"   {sum(1 for _ in _restored(plan))} layers restored\n")
    output.line("⏳ Replacing linear layers with BNB Linear4bit …")
    for line in _decisions(plan) if args.verbose else ():
        output.line(line)
    output.line(f"   {sum(step.packing is not None for step in plan.steps)} layers replaced\n")
    output.line("⏳ Quantizing to nf4 on the CPU, layer by layer …")
    write(plan, args.output, overwrite=args.overwrite, progress=_Quantizing(output, args.output))
    for note in plan.notes:
        output.line(f"   note: {note}")
    output.data(f"✅ Done. Saved to: {args.output}", {"out": str(args.output)})
    return 0


class _Quantizing:
    """Progress that begins the next stage when the weights are quantized.

    They stream into a folder beside the output; saving adds the other files and renames it.
    """

    def __init__(self, output: Console, out: Path) -> None:
        self._output, self._out = output, out
        self._progress = output.progress()
        self._lock = Lock()
        self._left = 0

    def begin(self, title: str, total: int) -> None:
        """Begin."""
        self._left = total
        self._progress.begin(title, total)

    def advance(self, amount: int, item: str) -> None:
        """Count what is left; called by several threads."""
        self._progress.advance(amount, item)
        with self._lock:
            self._left -= amount

    def end(self) -> None:
        """Announce the next stage, unless the weights failed."""
        self._progress.end()
        if self._left:
            return
        self._output.line("✅ Model quantized; no GPU was used.\n")
        self._output.line(_resources("after quantize"))
        self._output.line(f"💾 Saving to '{self._out}' …")


def _restored(plan: Plan) -> Iterator[str]:
    for step in plan.steps:
        if is_packed(step.weight) and step.packing is None:
            yield f"   └── restored     {step.weight.name.removesuffix('.weight')}"


def _decisions(plan: Plan) -> Iterator[str]:
    skipped = skip_modules(plan.written, plan.checkpoint.layout.prefix)
    for root in [*ROOTS, *(name for name in skipped if name not in ROOTS)]:
        yield f"   └── skipped      {root}"
    for step in plan.steps:
        if step.packing is not None:
            yield f"   └── replaced     {step.weight.name.removesuffix('.weight')}"


def _resources(when: str) -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (os.sysconf(name) * page / 1e9 for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    return (
        f"GPU : none used  |  RAM : {free:.1f} GB free / {total:.1f} GB total  |  "
        f"disk : {disk:.1f} GB free  [{when}]"
    )
