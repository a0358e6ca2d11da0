"""Whether two tokenizers give the same tokens: by meaning, not by the text of their files."""

from __future__ import annotations

from qwen35.checkpoint.locations import FileLocation
from qwen35.errors import Finding
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.tokenizer_meaning import (
    CONFIG,
    TOKENIZER,
    TokenizerMeaning,
    tokenizer_meaning,
)

__all__ = ["compare_tokenizers"]

_CHECK = "tokenizer"


def compare_tokenizers(
    place: FileLocation, source: FileLocation, result: SettingsComparison
) -> None:
    """Compare vocabulary, merges, added and special tokens, the pipeline and the settings.

    Raises:
        InputError: a file is damaged.
    """
    here, there = tokenizer_meaning(place), tokenizer_meaning(source)
    if not there.vocabularies:
        result.skipped.append("tokenizer: the source has none")
        return
    if TOKENIZER in there.vocabularies and TOKENIZER not in here.vocabularies:
        message = "missing, the source has it"
        result.findings.append(Finding(_CHECK, TOKENIZER, message))
        return
    result.findings += _vocabularies(here, there)
    result.findings += _merges(here, there)
    result.findings += _added(here, there)
    result.differ(_CHECK, CONFIG, here.special, there.special)
    result.differ(_CHECK, TOKENIZER, here.pipeline, there.pipeline)
    lone = here.settings.keys() ^ there.settings.keys()
    result.differ(_CHECK, CONFIG, here.settings, there.settings, unknown=lone)


def _vocabularies(here: TokenizerMeaning, there: TokenizerMeaning) -> list[Finding]:
    """Compare each vocabulary with the source's from the same file, else with its first."""
    findings = []
    for name, ours in here.vocabularies.items():
        theirs = there.vocabularies.get(name) or next(iter(there.vocabularies.values()))
        if ours == theirs:
            continue
        wrong = [token for token in {**theirs, **ours} if ours.get(token) != theirs.get(token)]
        token = wrong[0]
        message = (
            f"{len(wrong)} tokens have different ids in the source: {token[:40]!r} has "
            f"{ours.get(token, 'none')} here, {theirs.get(token, 'none')} there"
        )
        findings.append(Finding(_CHECK, name, message))
    return findings


def _merges(here: TokenizerMeaning, there: TokenizerMeaning) -> list[Finding]:
    findings = []
    for name, ours in here.merges.items():
        theirs = there.merges.get(name)
        theirs = next(iter(there.merges.values()), []) if theirs is None else theirs
        if ours == theirs:
            continue
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        message = (
            f"{len(ours)} merges, the source has {len(theirs)}"
            if at is None
            else f"merge {at} is {' '.join(ours[at])[:40]!r}, the source has "
            f"{' '.join(theirs[at])[:40]!r}"
        )
        findings.append(Finding(_CHECK, name, message))
    return findings


def _added(here: TokenizerMeaning, there: TokenizerMeaning) -> list[Finding]:
    """Compare the added tokens of every file that names some."""
    findings, known = [], there.tokens()
    for name, tokens in here.added.items():
        for i, token in tokens.items():
            if not token.fits(known.get(i)) and not token.fits(there.added.get(name, {}).get(i)):
                other = known.get(i)
                found = "no such token" if other is None else f"{other.content[:40]!r}"
                same = other is not None and other.content == token.content
                message = f"added token {i} is {token.content[:40]!r}, the source has {found}"
                message += " with other flags" * same
                findings.append(Finding(_CHECK, name, message))
    # A loader may read tokenizer.json alone, so it must name the tokens by itself, as the source's.
    ours = here.tokens()
    if TOKENIZER in there.added:
        ours, known = dict(here.added.get(TOKENIZER, {})), dict(there.added[TOKENIZER])
    for i in sorted(known.keys() - ours.keys()):
        message = f"added token {i} is absent, the source has {known[i].content[:40]!r}"
        findings.append(Finding(_CHECK, TOKENIZER, message))
    return findings
