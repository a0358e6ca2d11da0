"""The address of a server, and the key for it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from qwen35.display import cut, printable
from qwen35.errors import UsageError
from qwen35.serving.hidden_keys import hide

__all__ = ["KEY_VARIABLE", "Endpoint"]

KEY_VARIABLE = "QWEN35_API_KEY"

_KEY = re.compile(r"[!-~]{1,4096}")
_API = re.compile(r"/v1(?:/(?:models|completions|chat(?:/completions)?))?/*$")
"""Of the API's own addresses, which are given as often as the server's."""

_LOCAL = ("127.0.0.1", "::1", "localhost")
_EXPECTED = "an address such as http://127.0.0.1:8000"
_LONGEST = 2048
_SECONDS, _MOST_SECONDS = 600, 7 * 86400


@dataclass(frozen=True)
class Endpoint:
    """A server of models.

    Args:
        url: its address without ``/v1`` and without a slash at the end.
        key: sent to this address alone, and never shown.
        seconds: in which each answer must be complete.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    seconds: float = _SECONDS

    def __post_init__(self) -> None:
        if self.key:
            hide(self.key)

    @classmethod
    def parse(
        cls, url: str, key_variable: str | None = None, timeout: int | None = None
    ) -> Endpoint:
        """Parse an address; take the key from an environment variable.

        Args:
            url: the address, with or without ``/v1`` or the path of a request.
            key_variable: name of the variable; by default `KEY_VARIABLE`, if it is set.
            timeout: seconds in which each answer must be complete; 600 if None.

        Raises:
            UsageError: it is no address of a server, there is no such variable, or the time is
                none or longer than a week.
        """
        parts = _split(url)
        seconds = _SECONDS if timeout is None else timeout
        if not 0 < seconds <= _MOST_SECONDS:
            expected = f"1 to {_MOST_SECONDS} seconds"
            found = "too long" if seconds > 0 else "no time"
            raise UsageError("--timeout", found, expected=expected)
        host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else str(parts.hostname)
        port = f":{parts.port}" if parts.port else ""
        path = _API.sub("", parts.path).rstrip("/")
        return cls(f"{parts.scheme}://{host}{port}{path}", _key(key_variable), seconds)

    @property
    def exposes_key(self) -> bool:
        """Whether the key travels unencrypted to another machine."""
        parts = urlsplit(self.url)
        return bool(self.key) and parts.scheme == "http" and parts.hostname not in _LOCAL


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")  # refuses empty and long labels, as connecting would
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
    try:
        found = os.environ.get("QWEN35_API_KEY") if variable is None else os.environ.get(variable)
    except UnicodeError:  # half characters, which no name has
        found = None
    value = (found or "").strip()
    if not value:
        if variable is not None:
            # What is given may be the key itself: it is not shown.
            found = "no variable of that name is set" if variable else "an empty name"
            hint = "give the name of a variable that holds the key, not the key"
            raise UsageError("--api-key-env", found, hint=hint)
        return None
    if not _KEY.fullmatch(value):
        subject = KEY_VARIABLE if variable is None else "--api-key-env"
        raise UsageError(subject, "holds no key", expected="letters, digits and signs of ASCII")
    return value
