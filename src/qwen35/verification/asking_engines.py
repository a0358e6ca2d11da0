"""Ask an artifact all questions: in transformers, in vLLM, or file by file in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.errors import Finding, InputError
from qwen35.progress import Progress, Silent
from qwen35.verification.asking_prompts import PromptedArtifact, PromptedModel
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.asking_vllm import VllmAsker, check_vllm
from qwen35.verification.behaviour import (
    TASKS,
    Answer,
    AnsweringModel,
    BehaviourResult,
    ask,
    behaviour_findings,
)
from qwen35.verification.subject import Engine

__all__ = ["check_engine", "in_engine", "in_llama", "prompted_file", "prompted_folder"]

_CONTEXT = 8192
"""Tokens of a prompt of one's own and its turn, in llama.cpp."""


def check_engine(engine: Engine | None) -> None:
    """Check that an engine that was asked for is installed, without importing it.

    Raises:
        UsageError: it is not installed.
    """
    if engine == "vllm":
        check_vllm()


def in_engine(
    engine: Engine | None, folder: Path, *, vision: bool, progress: Progress | None = None
) -> BehaviourResult:
    """Load a checkpoint in an engine (transformers by default) and ask all questions.

    What the engine, or the chat template, refuses is a finding. `progress` receives questions.
    """
    progress = progress or Silent()
    _begin(progress, folder.name, image=vision)
    try:
        if engine == "vllm":
            return _in_vllm(folder, vision, progress)
        return _in_transformers(folder, progress)
    except InputError as error:
        return BehaviourResult(findings=(_refused(error),))
    finally:
        progress.end()


def _begin(progress: Progress, name: str, *, image: bool) -> None:
    """Start the count of questions before loading, which takes as long as the answers."""
    progress.begin(f"asking {name}", image + 2 * len(TASKS))


def _asked(asker: AnsweringModel, progress: Progress, *, image: bool) -> Iterator[Answer]:
    for answer in ask(asker, image=image):
        progress.advance(1, answer.question.prompt)
        yield answer


def _refused(error: InputError) -> Finding:
    return Finding("load", error.subject, error.message)


def _in_vllm(folder: Path, vision: bool, progress: Progress) -> BehaviourResult:
    asker = VllmAsker(folder, vision=vision)
    answers = tuple(_asked(asker, progress, image=asker.vision))
    notes = ("asked in vLLM", *asker.notes)
    return BehaviourResult(answers, tuple(behaviour_findings(answers)), notes)


def _in_transformers(folder: Path, progress: Progress) -> BehaviourResult:
    asker = Asker(folder)
    findings = [
        Finding("load", name, "missing or unexpected when transformers loads it")
        for name in asker.missing
    ]
    answers = tuple(_asked(asker, progress, image=asker.vision))
    decoded = "decoded by qwen35, then " if asker.decoded else ""
    notes = [f"{decoded}asked in transformers, on the {asker.model.device.type}", *asker.notes]
    if asker.settled:
        notes.append(
            f"{asker.settled} layers kept off bitsandbytes' AVX512-BF16 path, which fails on them"
        )
    return BehaviourResult(answers, (*findings, *behaviour_findings(answers)), tuple(notes))


def in_llama(
    containers: Iterable[GgufHeader], threads: int, progress: Progress | None = None
) -> BehaviourResult:
    """Load text models in llama.cpp, one at a time, and ask each all questions without pictures."""
    from qwen35.verification.asking_llama import LlamaAsker

    progress = progress or Silent()
    answers: list[Answer] = []
    findings: list[Finding] = []
    notes: dict[str, None] = {}
    for container in containers:
        file = container.path.name
        _begin(progress, file, image=False)
        try:
            with LlamaAsker(container, threads) as asker:
                file_answers = list(_asked(asker, progress, image=False))
                notes |= dict.fromkeys(asker.notes)
        except InputError as error:
            findings.append(_refused(error))
            continue
        finally:
            progress.end()
        answers += [replace(answer, file=file) for answer in file_answers]
        findings += [
            replace(finding, subject=f"{file}: {finding.subject}")
            for finding in behaviour_findings(file_answers)
        ]
    note = "asked in llama.cpp, without pictures: the binding is built without vision support"
    return BehaviourResult(tuple(answers), tuple(findings), (note, *notes))


def prompted_folder(name: str, folder: Path) -> PromptedArtifact:
    """Return how to load a checkpoint in transformers for prompts."""
    return PromptedArtifact(name, "transformers", lambda: nullcontext(Asker(folder)))


def prompted_file(container: GgufHeader, threads: int) -> PromptedArtifact:
    """Return how to load a text model in llama.cpp for prompts."""

    def loaded() -> AbstractContextManager[PromptedModel]:
        from qwen35.verification.asking_llama import LlamaAsker

        return LlamaAsker(container, threads, _CONTEXT)

    return PromptedArtifact(container.path.name, "llama.cpp", loaded)
