"""The graph of a run: steps, what each needs, and the gates that stand behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.pipeline.run_request import RunRequest

__all__ = ["GATES", "Gate", "GraphStep", "Kind", "make_graph"]

Gate = Literal["artifact", "verification", "quantization", "publish"]
Kind = Literal["make", "verify", "evaluate", "document", "publish"]

GATES: dict[Gate, str] = {
    "artifact": "the folder is there, of the format asked for, and what its plan says",
    "verification": "structure, numbers and behaviour, as deep as asked, without a finding",
    "quantization": "the F16 (Path B) and every file of a type asked for are there, and open",
    "publish": "what would be pushed is the artifact and nothing else; nothing would be deleted",
}
"""Gate to what must be true for it to open."""


@dataclass(frozen=True)
class GraphStep:
    """One step.

    Args:
        kind: what it does.
        artifacts: to what; to all of a run if it is about all.
        needs: names of the steps whose gates must be open.
        gates: that are judged when it is done.
        any_need: whether one open need is enough.
    """

    kind: Kind
    artifacts: tuple[PlannedArtifact, ...]
    needs: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    any_need: bool = False

    @property
    def name(self) -> str:
        """What it is called in a run: ``verify Qwen3.5-text-0.8B``."""
        return self.kind if self.kind == "evaluate" else f"{self.kind} {self.artifact.name}"

    @property
    def artifact(self) -> PlannedArtifact:
        """The only artifact, or the first of all."""
        return self.artifacts[0]


def make_graph(job: RunRequest, artifacts: Sequence[PlannedArtifact]) -> tuple[GraphStep, ...]:
    """Return the steps of a run, each after what it needs."""
    steps: list[GraphStep] = []
    for artifact in artifacts:
        separate = artifact.plan.container.separate
        gates: tuple[Gate, ...] = ("artifact", "quantization") if separate else ("artifact",)
        steps.append(GraphStep("make", (artifact,), (), gates))
    for artifact in artifacts:
        needs = (f"make {artifact.name}",)
        steps.append(GraphStep("verify", (artifact,), needs, ("verification",)))
    verified = tuple(f"verify {artifact.name}" for artifact in artifacts)
    if job.measuring is not None and artifacts:
        steps.append(GraphStep("evaluate", tuple(artifacts), verified, (), any_need=True))
    measured = ("evaluate",) if job.measuring is not None else ()
    steps += [GraphStep("document", (a,), (f"verify {a.name}", *measured)) for a in artifacts]
    steps += [GraphStep("publish", (a,), (f"document {a.name}",), ("publish",)) for a in artifacts]
    return tuple(steps)
