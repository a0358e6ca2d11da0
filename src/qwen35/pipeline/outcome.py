"""What became of a step, and of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen35.pipeline.graph import Gate, GraphStep
from qwen35.pipeline.run_request import RunRequest

__all__ = ["Outcome", "Status", "outcome_text", "outcomes_json", "outcomes_text", "passed"]

Status = Literal["done", "kept", "closed", "stopped", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Args:
        step: which.
        state: ``done``; ``kept``, as it was up to date; ``closed``: its gate is closed; ``stopped``
            by a closed gate before it; ``skipped``, as nobody asked for it.
        gate: that is closed.
        reasons: why it is not done.
        facts: what is worth knowing of it, as plain values.
    """

    step: GraphStep
    state: Status
    gate: Gate | None = None
    reasons: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blame(self) -> str:
        """What to say of it as the reason why another step is stopped."""
        if self.gate:
            return f"the {self.gate} gate of {self.step.artifact.name} is closed"
        return f"{self.step.name} is not done"

    @property
    def open(self) -> bool:
        """Whether what needs the step may go on."""
        return self.state in ("done", "kept")


def outcome_text(outcome: Outcome) -> str:
    """Say what became of a step, in a line."""
    if outcome.state == "closed" and outcome.gate:
        first = outcome.reasons[0] if outcome.reasons else ""
        more = f" (and {len(outcome.reasons) - 1} more)" if len(outcome.reasons) > 1 else ""
        return f"{outcome.gate} gate CLOSED: {first}{more}"
    words = {"done": "done", "kept": "up to date", "closed": "FAILED"}
    text = words.get(outcome.state, outcome.state)
    return f"{text}: {'; '.join(outcome.reasons)}" if outcome.reasons else text


def outcomes_json(job: RunRequest, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what became of a run as plain values."""
    return {
        "out": str(job.out),
        "passed": passed(outcomes),
        "steps": [
            {
                "step": outcome.step.name,
                "state": outcome.state,
                "gate": outcome.gate,
                "reasons": list(outcome.reasons),
                **dict(outcome.facts),
            }
            for outcome in outcomes
        ],
    }


def passed(outcomes: Sequence[Outcome]) -> bool:
    """Whether no gate is closed."""
    return all(outcome.state not in ("closed", "stopped") for outcome in outcomes)


def outcomes_text(outcomes: Sequence[Outcome]) -> str:
    """Return what became of a run for people."""
    width = max(len(outcome.step.name) for outcome in outcomes)
    lines: list[str] = []
    for outcome in outcomes:
        lines.append(f"{outcome.step.name:<{width}}  {outcome_text(outcome)}")
        if outcome.state == "closed":
            lines += [f"{'':<{width}}  - {reason}" for reason in outcome.reasons[1:]]
        facts: Mapping[str, Any] = outcome.facts
        if outcome.open and "commit" in facts:
            lines.append(f"{'':<{width}}  {facts['repo']}@{facts['commit'][:12]}")
    closed = [outcome for outcome in outcomes if outcome.state == "closed"]
    lines.append("")
    if closed:
        lines.append(f"{len(closed)} closed: what passed is kept, run again when it is mended")
    else:
        lines.append("all gates open")
    return "\n".join(lines)
