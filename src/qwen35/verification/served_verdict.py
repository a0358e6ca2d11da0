"""Check a model where it is served: the questions for every artifact, and what servers add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen35.checkpoint.locations import FileLocation
from qwen35.display import printable
from qwen35.errors import EndpointError, Finding
from qwen35.serving.served_model import DraftCounts, ServedModel, draft_counts
from qwen35.serving.server_client import ServerClient
from qwen35.verification.asking_server import ServerAsker
from qwen35.verification.behaviour import IMAGE, Answer, ask, behaviour_findings
from qwen35.verification.chat_prompts import special_tokens
from qwen35.verification.conversations import text_conversations
from qwen35.verification.server_checks import SERVER_CHECKS
from qwen35.verification.server_interview import Interview
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.template_comparison import (
    compare_template,
    default_template,
    stored_templates,
)
from qwen35.verification.template_switches import TemplateText

__all__ = ["ServedResult", "check_served"]

_PATIENCE = 3
"""Requests in a row that a server may lose before the rest is not asked."""

_COMPARED = ("question", "system", "several turns", "tools")
"""Conversations that servers hand to a template unchanged."""


@dataclass(frozen=True)
class ServedResult:
    """What was found about a served model.

    Args:
        model: as the server describes it.
        url: of the server.
        answers: to the questions for every artifact.
        asked: what else was asked.
        findings: what is wrong.
        notes: how it was asked, and what the server does not do.
        acceptance: the share of drafted tokens that the model agreed with, if any were drafted.
    """

    model: ServedModel
    url: str
    answers: tuple[Answer, ...]
    asked: tuple[str, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    acceptance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what a verdict does not have elsewhere, as plain values."""
        described = {**self.model.to_json(), "acceptance": self.acceptance}
        return {"url": self.url, **described, "asked": list(self.asked)}


def check_served(
    client: ServerClient,
    model: ServedModel,
    *,
    source: FileLocation | None = None,
    context: int = 0,
) -> ServedResult:
    """Ask a served model everything.

    Args:
        client: talks to the server.
        model: what it serves.
        source: the small files of the checkpoint that the model was made from.
        context: tokens of a long input to try; 0 for none.

    Raises:
        EndpointError: the server does not answer at all.
        InputError: the source's template cannot be read.
    """
    before = draft_counts(client)
    asker = ServerAsker(client, model)
    template = _template(model, source)
    interview = Interview(asker, template, context)
    answers = tuple(_answers(asker))
    failed = {question.prompt: error for question, error in asker.failed.items()}
    findings = [one for one in behaviour_findings(answers) if one.subject not in failed]
    findings += [
        Finding("request", prompt, error.message)
        for prompt, error in failed.items()
        if prompt != IMAGE.prompt or not _unable(interview, "a picture", error)
    ]
    asked: list[str] = []
    findings += _checked(interview, asked)
    if source is not None:
        findings += _template_findings(interview, source)
    spoken = _drafted(client, before)
    findings += _draft_findings(spoken)
    notes = [*asker.notes, *interview.notes, *_told(client, model, source, spoken)]
    return ServedResult(
        model,
        client.endpoint.url,
        tuple(answer for answer in answers if answer.question.prompt not in failed),
        tuple(asked),
        tuple(findings),
        tuple(map(printable, notes)),
        spoken.accepted / spoken.drafted if spoken and spoken.drafted > 0 else None,
    )


def _answers(asker: ServerAsker) -> Iterator[Answer]:
    """Ask all questions; the picture only if the server may take one."""
    yield from ask(asker, image=asker.served.sees is not False)


def _template(model: ServedModel, source: FileLocation | None) -> TemplateText | None:
    """Return the chat template that the server should use: the source's, or its own."""
    if source is not None:
        found = default_template(stored_templates(source))
        if found is not None:
            return TemplateText(found[1], special_tokens(source))
    return TemplateText(model.template, {}) if model.template else None


