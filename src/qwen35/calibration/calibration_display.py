"""A calibration's plan and expert coverage, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen35.calibration.calibration_plan import CalibrationPlan
from qwen35.calibration.hessian_inputs import OWN_TOKENS
from qwen35.calibration.hessian_plan import HessianPlan
from qwen35.display import size

if TYPE_CHECKING:
    from qwen35.calibration.draft_acceptance import DraftAcceptance

__all__ = ["coverage_text", "draft_text", "plan_json", "plan_text"]

_SHOWN = 12
"""Most experts named per line."""


def plan_text(plan: CalibrationPlan) -> str:
    """Return the plan as text."""
    text, workers, at_once = plan.text, plan.request.workers, plan.sizes.at_once
    batches = "per batch" if at_once == 1 else f"for {at_once} batches at a time"
    rows = [
        ("text", f"{len(text.windows)} chunks of {text.context} tokens, {text.left_over} unused"),
        ("compute", f"{plan.dtype}, batches of {plan.batch}, {len(plan.blocks)} blocks"),
        *_apart_rows(plan),
        ("read", size(plan.read_bytes) + (" by each worker" if workers > 1 else "")),
        ("memory", f"{size(plan.peak_bytes)}, plus Python and its libraries:"),
        *([("", f"{workers} times")] if workers > 1 else []),
        ("", f"{size(plan.layer_bytes)} for the largest layer, {size(plan.batch_bytes)} {batches}"),
        *_hessian_rows(plan),
        ("disk", f"at most {size(plan.disk_bytes)} until the output is complete:"),
        ("", f"twice {size(plan.hidden_bytes)} of hidden states, sums, output"),
        ("files", ", ".join(plan.file_names)),
    ]
    return "\n".join(f"{name:<9}{value}" for name, value in rows)


def _hessian_rows(plan: CalibrationPlan) -> list[tuple[str, str]]:
    hessians = plan.hessians
    if hessians is None:
        return []
    least = hessians.fit_tokens / hessians.widest
    few = "" if least >= OWN_TOKENS else f"; fewer than {OWN_TOKENS} may be too few"
    return [
        ("", f"{size(hessians.nbytes)} for Hessians"),
        ("hessians", f"at most {size(hessians.disk_bytes())} of the disk space"),
        ("", f"{hessians.fit_tokens:,} tokens to fit to, every fifth chunk held out"),
        ("", f"{least:.1f} tokens for each column of the widest input{few}"),
    ]


def _apart_rows(plan: CalibrationPlan) -> list[tuple[str, str]]:
    if not plan.sizes.wide:
        return []
    return [("", f"experts are read one by one, for {plan.sizes.wide} chunks at a time")]


def plan_json(plan: CalibrationPlan) -> Mapping[str, Any]:
    """Return the plan as plain values for JSON."""
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
        **({} if plan.hessians is None else _hessian_json(plan.hessians)),
        "read_bytes": plan.read_bytes,
        "files": list(plan.file_names),
    }


def _hessian_json(hessians: HessianPlan) -> dict[str, Any]:
    return {
        "hessian_bytes": hessians.nbytes,
        "hessian_disk_bytes": hessians.disk_bytes(),
        "fit_tokens": hessians.fit_tokens,
        "widest_input": hessians.widest,
    }


def draft_text(draft: DraftAcceptance) -> str:
    """Return the acceptance of drafted tokens in a line."""
    return (
        f"the MTP layer: {draft.accepted:,} of {draft.tokens:,} drafted tokens are the model's own "
        f"choice ({draft.rate:.1%})"
    )


def coverage_text(coverage: Mapping[str, Any]) -> list[str]:
    """Return a line per layer: tokens its experts saw, and the experts below the floor."""
    lines = []
    for layer, tokens in coverage.get("tokens", {}).items():
        ordered = sorted(tokens)
        line = f"{layer}: {len(tokens)} experts saw {ordered[0]} to {ordered[-1]} tokens"
        line += f", half of them {ordered[len(ordered) // 2]} or more"
        few = coverage["below_floor"].get(layer, [])
        if few:
            shown = ", ".join(map(str, few[:_SHOWN]))
            more = f" and {len(few) - _SHOWN} more" if len(few) > _SHOWN else ""
            line += f"; fewer than {coverage['floor']}: {shown}{more}"
        lines.append(line)
    return lines
