"""Check an artifact of any container at a given depth."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.reconciled import reconciled
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.refined_bounds import TOLERANCE
from qwen35.codecs.registry import codec_of, is_packed, quantized_weights
from qwen35.errors import Finding
from qwen35.planning.hessians import Hessians
from qwen35.planning.manifest import amendment_notes, first_entries
from qwen35.planning.refinement import refined_weights
from qwen35.progress import Progress
from qwen35.table import html_lines, html_table
from qwen35.verification.behaviour import NOT_ASKED, Answer, BehaviourResult
from qwen35.verification.foreign_files import foreign_notes
from qwen35.verification.memo import MemoFile, stamped
from qwen35.verification.numbers_check import NumbersResult, check_numbers, check_shapes
from qwen35.verification.role_errors import RoleError
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.structure_check import check_hashes, check_structure
from qwen35.verification.subject import Depth, Engine, Subject

if TYPE_CHECKING:  # the HTTP client takes longer to import than all else here
    from qwen35.verification.served_verdict import ServedResult

__all__ = ["NO_SOURCE", "Depth", "Engine", "Verdict", "served_verdict", "verify"]

NO_SOURCE = (
    "without --source nothing tells whether weights, config, tokenizer and template are the "
    "original's"
)
_STRANGER = "weights and settings: not with a source of other sizes"


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
        source: name of the source that it was compared with.
        not_compared: what this check did not look at.
        not_detected: the largest errors that it misses, for each quantized type.
        amended: files that were changed on purpose, which the manifest records.
        served: what a server told, if that was asked.
    """

    name: str
    kind: str
    depth: Depth
    counts: dict[str, int]
    errors: tuple[RoleError, ...]
    findings: tuple[Finding, ...]
    answers: tuple[Answer, ...] = ()
    notes: tuple[str, ...] = ()
    source: str | None = None
    not_compared: tuple[str, ...] = ()
    not_detected: tuple[str, ...] = ()
    amended: tuple[str, ...] = ()
    served: ServedResult | None = None

    def __repr__(self) -> str:
        return f"<Verdict {self.name}: {self.result}>"

    def _repr_html_(self) -> str:
        errors = [
            (row.role, row.storage, str(row.count), f"{row.relative:.3g}", f"{row.worst:.3g}")
            for row in self.errors
        ]
        findings = [(row.check, row.subject, row.message) for row in self.findings]
        parts = [html_lines([repr(self).strip("<>")])]
        if findings:
            parts.append(html_table(("finding", "in", "what"), findings))
        if errors:
            parts.append(html_table(("role", "stored", "weights", "error", "worst"), errors))
        return "".join(parts)

    @property
    def result(self) -> str:
        """The verdict in a sentence, which names how far the check went."""
        if self.findings:
            noun = "finding" if len(self.findings) == 1 else "findings"
            return f"FAILED: {len(self.findings)} {noun}"
        amended = f"; amended since: {', '.join(self.amended)}" if self.amended else ""
        return f"{self._passed}{amended}"

    @property
    def _passed(self) -> str:
        if self.served is not None:
            checks = len(self.served.asked)
            return f"passed: {len(self.answers)} answers right, {checks} checks of the server"
        if self.depth == "structure":
            seen = "headers and settings compared with the source"
            return (
                f"passed: {seen if self.source else 'headers only'}, weights not read; --depth "
                "numbers reads them"
            )
        if self.depth == "behaviour":
            weights = "compared with the source" if self.source else "read but not compared"
            return f"passed: weights {weights}, {len(self.answers)} answers right"
        if self.source:
            return (
                "passed: weights and settings compared with the source; not loaded, --depth "
                "behaviour does"
            )
        return "passed: weights read but not compared; --source MODEL compares them"

    @property
    def passed(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        served = {} if self.served is None else {"served": self.served.to_json()}
        return served | {
            "artifact": self.name,
            "kind": self.kind,
            "depth": self.depth,
            "source": self.source,
            "passed": self.passed,
            "result": self.result,
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
            "not_compared": list(self.not_compared),
            "not_detected": list(self.not_detected),
        }


def verify(
    subject: Subject,
    *,
    source: Checkpoint | None = None,
    hessians: Hessians | None = None,
    depth: Depth = "structure",
    threads: int | None = None,
    tensor_parallel: int | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
    questions: Progress | None = None,
) -> Verdict:
    """Check an artifact.

    Args:
        subject: opened for this depth (`qwen35.verification.opening.open_artifact`).
        source: the checkpoint that it was made from; at depth ``structure``, its headers do.
        hessians: by which its refined codes were chosen: errors in outputs are judged too.
        depth: ``structure`` reads headers, ``numbers`` every byte; ``behaviour`` also asks it.
        threads: number of weights checked at a time.
        tensor_parallel: number of GPUs that must be able to split weights of codecs with tiles.
        engine: the engine to ask it in; by default the container's own.
        progress: receives bytes read.
        questions: receives questions asked.

    Raises:
        UsageError: the engine is not installed, or an option does not apply to this artifact.
        InputError: the source cannot be read, or only headers were opened.
    """
    subject.refuse(engine, tensor_parallel)
    source = source and reconciled(source)
    structure = check_structure(subject)
    findings = list(structure.findings)
    if tensor_parallel is not None:
        findings += subject.sharding_findings(tensor_parallel)
    compared = _settings(subject, source)
    amended = _accept_amended(compared, structure.manifest or {})
    findings += [one for one in compared.findings if one not in findings]
    foreign = foreign_notes(subject.place) if subject.place else ()
    notes = [*subject.notes, *foreign, *compared.notes]
    errors: Sequence[RoleError] = ()
    refined = sorted(refined_weights(structure.manifest or {}).items())
    original = source if compared.kin else None
    if depth == "structure":
        findings += check_shapes(subject, original) if original else ()
    else:
        inputs: dict[str, Any] = {"artifact": subject.stamps()}
        inputs |= {"source": source and stamped(source)}
        inputs |= {"refined": refined} if refined else {}
        inputs |= {"hessians": hessians.sha256} if hessians else {}
        with MemoFile(inputs) as memo:
            if structure.manifest is not None:
                findings += check_hashes(subject, structure.manifest, memo)
            numbers = check_numbers(
                subject,
                original,
                memo=memo,
                manifest=structure.manifest,
                hessians=hessians,
                threads=threads,
                progress=progress,
            )
        errors = numbers.roles
        findings += [*numbers.findings, *numbers.too_far()]
        notes += [*memo.notes, *_mostly_other(numbers, source)]
        notes += _decoded(original)
    behaviour = BehaviourResult()
    if depth == "behaviour" and not findings:
        behaviour = subject.ask(engine, threads, questions)
        findings += behaviour.findings
    elif depth == "behaviour":
        notes.append(NOT_ASKED)
    notes += behaviour.notes
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
        behaviour.answers,
        tuple(notes),
        source.name if source else None,
        tuple(compared.skipped),
        tuple(_undetected(subject, None if depth == "structure" else original, refined)),
        amended,
    )