def _checked(interview: Interview, asked: list[str]) -> Iterator[Finding]:
    lost = 0
    for check in (one for one in SERVER_CHECKS if one.applies(interview)):
        if lost == _PATIENCE:
            interview.notes.append(f"not asked: {check.subject}")
            continue
        try:
            messages = list(check.run(interview))
        except EndpointError as error:
            lost = lost + 1 if not error.status else 0
            if not _unable(interview, check.subject, error):
                yield Finding(check.name, check.subject, error.message)
            continue
        lost = 0
        asked.append(check.subject)
        yield from (Finding(check.name, check.subject, message) for message in messages)


def _unable(interview: Interview, subject: str, error: EndpointError) -> bool:
    """Note that the server does not do something, if that is the error."""
    found = error.found.casefold()
    pictures = any(word in found for word in ("image", "multimodal", "mmproj"))
    if not (error.refused or pictures):
        return False
    interview.notes.append(f"{subject}: the server refuses it ({error.found})")
    return True


# --- the chat template


def _template_findings(interview: Interview, source: FileLocation) -> Iterator[Finding]:
    """Compare the server's prompts with the source's, as far as it shows template or prompts."""
    asker, template = interview.asker, interview.template
    if asker.served.template and template:
        result = SettingsComparison()
        compare_template(
            "the server's chat template",
            asker.served.template,
            template.text,
            special_tokens(source),
            vision=bool(asker.served.sees),
            told=False,
            result=result,
        )
        interview.notes += result.notes
        yield from result.findings
    elif template:
        try:
            yield from _prompt_findings(asker, template)
        except EndpointError as error:
            interview.notes.append(f"the server does not show its prompts ({error.found})")


def _whole_tools(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out tools without a description: vLLM writes ``null`` for a missing one."""
    tools = variables.get("tools")
    whole = tools and [tool for tool in tools if "description" in tool["function"]]
    return {**variables, "tools": whole}


def _prompt_findings(asker: ServerAsker, template: TemplateText) -> Iterator[Finding]:
    conversations = text_conversations()
    chosen = {
        name: _whole_tools(one)
        for name, one in conversations.items()
        if name.partition(",")[0] in _COMPARED and one["add_generation_prompt"]
    }
    prompts = template.prompts(list(chosen.values()))
    for (name, variables), wanted in zip(chosen.items(), prompts, strict=True):
        if wanted is None:
            continue
        written = asker.prompt(variables)
        if written is None:
            return
        if written != wanted:
            place = next(
                (i for i, (a, b) in enumerate(zip(written, wanted, strict=False)) if a != b),
                min(len(written), len(wanted)),
            )
            start = max(place - 10, 0)
            one, other = written[start : place + 30], wanted[start : place + 30]
            message = f"{name}: the server writes {one!r}, the source's template {other!r}"
            yield Finding("template", "the server's prompt", message)
            return


# --- speculative decoding


def _drafted(client: ServerClient, before: DraftCounts | None) -> DraftCounts | None:
    after = draft_counts(client) if before else None
    return after.since(before) if before and after else None


def _draft_findings(spoken: DraftCounts | None) -> Iterator[Finding]:
    if spoken and spoken.drafted > 0 and spoken.accepted <= 0:
        message = (
            f"{spoken.drafted:.0f} tokens drafted, none accepted (acceptance length 1.0): are the "
            "weights of the MTP layer or the draft model in what is served?"
        )
        yield Finding("speculation", "drafted tokens", message)


def _told(
    client: ServerClient,
    model: ServedModel,
    source: FileLocation | None,
    spoken: DraftCounts | None,
) -> Iterator[str]:
    yield f"served as {model.name}: {model.described}"
    if spoken and spoken.drafted > 0:
        share = spoken.accepted / spoken.drafted
        yield f"{share:.0%} of {spoken.drafted:.0f} drafted tokens accepted"
    if source is None:
        yield "without --source the server's chat template is compared with no other"
    if client.endpoint.exposes_key:
        yield "the key travels unencrypted: the address begins with http://"
