"""A GGUF plan as text and as JSON."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.display import size
from qwen35.planning.gguf_files.gguf_plan import GgufFile, files_of
from qwen35.planning.memory import peak_memory
from qwen35.planning.output_plan import Plan
from qwen35.planning.refinement import refining_lines
from qwen35.table import table_lines

__all__ = ["plan_json", "plan_text"]

_WIDTH = 80
"""Maximum width of the recipe comparison."""


def _ranges(numbers: Sequence[int]) -> str:
    """Format sorted numbers as ranges.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _file_lines(file: GgufFile) -> Iterator[str]:
    yield ""
    yield f"{file.name:<58} {file.nbytes:>21,}"
    rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for part in (part for tensor in file.tensors for part in file.parts(tensor)):
        name = re.sub(r"blk\.\d+\.", "blk.N.", part.name)
        block = re.search(r"blk\.(\d+)\.", part.name)
        rows[name][part.dtype].append(int(block[1]) if block else -1)
    for name, kinds in rows.items():
        if len(kinds) == 1:
            (kind,) = kinds
            count = len(kinds[kind])
            yield f"  {name:<40} {kind:<8} {count if count > 1 else ''}".rstrip()
            continue
        for kind, blocks in kinds.items():
            yield f"  {name:<40} {kind:<8} N = {_ranges(sorted(blocks))}"


def _comparison_lines(plan: Plan) -> Iterator[str]:
    named = (file.file_type.name for file in files_of(plan) if file.quantized)
    types = list(dict.fromkeys(named))  # a split model has several files
    if not types:
        return
    rows = [
        [
            recipe + (" *" if recipe == plan.recipe.name else ""),
            *(f"{sizes[name]:,}" if name in sizes else "does not fit" for name in types),
        ]
        for recipe, sizes in plan.comparison.items()
    ]
    yield ""
    yield from table_lines(["file sizes by recipe", *types], rows, _WIDTH)


def plan_text(plan: Plan, threads: int) -> str:
    """Render the plan as text."""
    recipe = plan.recipe
    lines = [f"{plan.checkpoint.name} -> GGUF, {recipe.name}: {recipe.description}"]
    if plan.options.adapter_only:  # type: ignore[attr-defined]
        (adapter,) = plan.checkpoint.adapters
        lines = [f"the adapter {adapter.title} of {plan.checkpoint.name} -> GGUF"]
    for file in files_of(plan):
        lines += _file_lines(file)
    sizes = dict(plan.all_sizes())
    total = sum(sizes.values())
    lines += ["", f"{MANIFEST_NAME:<58} {sizes[MANIFEST_NAME]:>21,}", f"{'total':<58} {total:>21,}"]
    lines += _comparison_lines(plan)
    lines += [
        "",
        f"reads {size(plan.read_bytes)} once, writes {size(total)}, "
        f"peak memory about {size(peak_memory(plan, threads))} with {threads} threads",
        *refining_lines(plan),
        f"plan {plan.digest}",
    ]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def plan_json(plan: Plan, threads: int) -> dict[str, Any]:
    """Return the plan as plain values."""
    return {
        "model": plan.checkpoint.name,
        "repo": plan.checkpoint.repo,
        "revision": plan.checkpoint.revision,
        "recipe": plan.recipe.name,
        "format": plan.recipe.format,
        "digest": plan.digest,
        "read_bytes": plan.read_bytes,
        "peak_memory": peak_memory(plan, threads),
        "files": dict(plan.all_sizes()),
        "tensors": {
            file.name: [
                {
                    "name": part.name,
                    "type": part.dtype,
                    "shape": list(part.shape),
                    "bytes": part.nbytes,
                    "sources": [slab.item.weight.name for slab in tensor.rows.slabs],
                }
                for tensor in file.tensors
                for part in file.parts(tensor)
            ]
            for file in files_of(plan)
        },
        "comparison": {recipe: dict(sizes) for recipe, sizes in plan.comparison.items()},
        "notes": list(plan.notes),
    }
