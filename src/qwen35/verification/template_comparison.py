"""Whether two chat templates write the same prompts, by rendering both on conversations."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from time import monotonic
from typing import Any

from qwen35.checkpoint.locations import FileLocation
from qwen35.errors import Finding, InputError
from qwen35.planning.safetensors_files.chat_template import text_only_template
from qwen35.verification.bounded_rendering import LIMITS, Rendered, render
from qwen35.verification.chat_prompts import ChatPrompts, special_tokens
from qwen35.verification.conversations import text_conversations, vision_conversations
from qwen35.verification.settings_comparison import SettingsComparison, settings_of, text_of

__all__ = ["compare_template", "compare_templates", "default_template", "stored_templates"]

_CHECK = "template"
_FILE = "chat_template.jinja"
_SETTINGS = ("tokenizer_config.json", "chat_template.json")
_DEFAULT = "default"
_MORE = "additional_chat_templates"
_MAX_BYTES = 2**20
_SHOWN = 3


def stored_templates(place: FileLocation) -> dict[tuple[str, str], str]:
    """Return the templates by file and name, in the order in which loaders prefer them.

    Raises:
        InputError: a file is damaged.
    """
    found: dict[tuple[str, str], str] = {}
    text = text_of(place, _FILE, _MAX_BYTES)
    if text is not None:
        found[_FILE, _DEFAULT] = text
    for file in _SETTINGS:
        stored = (settings_of(place, file) or {}).get("chat_template")
        found |= {(file, name): template for name, template in _named(stored).items()}
    return found


def _named(stored: Any) -> dict[str, str]:
    if isinstance(stored, str):
        return {_DEFAULT: stored}
    if isinstance(stored, list):
        rows = [row for row in stored if isinstance(row, dict)]
        stored = {str(row.get("name")): row.get("template") for row in rows}
    return (
        {k: v for k, v in stored.items() if isinstance(v, str)} if isinstance(stored, dict) else {}
    )


def default_template(
    templates: Mapping[tuple[str, str], str], name: str = _DEFAULT
) -> tuple[str, str] | None:
    """Return the file and the text of the template that a loader takes; None if there is none."""
    found = ((file, text) for (file, called), text in templates.items() if called == name)
    return next(found, None)


def compare_templates(
    place: FileLocation, source: FileLocation, *, vision: bool, result: SettingsComparison
) -> None:
    """Compare every stored template with the source's of that name.

    Raises:
        InputError: a file is damaged.
    """
    here, there = stored_templates(place), stored_templates(source)
    tokens, begin = special_tokens(source), monotonic()
    done: set[tuple[str, str]] = set()
    for (file, name), text in here.items():
        taken = any(name == other for other, _ in done)
        theirs = _counterpart(there, file, name, taken=taken)
        if (name, text) in done:
            continue
        if done and monotonic() > begin + LIMITS.seconds:  # any of them may be hostile
            result.skipped.append(f"{file}: more chat templates, after {len(done)} that took long")
            break
        done.add((name, text))
        if theirs is None:
            result.findings.append(Finding(_CHECK, file, "a chat template, the source has none"))
        else:
            told = name == _DEFAULT and not taken
            compare_template(file, text, theirs, tokens, vision=vision, told=told, result=result)
    if _MORE in (*place.folders(), *source.folders()):
        result.skipped.append(f"{_MORE}/: more chat templates, which transformers takes by name")
    for name in sorted({name for _, name in there} - {name for _, name in here}):
        message = f"no chat template {name!r}, the source has one"
        result.findings.append(Finding(_CHECK, _FILE, message))


def _counterpart(
    there: Mapping[tuple[str, str], str], file: str, name: str, *, taken: bool
) -> str | None:
    """Return the template of the source to compare with; None if it has none.

    That is the one its loader takes. If the artifact's loader takes another file's (`taken`), it is
    the one in the same file, which other engines prefer.
    """
    if taken and (file, name) in there:
        return there[file, name]
    found = default_template(there, name) or default_template(there)
    return found[1] if found else None


def compare_template(
    subject: str,
    here: str,
    there: str,
    tokens: Mapping[str, str],
    *,
    vision: bool,
    told: bool,
    result: SettingsComparison,
) -> None:
    """Compare two templates by text or, if it differs, by what they render for conversations.

    Args:
        subject: where the artifact's is.
        here: the artifact's.
        there: the source's.
        tokens: the source's special tokens, by name.
        vision: whether the artifact takes pictures.
        told: whether a template that takes no question is a finding already.
        result: receives findings and notes.
    """
    if here == there:
        return
    conversations = text_conversations() | (vision_conversations() if vision else {})
    try:
        variables = [{**tokens, **one} for one in conversations.values()]
        ours, theirs = render((here, there), variables)
    except InputError as error:
        if told and _refuses(subject, here, tokens):
            return
        message = f"differs from the source's and could not be compared: {error.message}"
        result.findings.append(Finding(_CHECK, subject, message))
        return
    if all(one.failed for one in ours) and not all(one.failed for one in theirs):
        if not (told and _refuses(subject, here, tokens)):
            message = f"refuses every conversation ({ours[0].text})"
            result.findings.append(Finding(_CHECK, subject, message))
        return
    wrong = [
        (name, one, other)
        for name, one, other in zip(conversations, ours, theirs, strict=True)
        if one.failed != other.failed or (not one.failed and one.text != other.text)
    ]
    for name, one, other in islice(wrong, _SHOWN):
        message = f"{name}: {_difference(one, other)}"
        result.findings.append(Finding(_CHECK, subject, message))
    if len(wrong) > _SHOWN:
        message = f"{len(wrong)} of {len(conversations)} conversations differ from the source's"
        result.findings.append(Finding(_CHECK, subject, message))
    if not wrong and here != _text_only(there):
        result.notes.append(
            f"{subject}: differs from the source's, but writes the same prompts for "
            f"{len(conversations)} conversations"
        )


def _refuses(subject: str, template: str, tokens: Mapping[str, str]) -> bool:
    try:
        ChatPrompts(subject, template, tokens)
    except InputError:
        return True
    return False


def _text_only(template: str) -> str | None:
    try:
        return text_only_template(template, _FILE)
    except InputError:
        return None


def _difference(one: Rendered, other: Rendered) -> str:
    """Return both results from a little before the first difference."""
    if one.failed != other.failed:
        failed = one if one.failed else other
        side = "is refused" if one.failed else "is refused only by the source's"
        return f"{side} ({failed.text})"
    pairs = zip(one.text, other.text, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.text), len(other.text)))
    start = max(at - 10, 0)
    ours, theirs = one.text[start : at + 30], other.text[start : at + 30]
    return f"writes {ours!r}, the source's {theirs!r}"
