"""Outcomes of steps, and of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen35.pipeline.graph import Gate, GraphStep
from qwen35.pipeline.run_request import RunRequest

__all__ = ["Outcome", "Status", "outcome_text", "outcomes_json", "outcomes_text", "passed"]

Status = Literal["done", "kept", "closed", "stopped", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step.

    Args:
        step: the step.
        state: ``done``; ``kept``: already up to date; ``closed``: its gate is closed; ``stopped``:
            a gate before it is closed; ``skipped``: not requested.
        gate: the closed gate.
        reasons: why it is not done.
        facts: results, as plain values.
    """

    step: GraphStep
    state: Status
    gate: Gate | None = None
    reasons: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blame(self) -> str:
        """The reason it gives for stopping a later step."""
        if self.gate:
            return f"the {self.gate} gate of {self.step.artifact.name} is closed"
        return f"{self.step.name} is not done"

    @property
    def open(self) -> bool:
        """Whether steps that need this one may run."""
        return self.state in ("done", "kept")


def outcome_text(outcome: Outcome) -> str:
    """Return a step's outcome in one line."""
    if outcome.state == "closed" and outcome.gate:
        first = outcome.reasons[0] if outcome.reasons else ""
        more = f" (and {len(outcome.reasons) - 1} more)" if len(outcome.reasons) > 1 else ""
        return f"{outcome.gate} gate CLOSED: {first}{more}"
    words = {"done": "done", "kept": "up to date", "closed": "FAILED"}
    text = words.get(outcome.state, outcome.state)
    return f"{text}: {'; '.join(outcome.reasons)}" if outcome.reasons else text


def outcomes_json(request: RunRequest, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return a run's outcome as plain values."""
    return {
        "out": str(request.out),
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


def _details(outcome: Outcome) -> Iterator[str]:
    """Yield what a step's line does not say."""
    if outcome.state == "closed":
        yield from (f"- {reason}" for reason in outcome.reasons[1:])
    facts: Mapping[str, Any] = outcome.facts
    if outcome.open and "commit" in facts:
        yield f"{facts['repo']}@{facts['commit'][:12]}"


def passed(outcomes: Sequence[Outcome]) -> bool:
    """Return whether all gates are open."""
    return all(outcome.state not in ("closed", "stopped") for outcome in outcomes)


def outcomes_text(outcomes: Sequence[Outcome], *, told: bool = False) -> str:
    """Return a run's outcome as text.

    Args:
        outcomes: of the steps.
        told: each step's line was shown already: only steps with more than that are listed.
    """
    width = max(len(outcome.step.name) for outcome in outcomes)
    lines: list[str] = []
    for outcome in outcomes:
        more = list(_details(outcome))
        if more or not told:
            lines.append(f"{outcome.step.name:<{width}}  {outcome_text(outcome)}")
        lines += [f"{'':<{width}}  {line}" for line in more]
    closed = [outcome for outcome in outcomes if outcome.state == "closed"]
    lines += [""] if lines else []
    if closed:
        lines.append(f"{len(closed)} closed: passed steps are kept; fix the cause and run again")
    else:
        lines.append("all gates open")
    return "\n".join(lines)