_UNSEEN = "weights, config and tokenizer: a server does not show them"


def served_verdict(served: ServedResult, source: str | None) -> Verdict:
    """Return the verdict on a served model.

    Args:
        served: what was found.
        source: name of the checkpoint whose template it was compared with.
    """
    return Verdict(
        served.model.title,
        "served",
        "behaviour",
        {"weights": 0, "packed": 0, "files": 0},
        (),
        served.findings,
        served.answers,
        served.notes,
        source,
        (_UNSEEN,),
        served=served,
    )


def _settings(subject: Subject, source: Checkpoint | None) -> SettingsComparison:
    """Compare all but weights; nothing of a source that cannot be the artifact's."""
    if source is None:
        return SettingsComparison(skipped=[NO_SOURCE])
    strangers = list(subject.strangers(source))
    if strangers:
        return SettingsComparison(strangers, skipped=[_STRANGER], kin=False)
    return subject.settings(source)


_NEVER_EXCUSED = ("config.json", "tokenizer.json", "vocab.json", "merges.txt")


def _accept_amended(compared: SettingsComparison, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Turn differences from the source that were recorded as made on purpose into notes.

    In a file of weights, that is the chat template alone. An artifact's own word never excuses
    another configuration or vocabulary.

    Returns:
        The amended files.
    """
    compared.notes[:0] = amendment_notes(manifest)
    files, weights = first_entries(manifest), manifest.get("tensors", {})
    refused = {*weights, *_NEVER_EXCUSED}
    for one in list(compared.findings):
        if one.subject in files and (one.subject not in refused or one.check == "template"):
            compared.findings.remove(one)
            compared.notes.append(f"{one.subject}, amended: {one.message}")
    return tuple(name for name in files if name in manifest.get("files", {}))


def _undetected(
    subject: Subject, source: Checkpoint | None, refined: Collection[object]
) -> Iterator[str]:
    """Yield the largest differences that comparisons miss, for each type with any."""
    if source is None:
        return
    codecs = {held.storage: codec_of(held.weight) for p in subject.parts for held in p.weights}
    for codec in codecs.values():
        if codec.tolerance:
            yield f"{codec.label}: {codec.tolerance}"
    if refined:
        yield TOLERANCE


def _decoded(source: Checkpoint | None) -> Iterator[str]:
    """Yield a note for each format in which the source itself is quantized."""
    for label, count in quantized_weights(source.weights if source else ()).items():
        yield (
            f"the source holds {count} weights in {label}: they are compared as they decode, not "
            "with the original weights"
        )


def _mostly_other(numbers: NumbersResult, source: Checkpoint | None) -> Iterator[str]:
    """Yield a question if most weights are others than the source's."""
    wrong = sum(bool(one.findings) for _, one in numbers.compared)
    if source is not None and 2 * wrong > len(numbers.compared):
        yield f"most weights differ: is {source.name} its source?"
