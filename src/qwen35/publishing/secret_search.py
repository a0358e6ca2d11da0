"""Find secrets in files: by our own patterns, then by those of detect-secrets."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, Protocol

from qwen35.errors import Finding, InputError
from qwen35.publishing.keyed_secrets import (
    after_an_escape,
    ends_a_keyed_secret,
    is_named,
    unescaped,
)

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
    "a Hugging Face token of an organization": r"api_org_[A-Za-z0-9]{30,}",
    "an NVIDIA key": r"nvapi-[A-Za-z0-9_-]{40,}",
    "an npm token": r"npm_[A-Za-z0-9]{36}",
    "a Databricks token": r"dapi[0-9a-f]{32}",
    "a Replicate token": r"r8_[A-Za-z0-9]{37}",
    "a Groq key": r"gsk_[A-Za-z0-9]{40,}",
    "an xAI key": r"xai-[A-Za-z0-9]{60,}",
    "a Docker Hub token": r"dckr_[op]at_[A-Za-z0-9_-]{20,}",
    "a DigitalOcean token": r"do[op]_v1_[0-9a-f]{64}",
    "a Vault token": r"hvs\.[A-Za-z0-9_-]{24,}",
    "a Google OAuth token": r"ya29\.[A-Za-z0-9_-]{30,}",
    "an age key": r"AGE-SECRET-KEY-1[0-9A-Z]{50,}",
    "a password of .netrc": (
        r"machine\s{1,8}\S{1,100}\s{1,8}login\s{1,8}\S{1,100}\s{1,8}password\s{1,8}\S{8}"
    ),
    "a Weights & Biases login": r"wandb login [^\n]{0,80}?\b[0-9a-f]{40}\b",
    "a Google OAuth client secret": r"GOCSPX-[A-Za-z0-9_-]{28}",
    "a PuTTY key": r"PuTTY-User-Key-File-\d",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----",
}
"""Kind of secret to its pattern, which matches at the start of a word only.

Each pattern begins with a literal, which makes the search several times as fast.
"""

_PATTERNS = {name: re.compile(pattern.encode()) for name, pattern in SECRETS.items()}

_PIECE = 4 * 2**20
_OVERLAP = 4096
"""Bytes searched again with the next piece, for a secret on the border of two."""

_BINARY_BYTES = 16 * 2**20
"""Bytes searched in a binary file: its header, not its weights."""

_RECODED_BYTES = 64 * 2**20
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""What Windows writes: `>` of PowerShell 5, and Notepad's "Unicode"."""

_SHORTEST = 16
"""Nothing that a rule needs fits in fewer characters."""

_PLACEHOLDER = re.compile(rb"([A-Za-z0-9.*_])\1{7}")
"""What examples have in place of a token: ``hf_xxxxxxxxxx``."""

_LINE = 1024
"""Characters of a line that the library sees at a time: some of its patterns are quadratic."""

_LEFT_OUT = frozenset(
    {
        "ArtifactoryDetector",  # takes words like "APDocuments" for tokens
        "Base64HighEntropyString",
        "HexHighEntropyString",
        "IPPublicDetector",
        "KeywordDetector",  # takes `api_key="EMPTY"` for a key; keyed_secrets does not
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

_NEED_A_NAME = frozenset(
    {"CloudantDetector", "IbmCloudIamDetector", "IbmCosHmacDetector", "SoftlayerDetector"}
)
"""Detectors that find nothing without a name, and are slow to find that out."""


class _Detector(Protocol):
    @property
    def secret_type(self) -> str: ...

    def analyze_string(self, string: str) -> Iterator[str]: ...


def secrets(path: Path, name: str, token: str | None = None) -> Iterator[Finding]:
    """Yield a finding for each kind of secret in a file, with its line, without the secret.

    Text is searched to its end, UTF-16 and UTF-32 in their first 64 MiB, and a binary file in its
    first 16 MiB, without the library.

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
        with path.open("rb") as raw:
            file = _recoded(raw)
            binary = b"\0" in file.peek(8192)[:8192]  # as git tells binary files from text
            found = dict(_search(file, patterns, limit=_BINARY_BYTES if binary else None))
            file.seek(0)
            lines = _runs(file) if binary else _lines(file)
            taken = set() if binary else set(found.values())
            for kind, at in _search_lines(lines, library=not binary):
                if at not in taken:
                    found.setdefault(kind, at)
    except OSError as error:
        raise InputError(name, f"cannot be read ({error.strerror})") from error
    for kind, line in found.items():
        where = "" if binary else f"line {line} "
        yield Finding("secret", name, f"{where}holds what looks like {kind}")


def _recoded(file: io.BufferedReader) -> io.BufferedReader:
    """Return a text in UTF-16, or in UTF-32 with its mark, in UTF-8; any other as it is."""
    head = file.peek(4)[:4]
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    encoding = encoding or _unmarked(file.peek(8192)[:8192])
    if not encoding:
        return file
    text = file.read(_RECODED_BYTES).decode(encoding, "replace")
    return io.BufferedReader(io.BytesIO(text.encode(errors="replace")))


def _unmarked(head: bytes) -> str:
    """Return which UTF-16 a text without a mark is in, by where its zeros are; empty if none."""
    half, zeros = len(head) // 2, (head[::2].count(0), head[1::2].count(0))
    if min(zeros) > half // 10 or max(zeros) <= half * 9 // 10:
        return ""
    return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"


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
    for match in pattern.finditer(window):
        before = window[max(match.start() - 12, 0) : match.start()]
        whole = not before[-1:].isalnum() or after_an_escape(before)
        if whole and not _PLACEHOLDER.search(match[0]):
            return match.start()
    return None


def _search_lines(lines: Iterable[tuple[int, str]], *, library: bool) -> Iterator[tuple[str, int]]:
    """Yield each kind of secret that a telling name or detect-secrets finds, and its first line."""
    seen: set[str] = set()
    before = ""
    for number, raw in lines:
        text = unescaped(raw)
        if len(text) >= _SHORTEST:
            kind = next((kind for kind in _kinds(text, before, library) if kind not in seen), None)
            if kind:
                seen.add(kind)
                yield kind, number
        before = text if is_named(text) else ""


def _kinds(text: str, before: str, library: bool) -> Iterator[str]:
    named = is_named(text)
    if (named or before) and ends_a_keyed_secret(text, before):
        yield "a secret by its name"
    for detector in _detectors() if library else ():
        searched = named or type(detector).__name__ not in _NEED_A_NAME
        if searched and any(detector.analyze_string(text)):
            yield f"a secret ({detector.secret_type})"


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, long ones in overlapping parts."""
    number, rest = 1, b""
    while part := file.readline(_LINE - len(rest)):
        text = rest + part
        yield number, text.decode(errors="replace")
        ended = part.endswith(b"\n")
        number += ended
        rest = b"" if ended else text[-_LINE // 4 :]


def _runs(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the text within a binary file as lines, without their numbers."""
    for run in re.finditer(rb"[\t\x20-\x7e]{%d,}" % _SHORTEST, file.read(_BINARY_BYTES)):
        text = run[0].decode()
        for start in range(0, len(text), _LINE // 4 * 3):
            yield 0, f"{text[start : start + _LINE]}\n"


@cache
def _detectors() -> tuple[_Detector, ...]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    classes = get_mapping_from_secret_type_to_class().values()
    return tuple(found() for found in classes if found.__name__ not in _LEFT_OUT)
