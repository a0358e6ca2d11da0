"""Check an artifact of any container at a given depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.registry import is_packed
from qwen35.errors import Finding
from qwen35.progress import Progress
from qwen35.verification.behaviour import NOT_ASKED, Answer
from qwen35.verification.memo import MemoFile, stamped
from qwen35.verification.numbers_check import check_numbers
from qwen35.verification.role_errors import RoleError
from qwen35.verification.structure_check import check_hashes, check_structure
from qwen35.verification.subject import Depth, Engine, Subject

__all__ = ["Depth", "Engine", "Verdict", "verify"]


@dataclass(frozen=True)
class Verdict:
    """The result of a verification.

    Args:
        name: the artifact's name.
        kind: how its weights are stored: the name of a codec or of a container.
        depth: depth of the check.
        counts: number of weights, packed weights and files.
        errors: relative error per role; empty without a source.
        findings: the findings.
        answers: its answers, at depth ``behaviour``.
        notes: remarks on how it was checked.
    """

    name: str
    kind: str
    depth: Depth
    counts: dict[str, int]
    errors: tuple[RoleError, ...]
    findings: tuple[Finding, ...]
    answers: tuple[Answer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "artifact": self.name,
            "kind": self.kind,
            "depth": self.depth,
            "passed": self.passed,
            "counts": self.counts,
            "relative_error": [
                {
                    "role": row.role,
                    "storage": row.storage,
                    "weights": row.count,
                    "relative": row.relative,
                    "worst": row.worst,
                }
                for row in self.errors
            ],
            "answers": [answer.to_json() for answer in self.answers],
            "findings": [finding.to_json() for finding in self.findings],
            "notes": list(self.notes),
        }


def verify(
    subject: Subject,
    *,
    source: Checkpoint | None = None,
    depth: Depth = "structure",
    threads: int | None = None,
    tensor_parallel: int | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check an artifact.

    Args:
        subject: opened for this depth (`qwen35.verification.opening.open_artifact`).
        source: the checkpoint that it was made from; used from depth ``numbers`` on.
        depth: ``structure`` reads headers, ``numbers`` every byte; ``behaviour`` also asks it.
        threads: number of weights checked at a time.
        tensor_parallel: number of GPUs that must be able to split weights of codecs with tiles.
        engine: the engine to ask it in; by default the container's own.
        progress: receives bytes read.

    Raises:
        UsageError: the engine is not installed, or an option does not apply to this artifact.
        InputError: the source cannot be read, or only headers were opened.
    """
    subject.refuse(engine, tensor_parallel)
    structure = check_structure(subject)
    findings = list(structure.findings)
    if tensor_parallel is not None:
        findings += subject.sharding_findings(tensor_parallel)
    errors: Sequence[RoleError] = ()
    notes: list[str] = []
    answers: tuple[Answer, ...] = ()
    if depth != "structure":
        inputs = {"artifact": subject.stamps(), "source": source and stamped(source)}
        with MemoFile(inputs) as memo:
            if structure.manifest is not None:
                findings += check_hashes(subject, structure.manifest, memo)
            numbers = check_numbers(subject, source, memo=memo, threads=threads, progress=progress)
        errors = numbers.roles
        findings += [*numbers.findings, *numbers.too_far()]
        notes += memo.notes
    if depth == "behaviour" and not findings:
        behaviour = subject.ask(engine, threads)
        answers = behaviour.answers
        findings += behaviour.findings
        notes += behaviour.notes
    elif depth == "behaviour":
        notes.append(NOT_ASKED)
    weights = [held.weight for part in subject.parts for held in part.weights]
    counts = {
        "weights": len(weights),
        "packed": sum(map(is_packed, weights)),
        "files": len(subject.files),
    }
    return Verdict(
        subject.name,
        subject.kind,
        depth,
        counts,
        tuple(errors),
        tuple(findings),
        answers,
        tuple(notes),
    )
