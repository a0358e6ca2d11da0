"""Check a model where it is served: the questions for every artifact, and what servers add."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen35.checkpoint.locations import FileLocation
from qwen35.display import printable
from qwen35.errors import EndpointError, Finding
from qwen35.progress import Progress, Silent
from qwen35.serving.hidden_keys import hidden
from qwen35.serving.served_model import DraftCounts, ServedModel, draft_counts
from qwen35.serving.server_client import ServerClient
from qwen35.verification.asking_server import PATIENCE, ServerAsker
from qwen35.verification.behaviour import IMAGE, TASKS, Answer, ask, behaviour_findings
from qwen35.verification.chat_prompts import special_tokens
from qwen35.verification.conversations import text_conversations
from qwen35.verification.server_checks import SERVER_CHECKS
from qwen35.verification.server_interview import Interview, ServerCheck
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.template_comparison import (
    compare_template,
    default_template,
    stored_templates,
)
from qwen35.verification.template_switches import TemplateText

__all__ = ["ServedResult", "check_served"]

_SIGHTLESS = re.compile(
    r"(image|vision|multimodal).{0,60}(not supported|not enabled|unsupported)"
    r"|not support.{0,60}(image|vision|multimodal)|not a multimodal",
    re.IGNORECASE,
)
"""What servers say, also with HTTP 500, about pictures that they do not take: llama-server's "image
input is not supported - hint: ... you may need to provide the mmproj"."""

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

    def after(self, error: EndpointError | None) -> ServedResult:
        """Return the result with how the server ended meanwhile, first of the findings."""
        if error is None:
            return self
        return replace(
            self, findings=(Finding("request", "the server", error.found), *self.findings)
        )

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
    progress: Progress | None = None,
) -> ServedResult:
    """Ask a served model everything.

    Args:
        client: talks to the server.
        model: what it serves.
        source: the small files of the checkpoint that the model was made from.
        context: tokens of a long input to try; 0 for none.
        progress: receives questions.

    Raises:
        EndpointError: the server does not answer at all.
        InputError: the source's template cannot be read.
    """
    progress = progress or Silent()
    before = draft_counts(client)
    asker = ServerAsker(client, model)
    template = _template(model, source)
    interview = Interview(asker, template, context)
    checks = [check for check in SERVER_CHECKS if check.applies(interview)]
    progress.begin(f"asking {model.title}", len(TASKS) * len(asker.thinking) + len(checks))
    try:
        answers = tuple(_answers(asker, progress))
        asked: list[str] = []
        checked = list(_checked(interview, checks, asked, progress))
    finally:
        progress.end()
    failed = {question.prompt: error for question, error in asker.failed.items()}
    findings = [one for one in behaviour_findings(answers) if one.subject not in failed]
    findings += [
        Finding("request", prompt, error.message)
        for prompt, error in failed.items()
        if prompt != IMAGE.prompt or not _sightless(interview, error)
    ]
    findings += checked
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
        tuple(replace(one, message=printable(hidden(one.message))) for one in findings),
        tuple(printable(hidden(note)) for note in notes),
        spoken.accepted / spoken.drafted if spoken and spoken.drafted > 0 else None,
    )


def _answers(asker: ServerAsker, progress: Progress) -> Iterator[Answer]:
    """Ask all questions; the picture only if the server may take one."""
    for answer in ask(asker, image=asker.served.sees is not False):
        yield answer
        progress.advance(int(answer.question.image is None), answer.question.prompt)
        if asker.lost == PATIENCE:
            asker.notes.append("not asked: the other questions")
            return


def _template(model: ServedModel, source: FileLocation | None) -> TemplateText | None:
    """Return the chat template that the server should use: the source's, or its own."""
    if source is not None:
        found = default_template(stored_templates(source))
        if found is not None:
            return TemplateText(found[1], special_tokens(source))
    return TemplateText(model.template, {}) if model.template else None


def _checked(
    interview: Interview, checks: Sequence[ServerCheck], asked: list[str], progress: Progress
) -> Iterator[Finding]:
    lost = interview.asker.lost
    for check in checks:
        progress.advance(1, check.subject)
        if lost == PATIENCE:
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
    if not error.refused:
        return False
    interview.notes.append(f"{subject}: the server refuses it ({error.found})")
    return True


def _sightless(interview: Interview, error: EndpointError) -> bool:
    """Note that the server takes no pictures, if that is the error."""
    sees = interview.asker.served.sees
    if error.status == 500 and not sees and _SIGHTLESS.search(error.found):
        interview.notes.append(f"a picture: the server refuses it ({error.found})")
        return True
    return _unable(interview, "a picture", error)


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
    spoken = after.since(before) if before and after else None
    return spoken if spoken and 0 <= spoken.accepted <= spoken.drafted else None


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
    yield f"served as {model.title}: {model.described}"
    if spoken and spoken.drafted > 0:
        share = spoken.accepted / spoken.drafted
        yield f"{share:.0%} of {spoken.drafted:.0f} drafted tokens accepted"
    if source is None:
        yield "without --source the server's chat template is compared with no other"
    if client.endpoint.exposes_key:
        yield "the key travels unencrypted: the address begins with http://"
