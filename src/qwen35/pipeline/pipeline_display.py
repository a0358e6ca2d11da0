"""The forecast of a run: its graph with bytes, memory and disk space."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from qwen35.checkpoint.source import Checkpoint
from qwen35.display import size
from qwen35.pipeline.graph import GATES, GraphStep
from qwen35.pipeline.planned_artifacts import PlannedArtifact, memory_of, source_bytes, sweep_memory
from qwen35.pipeline.run_request import RunRequest
from qwen35.sinks.staging import existing

__all__ = ["Forecast"]


class Forecast:
    """What a run would do.

    Args:
        request: the request.
        source: the source; headers suffice.
        graph: the steps.
        threads: number of threads to use.
        kept: names of the artifacts that are up to date.
    """

    def __init__(
        self,
        request: RunRequest,
        source: Checkpoint,
        graph: Sequence[GraphStep],
        threads: int,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        self._request = request
        self._source = source
        self._graph = graph
        self._threads = threads
        self._kept = kept

    @property
    def artifacts(self) -> list[PlannedArtifact]:
        """The artifacts that the run would make."""
        steps = (step for step in self._graph if step.kind == "make")
        return [step.artifact for step in steps if step.artifact.name not in self._kept]

    def _reads(self, step: GraphStep) -> int:
        if step.kind == "make":
            return 0 if step.artifact.name in self._kept else step.artifact.plan.read_bytes
        own = sum(artifact.nbytes for artifact in step.artifacts)
        if step.kind == "evaluate" or (
            step.kind == "verify" and self._request.depth != "structure"
        ):
            return own + self._source.nbytes
        return own if step.kind == "publish" and step.artifact.repo else 0

    def _writes(self, step: GraphStep) -> int:
        made = step.kind == "make" and step.artifact.name not in self._kept
        return step.artifact.nbytes if made else 0

    def _note(self, step: GraphStep) -> str:
        if step.kind == "make" and step.artifact.name in self._kept:
            return "up to date"
        if step.kind == "publish":
            return step.artifact.repo or "skipped: no repository was named"
        if step.kind == "ask" and step.artifact.request.endpoint:
            return step.artifact.request.endpoint.url
        return self._request.depth if step.kind == "verify" else ""

    def _rows(self) -> Iterator[dict[str, Any]]:
        for step in self._graph:
            yield {
                "step": step.name,
                "needs": list(step.needs),
                "gates": list(step.gates),
                "read_bytes": self._reads(step),
                "write_bytes": self._writes(step),
                "memory": memory_of(step.kind, step.artifacts, self._request.depth, self._threads),
                "note": self._note(step),
            }

    def to_json(self) -> dict[str, Any]:
        """Return the forecast as plain values."""
        rows = list(self._rows())
        needed = sum(row["write_bytes"] for row in rows)
        return {
            "model": self._source.name,
            "repo": self._source.repo,
            "revision": self._source.revision,
            "out": str(self._request.out),
            "steps": rows,
            "artifacts": {
                step.artifact.name: {
                    "plan": step.artifact.plan.digest,
                    "files": dict(step.artifact.plan.file_sizes()),
                    "bytes": step.artifact.nbytes,
                    "repo": step.artifact.repo,
                    "notes": list(step.artifact.plan.notes),
                }
                for step in self._graph
                if step.kind == "make"
            },
            "source_read_bytes": source_bytes(self.artifacts),
            "peak_memory": max(
                sweep_memory(self.artifacts, self._threads), *(row["memory"] for row in rows)
            ),
            "disk_needed": needed,
            "disk_free": shutil.disk_usage(existing(self._request.out)).free,
            "threads": self._threads,
        }

    def text(self) -> str:
        """Return the forecast as text."""
        forecast = self.to_json()
        width = max(len(row["step"]) for row in forecast["steps"])
        lines = [
            f"{forecast['model']} -> {forecast['out']}",
            "",
            f"{'step':<{width}} {'reads':>10} {'writes':>10} {'memory':>10}",
        ]
        for row in forecast["steps"]:
            cells = [f"{size(row[key]) if row[key] else '-':>10}" for key in _COLUMNS]
            lines.append(f"{row['step']:<{width}} {' '.join(cells)}")
            needs = [f"after {', '.join(row['needs'])}"] if row["needs"] else []
            gates_after = ", ".join(f"{gate} gate" for gate in row["gates"])
            notes = [*needs, *(part for part in (gates_after, row["note"]) if part)]
            lines += [f"    {'; '.join(notes)}"] if notes else []
        gates = {gate for row in forecast["steps"] for gate in row["gates"]}
        lines += ["", *(f"{gate} gate: {GATES[gate]}" for gate in GATES if gate in gates)]
        lines += [
            "",
            f"making reads {size(forecast['source_read_bytes'])} of the source, each byte once",
            f"disk: needs {size(forecast['disk_needed'])}, {size(forecast['disk_free'])} are free; "
            f"memory: about {size(forecast['peak_memory'])} with {forecast['threads']} threads",
        ]
        for name, artifact in forecast["artifacts"].items():
            lines += [f"note: {name}: {note}" for note in artifact["notes"]]
        return "\n".join(lines)


_COLUMNS = ("read_bytes", "write_bytes", "memory")
