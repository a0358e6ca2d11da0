"""Run a graph: run each step whose needs are met, skip what is up to date, judge the gates."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint
from qwen35.errors import Finding, InputError, Qwen35Error
from qwen35.pipeline.evaluation_step import candidates, measure
from qwen35.pipeline.freshness import is_up_to_date, make_key, source_identity
from qwen35.pipeline.gates import artifact_gate, publish_gate, quantization_gate, serving_gate
from qwen35.pipeline.graph import GraphStep
from qwen35.pipeline.make import make_artifacts
from qwen35.pipeline.outcome import Outcome, Status, outcome_text
from qwen35.pipeline.planned_artifacts import PlannedArtifact
from qwen35.pipeline.run_request import REPORT_FOLDER, RunOptions, RunRequest
from qwen35.pipeline.run_state import RunState, key_of
from qwen35.planning.manifest import read_manifest
from qwen35.progress import Progress, Silent
from qwen35.publishing.hashes import FileHasher, digest_file
from qwen35.publishing.push import apply_push
from qwen35.publishing.repo_documents import (
    REPORT_NAME,
    documents,
    record_served,
    record_verdict,
    write_documents,
)
from qwen35.publishing.sync import SyncTarget, diff_push
from qwen35.serving.started_server import started_servers
from qwen35.sinks.staging import check_output, check_space, locked, os_errors
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import Verdict, verify

__all__ = ["PipelineRunner"]


@dataclass
class PipelineRunner:
    """One run.

    Args:
        request: the request.
        source: the source, with local weights.
        graph: the steps.
        options: options that do not affect the results.
        threads: number of threads; the options may allow more than fit into memory.
        progress: receives bytes processed.
        chunks: receives chunks measured.
        announce: receives a line per step.
        questions: receives questions asked.
        hasher: caches hashes of unchanged files.
    """

    request: RunRequest
    source: Checkpoint
    graph: Sequence[GraphStep]
    options: RunOptions
    threads: int = 1
    progress: Progress = field(default_factory=Silent)
    chunks: Progress = field(default_factory=Silent)
    announce: Callable[[str], None] = lambda _: None
    questions: Progress = field(default_factory=Silent)
    hasher: FileHasher = field(default_factory=FileHasher)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self) -> tuple[Outcome, ...]:
        """Run all steps; return their outcomes, in order.

        Raises:
            OutputError: another run is active in the folder, an output may not be replaced, or the
                disk is too small. Nothing has been written then.
        """
        out = self.request.out
        created = not out.exists()
        try:
            with os_errors(out):
                out.mkdir(parents=True, exist_ok=True)
                with locked(out.resolve() / "qwen35-run"):
                    self._run()
        finally:
            if created:
                with suppress(OSError):  # not empty: the run produced something
                    out.rmdir()
        return tuple(self.outcomes.values())

    def _run(self) -> None:
        self._state = RunState.load(self.request.out)
        self._identity = source_identity(self.source, self.hasher)
        # All artifacts first: one sweep reads the source once for all of them.
        self._make_errors = self._make()
        for number, step in enumerate(self.graph, 1):
            outcome = self._outcome(step)
            self.outcomes[step.name] = outcome
            self.announce(f"[{number}/{len(self.graph)}] {step.name}: {outcome_text(outcome)}")

    def _outcome(self, step: GraphStep) -> Outcome:
        needs = [self.outcomes[name] for name in step.needs]
        closed = [need for need in needs if not need.open]
        if closed and (not step.any_need or len(closed) == len(needs)):
            return Outcome(step, "stopped", reasons=tuple(need.blame for need in closed))
        handler = {
            "make": self._gate_make,
            "verify": self._verify,
            "ask": self._ask,
            "evaluate": self._evaluate,
            "document": self._document,
            "publish": self._publish,
        }[step.kind]
        try:
            return handler(step)
        except Qwen35Error as error:  # any other exception is a bug and ends the run
            gate = step.gates[0] if step.gates else None
            return Outcome(step, "closed", gate, (str(error),))

    # --- make

    def _make(self) -> dict[str, Qwen35Error | None]:
        """Make missing or changed artifacts; return the error, or None, for each step run."""
        todo: dict[str, PlannedArtifact] = {}
        for step in self.graph:
            if step.kind == "make" and not self._is_up_to_date(step.artifact):
                todo[step.name] = step.artifact
        for name, artifact in todo.items():
            self._check_out(name, artifact)
        check_space(self.request.out, sum(artifact.nbytes for artifact in todo.values()))
        # Recorded before making, so that a run killed between a rename and its record resumes.
        for name, artifact in todo.items():
            self._state.record(name, make_key(artifact, self._identity))
        if not todo:
            return {}
        self.announce(f"making {', '.join(artifact.name for artifact in todo.values())}")
        errors = make_artifacts(
            list(todo.values()),
            threads=self.threads,
            device=self.options.device,
            progress=self.progress,
        )
        return {name: errors.get(artifact.name) for name, artifact in todo.items()}

    def _is_up_to_date(self, artifact: PlannedArtifact) -> bool:
        return is_up_to_date(artifact, self._identity, self._state, self.hasher)

    def _check_out(self, name: str, artifact: PlannedArtifact) -> None:
        """Raise if a file that this run did not write would be replaced without --overwrite."""
        ours = name in self._state.steps or self.options.overwrite
        source, donor = self.source.location(), self.source.donor_location()
        request = artifact.request
        files = (request.imatrix, request.activation_stats, request.hessian)
        check_output(artifact.out, source=source, overwrite=ours, donor=donor, files=files)

    def _gate_make(self, step: GraphStep) -> Outcome:
        artifact = step.artifact
        error = self._make_errors.get(step.name)
        if error is not None:
            return Outcome(step, "closed", "artifact", (str(error),))
        if found := list(artifact_gate(artifact)):
            return Outcome(step, "closed", "artifact", _sentences(found))
        if "quantization" in step.gates and (found := list(quantization_gate(artifact))):
            return Outcome(step, "closed", "quantization", _sentences(found))
        state: Status = "done" if step.name in self._make_errors else "kept"
        facts = {"out": str(artifact.out), "bytes": artifact.nbytes, "plan": artifact.plan.digest}
        return Outcome(step, state, facts=facts)

    # --- verify

    def _verify(self, step: GraphStep) -> Outcome:
        artifact = step.artifact
        manifest = self._manifest(artifact)
        key = key_of("verify", self.request.depth, _hashes(manifest), self._identity)
        recorded = manifest.get("verified")
        row = self._state.recorded(step.name, key)
        passed = isinstance(recorded, dict) and recorded.get("passed")
        if row is not None and row.get("passed") and passed:
            return Outcome(step, "kept", facts={"depth": self.request.depth, "passed": True})
        verdict = self.verdict_on(artifact)
        gc.collect()  # a loaded model is large, and its reference cycles delay freeing it
        record_verdict(artifact.out, verdict)
        self._state.record(step.name, key, passed=verdict.passed)
        facts = {
            "depth": verdict.depth,
            "passed": verdict.passed,
            "notes": list(verdict.notes),
            "findings": [finding.to_json() for finding in verdict.findings],
        }
        if not verdict.passed:
            return Outcome(step, "closed", "verification", _sentences(verdict.findings), facts)
        return Outcome(step, "done", facts=facts)

    def verdict_on(self, artifact: PlannedArtifact) -> Verdict:
        """Verify an artifact as deep as the run asks for."""
        depth = self.request.depth
        source = None if depth == "structure" else self.source
        options: Any = {"source": source, "depth": depth, "threads": self.threads}
        subject = open_artifact(str(artifact.out.absolute()), depth)
        progress = None if depth == "structure" else self.progress
        return verify(subject, progress=progress, questions=self.questions, **options)

    def _manifest(self, artifact: PlannedArtifact) -> Mapping[str, Any]:
        manifest = read_manifest(LocalFolder(artifact.out))
        if manifest is None:
            raise InputError(str(artifact.out), f"no {MANIFEST_NAME} in it", hint="run again")
        return manifest

    # --- ask

    def _ask(self, step: GraphStep) -> Outcome:
        """Ask the server each time: nothing tells whether it has changed."""
        command = self.options.serve.get(step.artifact.name)
        endpoint = step.artifact.request.endpoint
        assert endpoint is not None  # otherwise the graph has no such step
        with started_servers([command] if command else [], [endpoint]) as started:
            verdict = serving_gate(step.artifact, self.source, started)
        record_served(step.artifact.out, verdict)
        facts = {
            "passed": verdict.passed,
            "notes": list(verdict.notes),
            "findings": [finding.to_json() for finding in verdict.findings],
        }
        if not verdict.passed:
            return Outcome(step, "closed", "serving", _sentences(verdict.findings), facts)
        return Outcome(step, "done", facts=facts)

    # --- evaluate

    def _evaluate(self, step: GraphStep) -> Outcome:
        measurement = self.request.measurement
        assert measurement is not None  # otherwise the graph has no such step
        verified = [a for a in step.artifacts if self.outcomes[f"verify {a.name}"].open]
        hashes = {a.name: _hashes(self._manifest(a)) for a in verified}
        text = digest_file(measurement.text).sha256
        how = measurement.how
        key = key_of("evaluate", text, measurement.chunks, self._identity, hashes, *how)
        report = self.report / REPORT_NAME
        row = self._state.recorded(step.name, key)
        facts = {"report": str(report), "measured": [a.name for a in verified]}
        if row and report.is_file() and digest_file(report).sha256 == row.get("report"):
            return Outcome(step, "kept", facts=facts)
        findings = measure(
            self.source,
            candidates(verified),
            measurement,
            self.report,
            threads=self.threads,
            device=self.options.device,
            memory=self.options.memory,
            token=self.options.token,
            progress=self.chunks,
        )
        if findings:
            return Outcome(step, "closed", None, _sentences(findings), facts)
        self._state.record(step.name, key, report=digest_file(report).sha256)
        return Outcome(step, "done", facts=facts)

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.request.out / REPORT_FOLDER

    # --- documents

    def _document(self, step: GraphStep) -> Outcome:
        artifact = step.artifact
        if self.request.measurement is not None:
            content = (self.report / REPORT_NAME).read_bytes()
            write_documents(artifact.out, {REPORT_NAME: content})
        written = documents(artifact.out, artifact.repo or f"OWNER/{artifact.name}")
        write_documents(artifact.out, written)
        return Outcome(step, "done" if written else "kept", facts={"written": sorted(written)})

    # --- publish

    def _publish(self, step: GraphStep) -> Outcome:
        artifact = step.artifact
        if artifact.repo is None:
            return Outcome(step, "skipped", reasons=("no repository was named to publish to",))
        target = SyncTarget.of(artifact.out, artifact.repo, self.options.token, self.progress)
        diff = diff_push(target, create=True)
        manifest = self._manifest(artifact)
        listed = [*manifest["files"], *manifest.get("added", {})]
        if found := list(publish_gate(diff, listed)):
            return Outcome(step, "closed", "publish", _sentences(found), {"repo": artifact.repo})
        if diff.base and not diff.changes:
            return Outcome(step, "kept", facts={"repo": artifact.repo, "commit": diff.base})
        pushed = apply_push(
            diff,
            artifact.out,
            message="Upload model",
            token=target.token,
            private=self.request.private,
            hasher=target.hasher,
            progress=self.progress,
        )
        facts = {"repo": artifact.repo, "commit": pushed.commit, "notes": list(pushed.notes)}
        return Outcome(step, "done", facts=facts)


def _hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def _sentences(findings: Sequence[Finding]) -> tuple[str, ...]:
    return tuple(f"{finding.subject}: {finding.message}" for finding in findings)
