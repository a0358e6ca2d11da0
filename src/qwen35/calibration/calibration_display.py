"""A calibration's plan and what it reached, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.display import size

__all__ = ["coverage_text", "plan_json", "plan_text"]

_SHOWN = 12


def plan_text(plan: CalibrationPlan) -> str:
    """Return the plan as lines."""
    text = plan.text
    rows = [
        ("text", f"{len(text.windows)} windows of {text.context} tokens, {text.left_over} left"),
        ("compute", f"{plan.dtype}, {plan.batch} windows at once, {len(plan.blocks)} blocks"),
        ("read", size(plan.read_bytes)),
        ("memory", f"{size(plan.peak_bytes)} beside Python and its libraries:"),
        ("", f"{size(plan.layer_bytes)} the largest layer, {size(plan.batch_bytes)} a batch"),
        ("disk", f"{size(plan.disk_bytes)} at most, beside the output until it is done:"),
        ("", f"twice {size(plan.hidden_bytes)} of hidden states, sums, files"),
        ("files", ", ".join(plan.file_names)),
    ]
    return "\n".join(f"{name:<9}{value}" for name, value in rows)


def plan_json(plan: CalibrationPlan) -> Mapping[str, Any]:
    """Return the plan as plain values."""
    return {
        **plan.provenance,
        "windows": len(plan.text.windows),
        "left_over": plan.text.left_over,
        "blocks": len(plan.blocks),
        "batch": plan.batch,
        "layer_bytes": plan.layer_bytes,
        "batch_bytes": plan.batch_bytes,
        "peak_bytes": plan.peak_bytes,
        "hidden_bytes": plan.hidden_bytes,
        "disk_bytes": plan.disk_bytes,
        "read_bytes": plan.read_bytes,
        "files": list(plan.file_names),
    }


def coverage_text(coverage: Mapping[str, Any]) -> list[str]:
    """Return a line on each layer's experts: tokens seen, and who saw too few."""
    lines = []
    for place, tokens in coverage.get("tokens", {}).items():
        ordered = sorted(tokens)
        line = f"{place}: {len(tokens)} experts saw {ordered[0]} to {ordered[-1]} tokens"
        line += f", half of them {ordered[len(ordered) // 2]} or more"
        few = coverage["below_floor"].get(place, [])
        if few:
            shown = ", ".join(map(str, few[:_SHOWN]))
            more = f" and {len(few) - _SHOWN} more" if len(few) > _SHOWN else ""
            line += f"; fewer than {coverage['floor']}: {shown}{more}"
        lines.append(line)
    return lines
