"""The address of a server, and the key for it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from qwen35.display import cut, printable
from qwen35.errors import UsageError

__all__ = ["KEY_VARIABLE", "Endpoint"]

KEY_VARIABLE = "QWEN35_API_KEY"

_KEY = re.compile(r"[!-~]{1,4096}")
_LOCAL = ("127.0.0.1", "::1", "localhost")
_EXPECTED = "an address such as http://127.0.0.1:8000"
_LONGEST = 2048


@dataclass(frozen=True)
class Endpoint:
    """A server of models.

    Args:
        url: its address without ``/v1`` and without a slash at the end.
        key: sent to this address alone, and never shown.
    """

    url: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, key_variable: str | None = None) -> Endpoint:
        """Parse an address; take the key from an environment variable.

        Args:
            url: the address, with or without ``/v1``.
            key_variable: name of the variable; by default `KEY_VARIABLE`, if it is set.

        Raises:
            UsageError: it is no address of a server, or there is no such variable.
        """
        parts = _split(url)
        host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else str(parts.hostname)
        port = f":{parts.port}" if parts.port else ""
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(f"{parts.scheme}://{host}{port}{path}", _key(key_variable))

    @property
    def exposes_key(self) -> bool:
        """Whether the key travels unencrypted to another machine."""
        parts = urlsplit(self.url)
        return bool(self.key) and parts.scheme == "http" and parts.hostname not in _LOCAL


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or len(url) > _LONGEST or not (url.isascii() and url.isprintable()):
        # What stands before an @ may be a password: it is not shown.
        shown = cut(printable(url.rpartition("@")[2]), 80)
        raise UsageError("--endpoint", repr(shown), expected=_EXPECTED)
    if "@" in parts.netloc or parts.query or parts.fragment:
        found = "an address with a user, a query or a fragment"
        hint = "a key comes from --api-key-env"
        raise UsageError("--endpoint", found, expected=_EXPECTED, hint=hint)
    return parts


def _key(variable: str | None) -> str | None:
    name = variable or KEY_VARIABLE
    found = os.environ.get("QWEN35_API_KEY") if variable is None else os.environ.get(variable)
    value = (found or "").strip()
    if not value:
        if variable is not None:
            found = f"no variable {cut(printable(name), 80)} is set"
            raise UsageError("--api-key-env", found, hint="export it, or leave the flag out")
        return None
    if not _KEY.fullmatch(value):
        raise UsageError(name, "holds no key", expected="letters, digits and signs of ASCII")
    return value
