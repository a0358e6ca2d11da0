"""What must not be pushed: by name, or by what is in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from qwen35.errors import Finding, InputError

__all__ = ["SECRETS", "UNWANTED", "bad_name", "secrets", "unwanted"]

UNWANTED: dict[str, str] = {
    ".env": "environment file",
    ".env.*": "environment file",
    "*.env": "environment file",
    ".envrc": "environment file",
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
    "token": "token file",
    "*.token": "token file",
    "stored_tokens": "token file",
    "*.pem": "key",
    "*.key": "key",
    "*.p12": "key",
    "*.pfx": "key",
    "*.jks": "key",
    "*.keystore": "key",
    "id_rsa*": "key",
    "id_dsa*": "key",
    "id_ecdsa*": "key",
    "id_ed25519*": "key",
    "*.partial": "temporary file",
    "*.incomplete": "temporary file",
    "*.tmp": "temporary file",
    ".tmp*": "temporary file",
    "*.temp": "temporary file",
    "*.part": "temporary file",
    "*.lock": "temporary file",
    "*.log": "log",
    "*.swp": "editor's temporary file",
    "*~": "editor's backup",
    "*.bak": "backup",
    "*.orig": "backup",
    "*.pyc": "compiled Python",
    "__pycache__": "compiled Python",
    ".ipynb_checkpoints": "notebook's backup",
    ".ds_store": "file manager's notes",
    "thumbs.db": "file manager's notes",
    ".qwen35*": "temporary file of qwen35",
}
"""Pattern (of any part of a path, in lower case) to what it is."""

SECRETS: dict[str, str] = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": r"\bsk-(?:[a-z]{2,8}-)*[A-Za-z0-9_-]{32,}",
    "an AWS key id": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20}",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{20,}",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Weights & Biases key": r"(?i:wandb[\w \"':=.-]{0,24}[\"':= ])[0-9a-f]{40}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
}
"""What it is to what it looks like."""

_PATTERNS = {name: re.compile(pattern.encode()) for name, pattern in SECRETS.items()}
_PIECE = 4 * 2**20
_OVERLAP = 4096
_BINARY_BYTES = 16 * 2**20
"""How far a binary file is read: its header, not its weights."""


def bad_name(path: str) -> str:
    """Return why no file of a repository may be called `path`, or an empty string."""
    parts = path.split("/")
    if "" in parts or "." in parts or ".." in parts:
        return "not a plain relative path"
    if "\\" in path or ":" in parts[0] or not path.isprintable():
        return "a name that other systems read differently"
    if any(part.lower() in (".git", ".cache") for part in parts):
        return "in a folder of git's or of the Hub's client"
    return ""


def unwanted(path: str) -> str:
    """Return what a file of this name is that must not be pushed, or an empty string.

    >>> unwanted("sub/.env"), unwanted("tokenizer.json")
    ('environment file', '')
    """
    for part in PurePosixPath(path.lower()).parts:
        for pattern, kind in UNWANTED.items():
            if fnmatchcase(part, pattern):
                return kind
    return ""


def secrets(path: Path, name: str, token: str | None = None) -> Iterator[Finding]:
    """Yield a finding for each kind of secret in a file; never the secret itself.

    Text is read to its end, of a binary file the first 16 MiB.

    Args:
        path: the file.
        name: what findings call it.
        token: the token in use; it must not be in the file, whatever it looks like.

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
        binary = b"\0" in file.peek(8192)[:8192]
        rest, done = b"", 0
        while piece := file.read(_PIECE):
            window = rest + piece
            for kind, pattern in patterns.items():
                if kind not in found and pattern.search(window):
                    found.add(kind)
                    yield Finding("secret", name, f"holds what looks like {kind}")
            rest = window[-_OVERLAP:]
            done += len(piece)
            if binary and done >= _BINARY_BYTES:
                return
