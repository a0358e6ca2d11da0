"""A safetensors plan as text of 80 columns, and as JSON."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qwen35.codecs.registry import CODECS
from qwen35.display import size
from qwen35.model.roles import ROLES
from qwen35.planning.memory import peak_memory
from qwen35.planning.output_plan import Plan
from qwen35.planning.refinement import refining_lines
from qwen35.planning.safetensors_files.safetensors_manifest import request_json
from qwen35.planning.step import Step
from qwen35.table import described_lines

__all__ = [
    "packed_text",
    "plan_json",
    "plan_text",
    "roles_json",
    "roles_text",
]


_ROLE_WIDTH = max(len(path.removesuffix(".weight")) for path in ROLES)
_MANY = 4
"""This many shards or more between the first and the last are folded into one line."""


def _groups(steps: Iterable[Step]) -> dict[tuple[str, str], dict[str, list[Step]]]:
    groups: dict[tuple[str, str], dict[str, list[Step]]] = defaultdict(lambda: defaultdict(list))
    for step in steps:
        groups[step.op, step.reason][step.role.name].append(step)
    return groups


def _group_lines(plan: Plan) -> Iterator[str]:
    for (op, reason), roles in _groups(plan.steps).items():
        yield ""
        yield f"{op}: {reason}"
        for role, steps in roles.items():
            before = sum(step.weight.nbytes for step in steps)
            after = sum(step.nbytes for step in steps)
            yield f"  {role:<{_ROLE_WIDTH}} {len(steps):>5} {before:>15,} {after:>15,}"


def plan_text(plan: Plan, threads: int) -> str:
    """Render the plan as text."""
    written = sum(1 for file in plan.files for _ in file.head_tensors)
    sizes = dict(plan.all_sizes())
    total = sum(sizes.values())
    lines = [
        f"{plan.checkpoint.name} -> {plan.recipe.name}: {plan.recipe.description}",
        "",
        f"{'  role':<{_ROLE_WIDTH + 2}} {'count':>5} {'bytes in':>15} {'bytes out':>15}",
        *_group_lines(plan),
        "",
        f"{'file':<48} {'bytes':>29}",
    ]
    lines += [f"{name:<48} {nbytes:>29,}" for name, nbytes in _folded(plan, sizes)]
    lines += [
        f"{'total':<48} {total:>29,}",
        "",
        f"{len(plan.steps)} weights in, {written} tensors out, {packed_text(plan)}",
        f"reads {size(plan.read_bytes)}, writes {size(total)}, "
        f"peak memory about {size(peak_memory(plan, threads))} with {threads} threads",
        *refining_lines(plan),
        *_scale_lines(plan),
        f"plan {plan.digest}",
    ]
    lines += [f"note: {note}" for note in _notes(plan)]
    return "\n".join(lines)


def _scale_lines(plan: Plan) -> Iterator[str]:
    codecs = [CODECS[step.packing] for step in plan.steps if step.packing]
    labels = dict.fromkeys(codec.label for codec in codecs if codec.chooses_scales)
    if plan.settings and labels:
        yield f"{' and '.join(labels)} scales: {plan.settings}"


def packed_text(plan: Plan) -> str:
    """Summarize the packed weights per codec."""
    counts = Counter(CODECS[step.packing].label for step in plan.steps if step.packing)
    return ", ".join(f"{n} weights in {label}" for label, n in counts.items()) or "none packed"


def _folded(plan: Plan, sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield names and sizes of files, with many shards in the middle folded into one."""
    files = list(sizes.items())
    shards = {file.name for file in plan.files}
    between = [row for row in files if row[0] in shards][1:-1]
    if len(between) < _MANY:
        yield from files
        return
    for row in files:
        if row == between[0]:
            yield f"... {len(between)} more", sum(nbytes for _, nbytes in between)
        if row not in between:
            yield row


def plan_json(plan: Plan, threads: int) -> dict[str, Any]:
    """Return the plan as plain values."""
    return {
        "model": plan.checkpoint.name,
        "repo": plan.checkpoint.repo,
        "revision": plan.checkpoint.revision,
        "recipe": plan.recipe.name,
        "format": plan.recipe.format,
        "digest": plan.digest,
        "calibration": request_json(plan)["calibration"],
        "read_bytes": plan.read_bytes,
        "peak_memory": peak_memory(plan, threads),
        "files": dict(plan.all_sizes()),
        "documents": {name: _document(content) for name, content in plan.documents.items()},
        "steps": [
            {
                "weight": step.weight.name,
                "storage": step.weight.storage,
                "dtype": step.spec.dtype,
                "shape": list(step.spec.shape),
                "role": step.role.name,
                "layer": step.role.layer,
                "expert": step.role.expert,
                "op": step.op,
                "reason": step.reason,
                "outputs": [
                    {"name": o.name, "dtype": o.dtype, "shape": list(o.shape), "bytes": o.nbytes}
                    for o in step.outputs
                ],
            }
            for step in plan.steps
        ],
        "notes": list(_notes(plan)),
    }


def _notes(plan: Plan) -> Iterator[str]:
    if plan.checkpoint.place is None:
        yield "sidecars (tokenizer, chat template) are not known here and not counted"
    yield from plan.notes


def _document(content: bytes) -> Any:
    """Return a generated file: parsed if it is JSON, else its text."""
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


def roles_json() -> list[dict[str, Any]]:
    """Return the table of roles as plain values."""
    return [
        {
            "role": path.removesuffix(".weight"),
            "kind": info.kind,
            "shape": list(info.shape),
            "dtype": info.dtype,
            "meaning": info.meaning,
        }
        for path, info in ROLES.items()
    ]


def roles_text(width: int | None = None) -> str:
    """Render the table of roles as text."""
    table: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, info in ROLES.items():  # stacked and separate experts share a name
        table[path.removesuffix(".weight"), info.kind].append(info.meaning)
    rows = [[*names, "; or ".join(meanings)] for names, meanings in table.items()]
    return "\n".join(described_lines(["role", "kind", "meaning"], rows, width))
