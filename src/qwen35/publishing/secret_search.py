"""Find secrets in files: by our own patterns, then by those of detect-secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, Protocol

from qwen35.errors import Finding, InputError

__all__ = ["SECRETS", "secrets"]

SECRETS: dict[str, str] = {
    "a Hugging Face token": r"hf_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": r"sk-(?:[a-z]{2,8}-)*[A-Za-z0-9_-]{32,}",
    "an AWS key id": r"AKIA[0-9A-Z]{16}\b",
    "a temporary AWS key id": r"ASIA[0-9A-Z]{16}\b",
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{36}",
    "a fine-grained GitHub token": r"github_pat_[A-Za-z0-9_]{60,}",
    "a GitLab token": r"glpat-[A-Za-z0-9_-]{20}",
    "a Slack token": r"xox[abeoprs]-[A-Za-z0-9-]{20,}",
    "a Google API key": r"AIza[0-9A-Za-z_-]{35}",
    "a Weights & Biases key": r"WANDB_API_KEY\W{1,8}[0-9a-f]{40}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
"""Kind of secret to its pattern, which matches at the start of a word only.

Each pattern begins with a literal, which makes the search several times as fast.
"""

_PATTERNS = {name: re.compile(pattern.encode()) for name, pattern in SECRETS.items()}

_KEYED = re.compile(
    r"(?:aws\w{0,20}key|secret|passw(?:or)?d|passphrase|api_?key|access_?key|private_?key|account_?key"
    r"|(?:auth|access|refresh|hub|hf|bot|api)_?token)\w{0,20}"
    r"[\"']?[ \t]{0,4}(?:[:=]|=>|:=)[ \t]{0,4}[\"']?([\w+/.~-]{16,}={0,2})",
    re.IGNORECASE | re.ASCII,
)
"""A name that promises a secret, given a value of 16 characters or more."""

_PIECE = 4 * 2**20
_OVERLAP = 4096
"""Bytes searched again with the next piece, for a secret on the border of two."""

_BINARY_BYTES = 16 * 2**20
"""Bytes searched in a binary file: its header, not its weights."""

_LINE = 1024
"""Characters of a line that the library sees at a time: some of its patterns are quadratic."""

_LEFT_OUT = frozenset(
    {
        "ArtifactoryDetector",  # takes words like "APDocuments" for tokens
        "Base64HighEntropyString",
        "HexHighEntropyString",
        "IPPublicDetector",
        "KeywordDetector",  # takes `api_key="EMPTY"` for a key; _KEYED asks for a likely value
        # SECRETS has these, at the start of a word
        "AWSKeyDetector",
        "GitHubTokenDetector",
        "GitLabTokenDetector",
        "OpenAIDetector",
        "PrivateKeyDetector",
        "SlackDetector",
    }
)
"""Detectors of detect-secrets 1.5 that take vocabularies, hashes and examples for secrets."""

_NAMED = re.compile(r"key|pwd|pw|pass|token|secret", re.IGNORECASE)
_NEED_A_NAME = frozenset(
    {"CloudantDetector", "IbmCloudIamDetector", "IbmCosHmacDetector", "SoftlayerDetector"}
)
"""Detectors that find nothing without `_NAMED`, and are slow to find that out."""


class _Detector(Protocol):
    @property
    def secret_type(self) -> str: ...

    def analyze_string(self, string: str) -> Iterator[str]: ...


def secrets(path: Path, name: str, token: str | None = None) -> Iterator[Finding]:
    """Yield a finding for each kind of secret in a file, with its line, without the secret.

    Text is searched to its end, a binary file in its first 16 MiB and only by our own patterns.

    Args:
        path: the file.
        name: its name in findings.
        token: the token in use, which is searched for literally.

    Raises:
        InputError: it cannot be read.
    """
    patterns = dict(_PATTERNS)
    if token:
        patterns["the token in use"] = re.compile(re.escape(token.encode()))
    try:
        with path.open("rb") as file:
            binary = b"\0" in file.peek(8192)[:8192]  # as git tells binary files from text
            found = dict(_search(file, patterns, limit=_BINARY_BYTES if binary else None))
            if not binary:
                file.seek(0)
                lines = set(found.values())
                found |= {kind: at for kind, at in _search_lines(file) if at not in lines}
    except OSError as error:
        raise InputError(name, f"cannot be read ({error.strerror})") from error
    for kind, line in found.items():
        where = "" if binary else f"line {line} "
        yield Finding("secret", name, f"{where}holds what looks like {kind}")


def _search(
    file: BinaryIO, patterns: dict[str, re.Pattern[bytes]], *, limit: int | None
) -> Iterator[tuple[str, int]]:
    """Yield each kind of secret found by `patterns`, and the line of the first."""
    left = dict(patterns)
    rest, line, done = b"", 1, 0
    while piece := file.read(_PIECE):
        window = rest + piece
        for kind, pattern in list(left.items()):
            at = _start_of_word(pattern, window)
            if at is not None:
                del left[kind]
                yield kind, line + window.count(b"\n", 0, at)
        rest = window[-_OVERLAP:]
        line += window.count(b"\n") - rest.count(b"\n")
        done += len(piece)
        if limit is not None and done >= limit:
            return


def _start_of_word(pattern: re.Pattern[bytes], window: bytes) -> int | None:
    starts = (match.start() for match in pattern.finditer(window))
    return next((at for at in starts if at == 0 or not window[at - 1 : at].isalnum()), None)


def _search_lines(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """Yield each kind of secret that detect-secrets or a telling name finds, and its first line."""
    seen: set[str] = set()
    for number, text in _lines(file):
        kind = next((kind for kind in _kinds(text) if kind not in seen), None)
        if kind:
            seen.add(kind)
            yield kind, number


def _kinds(text: str) -> Iterator[str]:
    named = _NAMED.search(text)
    if named and any(map(_likely, _KEYED.findall(text))):
        yield "a secret by its name"
    for detector in _detectors():
        searched = named or type(detector).__name__ not in _NEED_A_NAME
        if searched and any(detector.analyze_string(text)):
            yield f"a secret ({detector.secret_type})"


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, long ones in overlapping parts."""
    number, rest = 1, b""
    while part := file.readline(_LINE - len(rest)):
        text = rest + part
        # nothing that a pattern needs fits in less
        if len(text) >= 16:
            yield number, text.decode(errors="replace")
        ended = part.endswith(b"\n")
        number += ended
        rest = b"" if ended else text[-_LINE // 4 :]


def _likely(value: str) -> bool:
    """Return whether a value may be a secret: letters and digits, not one word or number."""
    return bool(re.search(r"\d", value) and re.search(r"[A-Za-z]", value))


@cache
def _detectors() -> tuple[_Detector, ...]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    classes = get_mapping_from_secret_type_to_class().values()
    return tuple(found() for found in classes if found.__name__ not in _LEFT_OUT)
