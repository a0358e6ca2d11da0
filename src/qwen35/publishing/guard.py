"""Find files that must not be pushed by their names."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

__all__ = ["UNWANTED", "bad_name", "unwanted"]

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
    ".dockercfg": "credentials",
    ".azure": "credentials",
    ".gcloud": "credentials",
    ".boto": "credentials",
    ".s3cfg": "credentials",
    ".pgpass": "credentials",
    ".my.cnf": "credentials",
    ".htpasswd": "credentials",
    "kubeconfig": "credentials",
    "*.kubeconfig": "credentials",
    "application_default_credentials.json": "credentials",
    "service[-_]account*.json": "credentials",
    "secrets.*": "credentials",
    "client_secret*.json": "credentials",
    "rclone.conf": "credentials",
    ".mylogin.cnf": "credentials",
    ".databrickscfg": "credentials",
    "*.tfstate*": "credentials",
    "*.tfvars": "credentials",
    "password*.txt": "credentials",
    "credentials": "credentials",
    "credentials.json": "credentials",
    "token": "a token file",
    "*.token": "a token file",
    "stored_tokens": "a token file",
    ".vault-token": "a token file",
    "token.txt": "a token file",
    "token.json": "a token file",
    "hf_token*": "a token file",
    "*api_key.txt": "a token file",
    ".*_history": "a history of commands",
    ".history": "a history of commands",
    "*.pem": "a key",
    "*.key": "a key",
    "*.p12": "a key",
    "*.pfx": "a key",
    "*.jks": "a key",
    "*.keystore": "a key",
    "*.kdbx": "a key",
    "*.ppk": "a key",
    "*.ovpn": "a key",
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
