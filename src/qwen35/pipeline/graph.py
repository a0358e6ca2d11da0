"""The graph of a run: its steps, their dependencies, and the gates after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.pipeline.run_request import RunRequest

__all__ = ["GATES", "Gate", "GraphStep", "Kind", "make_graph"]

Gate = Literal["artifact", "verification", "quantization", "serving", "publish"]
Kind = Literal["make", "verify", "ask", "evaluate", "document", "publish"]

GATES: dict[Gate, str] = {
    "artifact": "the folder exists, has the requested format, and matches its plan",
    "verification": "no findings in structure, numbers and behaviour, to the requested depth",
    "quantization": "the file of every requested type (in path B also F16) exists and opens",
    "serving": "the server that runs it answers, and nothing is found there",
    "publish": "the push uploads the artifact and nothing else, and deletes nothing",
}
"""The condition for each gate to open."""


@dataclass(frozen=True)
class GraphStep:
    """One step of a run.

    Args:
        kind: the action.
        artifacts: its artifacts; all of the run's for a step common to all.
        needs: names of the steps whose gates must be open.
        gates: the gates judged after it.
        any_need: whether a single open need suffices.
    """

    kind: Kind
    artifacts: tuple[PlannedArtifact, ...]
    needs: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    any_need: bool = False

    @property
    def name(self) -> str:
        """The step's name in the run: ``verify Qwen3.5-text-0.8B``."""
        return self.kind if self.kind == "evaluate" else f"{self.kind} {self.artifact.name}"

    @property
    def artifact(self) -> PlannedArtifact:
        """The only artifact, or the first of several."""
        return self.artifacts[0]


def make_graph(request: RunRequest, artifacts: Sequence[PlannedArtifact]) -> tuple[GraphStep, ...]:
    """Return the steps of a run, each after its needs."""
    steps: list[GraphStep] = []
    for artifact in artifacts:
        separate = artifact.plan.container.separate
        gates: tuple[Gate, ...] = ("artifact", "quantization") if separate else ("artifact",)
        steps.append(GraphStep("make", (artifact,), (), gates))
    for artifact in artifacts:
        needs = (f"make {artifact.name}",)
        steps.append(GraphStep("verify", (artifact,), needs, ("verification",)))
    verified = tuple(f"verify {artifact.name}" for artifact in artifacts)
    if request.measurement is not None and artifacts:
        # What passed is measured together, even if another artifact failed.
        steps.append(GraphStep("evaluate", tuple(artifacts), verified, (), any_need=True))
    measured = ("evaluate",) if request.measurement is not None else ()
    for artifact in artifacts:
        checked = f"verify {artifact.name}"
        if artifact.request.endpoint is not None:
            steps.append(GraphStep("ask", (artifact,), (checked,), ("serving",)))
            checked = f"ask {artifact.name}"
        steps.append(GraphStep("document", (artifact,), (checked, *measured)))
    steps += [GraphStep("publish", (a,), (f"document {a.name}",), ("publish",)) for a in artifacts]
    return tuple(steps)
