"""Ask an artifact all questions: in transformers, in vLLM, or file by file in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.errors import Finding, InputError
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.asking_vllm import VllmAsker, check_vllm
from qwen35.verification.behaviour import Answer, BehaviourResult, ask, behaviour_findings
from qwen35.verification.subject import Engine

__all__ = ["check_engine", "in_engine", "in_llama"]


def check_engine(engine: Engine | None) -> None:
    """Check that an engine that was asked for is installed, without importing it.

    Raises:
        UsageError: it is not installed.
    """
    if engine == "vllm":
        check_vllm()


def in_engine(engine: Engine | None, folder: Path, *, vision: bool) -> BehaviourResult:
    """Load a checkpoint in an engine (transformers by default) and ask all questions.

    What the engine, or the chat template, refuses is a finding.
    """
    try:
        return _in_vllm(folder, vision) if engine == "vllm" else _in_transformers(folder)
    except InputError as error:
        return BehaviourResult(findings=(_refused(error),))


def _refused(error: InputError) -> Finding:
    return Finding("load", error.subject, error.message)


def _in_vllm(folder: Path, vision: bool) -> BehaviourResult:
    asker = VllmAsker(folder, vision=vision)
    answers = tuple(ask(asker, image=asker.vision))
    notes = ("asked in vLLM", *asker.notes)
    return BehaviourResult(answers, tuple(behaviour_findings(answers)), notes)


def _in_transformers(folder: Path) -> BehaviourResult:
    asker = Asker(folder)
    findings = [
        Finding("load", name, "missing or unexpected when transformers loads it")
        for name in asker.missing
    ]
    answers = tuple(ask(asker, image=asker.vision))
    decoded = "decoded by qwen35, then " if asker.decoded else ""
    notes = [f"{decoded}asked in transformers, on the {asker.model.device.type}", *asker.notes]
    if asker.settled:
        notes.append(
            f"{asker.settled} layers kept off bitsandbytes' AVX512-BF16 path, which fails on them"
        )
    return BehaviourResult(answers, (*findings, *behaviour_findings(answers)), tuple(notes))


def in_llama(containers: Iterable[GgufHeader], threads: int) -> BehaviourResult:
    """Load text models in llama.cpp, one at a time, and ask each all questions without pictures."""
    from qwen35.verification.asking_llama import LlamaAsker

    answers: list[Answer] = []
    findings: list[Finding] = []
    notes: dict[str, None] = {}
    for container in containers:
        file = container.path.name
        try:
            with LlamaAsker(container, threads) as asker:
                file_answers = list(ask(asker, image=False))
                notes |= dict.fromkeys(asker.notes)
        except InputError as error:
            findings.append(_refused(error))
            continue
        answers += [replace(answer, file=file) for answer in file_answers]
        findings += [
            replace(finding, subject=f"{file}: {finding.subject}")
            for finding in behaviour_findings(file_answers)
        ]
    note = "asked in llama.cpp, without pictures: the binding is built without vision support"
    return BehaviourResult(tuple(answers), tuple(findings), (note, *notes))
