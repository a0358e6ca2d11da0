"""One call that checks an artifact at the depth asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import Finding, UsageError
from qwen35.progress import Progress
from qwen35.verify.asking import Asker
from qwen35.verify.asking_vllm import VllmAsker, check_vllm
from qwen35.verify.bands import WORST_ERROR
from qwen35.verify.behaviour import NOT_ASKED, Answer, ask, behaviour_findings
from qwen35.verify.compared import RoleError
from qwen35.verify.fp8 import tensor_parallel_findings
from qwen35.verify.memo import Memo, stamped
from qwen35.verify.numbers import Numbers, check_hashes, check_numbers
from qwen35.verify.structure import check_structure

__all__ = ["Depth", "Engine", "Verdict", "verify"]

Depth = Literal["structure", "numbers", "behaviour"]
Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Verdict:
    """The result of a verification.

    Args:
        name: what was checked.
        kind: ``plain``, ``nf4`` or ``fp8``.
        depth: how deep.
        counts: what was looked at (weights, packed weights, files).
        errors: relative error per role; empty without a source.
        findings: what is wrong.
        answers: what it said when asked, at depth ``behaviour``.
        notes: what the user should know of how it was checked.
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
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
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
    artifact: Checkpoint,
    *,
    source: Checkpoint | None = None,
    depth: Depth = "structure",
    threads: int | None = None,
    tensor_parallel: int | None = None,
    engine: Engine = "transformers",
    progress: Progress | None = None,
) -> Verdict:
    """Check an artifact.

    Args:
        artifact: opened leniently (`qwen35.checkpoint.open`).
        source: the checkpoint it was made from; needs depth ``numbers`` or more.
        depth: ``structure`` reads headers, ``numbers`` every byte, ``behaviour`` asks it as well.
        threads: weights decoded at a time.
        tensor_parallel: GPUs that must be able to share every FP8 weight.
        engine: what it is asked in.
        progress: told of the bytes read.

    Raises:
        UsageError: vLLM is asked for and not there, or `tensor_parallel` of another format.
    """
    if engine == "vllm":
        check_vllm()
    place = artifact.place
    if place is None:
        hint = "give a folder or a Hub id"
        raise UsageError(artifact.name, "only a description, nothing to verify", hint=hint)
    structure = check_structure(place, artifact)
    findings = list(structure.findings)
    if tensor_parallel is not None:
        findings += tensor_parallel_findings(artifact.config, structure.items, tensor_parallel)
    errors: list[RoleError] = []
    notes: list[str] = []
    if depth != "structure":
        what = {"artifact": stamped(artifact), "source": source and stamped(source)}
        with Memo(what) as memo:
            if structure.manifest is not None:
                findings += check_hashes(artifact, structure.manifest, memo)
            numbers = check_numbers(
                artifact, structure.items, source, memo=memo, threads=threads, progress=progress
            )
        errors = numbers.roles
        findings += [*numbers.findings, *_too_far(numbers)]
        notes += memo.notes
    answers: list[Answer] = []
    if depth == "behaviour" and not findings:
        asked = _in_vllm if engine == "vllm" else _in_transformers
        answers, more, how = asked(artifact)
        findings += more
        notes += how
    elif depth == "behaviour":
        notes.append(NOT_ASKED)
    items = structure.items
    counts = {
        "weights": len(items),
        "packed": sum(item.weight.storage != "plain" for item in items),
        "files": len(artifact.file_sizes),
    }
    return Verdict(
        artifact.name,
        structure.kind,
        depth,
        counts,
        tuple(errors),
        tuple(findings),
        tuple(answers),
        tuple(notes),
    )


def _in_vllm(artifact: Checkpoint) -> tuple[list[Answer], list[Finding], list[str]]:
    """Load the artifact in vLLM and ask it everything."""
    vision = artifact.config.architecture.vision
    answers = list(ask(VllmAsker(artifact.folder(), vision=vision), image=vision))
    return answers, list(behaviour_findings(answers)), ["asked in vLLM"]


def _in_transformers(artifact: Checkpoint) -> tuple[list[Answer], list[Finding], list[str]]:
    """Load the artifact in transformers and ask it everything."""
    asker = Asker(artifact.folder())
    findings = [
        Finding("load", name, "missing or unexpected when transformers loads it")
        for name in asker.missing
    ]
    answers = list(ask(asker, image=asker.vision))
    notes = [f"asked in transformers, on the {asker.model.device.type}"]
    if asker.settled:
        notes.append(
            f"{asker.settled} layers kept off bitsandbytes' AVX512-BF16 path, which fails on them"
        )
    return answers, [*findings, *behaviour_findings(answers)], notes


def _too_far(numbers: Numbers) -> Iterator[Finding]:
    """Yield FP8 weights that saturate so much that no rounding explains their error."""
    for name, errors in numbers.fp8.items():
        if not errors.misplaced and errors.relative_rmse > WORST_ERROR:
            message = (
                f"relative error {errors.relative_rmse:.4f}, expected at most {WORST_ERROR} "
                f"({errors.clipped} weights saturate)"
            )
            yield Finding("error", name, message)
