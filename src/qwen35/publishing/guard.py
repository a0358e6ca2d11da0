"""Find files that must not be pushed, by name or by content."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from qwen35.errors import Finding, InputError

__all__ = ["SECRETS", "UNWANTED", "bad_name", "secrets", "unwanted"]

UNWANTED: dict[str, str] = {
    ".env": "an environment file",
    ".env.*": "an environment file",
    "*.env": "an environment file",
    ".envrc": "an environment file",
    ".netrc": "credentials",
    "_netrc": "credentials",
    ".pypirc": "credentials",
    ".npmrc": "credentials",
    ".git-credentials": "credentials",
    ".aws": "credentials",
    ".ssh": "credentials",
    ".gnupg": "credentials",
    ".kube": "credentials",
    ".docker": "credentials",
    "credentials": "credentials",
    "credentials.json": "credentials",
    "token": "a token file",
    "*.token": "a token file",
    "stored_tokens": "a token file",
    "*.pem": "a key",
    "*.key": "a key",
    "*.p12": "a key",
    "*.pfx": "a key",
    "*.jks": "a key",
    "*.keystore": "a key",
    "id_rsa*": "a key",
    "id_dsa*": "a key",
    "id_ecdsa*": "a key",
    "id_ed25519*": "a key",
    "*.partial": "a temporary file",
    "*.incomplete": "a temporary file",
    "*.tmp": "a temporary file",
    ".tmp*": "a temporary file",
    "*.temp": "a temporary file",
    "*.part": "a temporary file",
    "*.lock": "a temporary file",
    "*.log": "a log",
    "*.swp": "an editor's temporary file",
    "*~": "an editor's backup",
    "*.bak": "a backup",
    "*.orig": "a backup",
    "*.pyc": "compiled Python",
    "__pycache__": "compiled Python",
    ".ipynb_checkpoints": "a notebook's backup",
    ".ds_store": "a file manager's notes",
    "thumbs.db": "a file manager's notes",
    ".qwen35*": "a temporary file of qwen35",
}
"""Pattern for any part of a path, in lower case, to the kind of file."""

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
_PIECE = 4 * 2**20
_OVERLAP = 4096
"""Bytes searched again with the next piece, for a secret on the border of two."""

_BINARY_BYTES = 16 * 2**20
"""Bytes searched in a binary file: its header, not its weights."""


def bad_name(path: str) -> str:
    """Return why a repository must not have a file named `path`, or an empty string."""
    parts = path.split("/")
    if "" in parts or "." in parts or ".." in parts:
        return "not a plain relative path"
    if "\\" in path or ":" in parts[0] or not path.isprintable():
        return "a name that other systems read differently"
    if any(part.lower() in (".git", ".cache") for part in parts):
        return "in a folder of git or of the Hub's client"
    return ""


def unwanted(path: str) -> str:
    """Return the kind of file that must not be pushed, or an empty string.

    >>> unwanted("sub/.env"), unwanted("tokenizer.json")
    ('an environment file', '')
    """
    for part in PurePosixPath(path.lower()).parts:
        for pattern, kind in UNWANTED.items():
            if fnmatchcase(part, pattern):
                return kind
    return ""


def secrets(path: Path, name: str, token: str | None = None) -> Iterator[Finding]:
    """Yield a finding for each kind of secret in a file, without the secret itself.

    Text is searched to its end, a binary file in its first 16 MiB.

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
        yield from _search(path, name, patterns)
    except OSError as error:
        raise InputError(name, f"cannot be read ({error.strerror})") from error


def _search(path: Path, name: str, patterns: dict[str, re.Pattern[bytes]]) -> Iterator[Finding]:
    found: set[str] = set()
    with path.open("rb") as file:
        binary = b"\0" in file.peek(8192)[:8192]  # as git tells binary files from text
        rest, done = b"", 0
        while piece := file.read(_PIECE):
            window = rest + piece
            for kind, pattern in patterns.items():
                if kind not in found and _starts_word(pattern, window):
                    found.add(kind)
                    yield Finding("secret", name, f"holds what looks like {kind}")
            rest = window[-_OVERLAP:]
            done += len(piece)
            if binary and done >= _BINARY_BYTES:
                return


def _starts_word(pattern: re.Pattern[bytes], window: bytes) -> bool:
    starts = (match.start() for match in pattern.finditer(window))
    return any(start == 0 or not window[start - 1 : start].isalnum() for start in starts)
