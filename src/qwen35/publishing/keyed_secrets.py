"""Find secrets by the name before them: what configuration files, scripts and notebooks write."""

from __future__ import annotations

import re

__all__ = ["after_an_escape", "ends_a_keyed_secret", "is_named", "unescaped"]

_NAMED = re.compile(r"key|pwd|pw|pass|token|secret|auth|bearer", re.IGNORECASE)

_NAME = (
    r"(?:aws[\w-]{0,20}key|secret|passw(?:or)?d|passphrase"
    r"|(?:api|access|private|account|encryption|signing|storage)[_-]?key"
    r"|(?:auth|access|refresh|hub|hf|bot|api)[_-]?token)"
)
_NAMES = rf"{_NAME}[\w-]{{0,20}}"
_PLAIN = r"[\w+/.~-]{16,200}+={0,2}(?!\()"
_QUOTED = r"[\"'][\w+/.~!@#$%^&*?,;:=-]{16,200}+[\"']"
_VALUE = rf"[bfru]{{0,2}}({_QUOTED}|[\"']?{_PLAIN})"
_EQUALS = r"[\"']?\]?[ \t]{0,4}(?:=>|[:=]=?)[ \t]{0,4}(?:[>|(\\][+-]?\s{1,40})?"
_SHAPES = (
    rf"{_NAMES}{_EQUALS}{_VALUE}",
    # a pair: Kubernetes' name and value, an element's attributes, JSON's "name" and "value"
    rf"{_NAMES}[\"']?[\s,;]{{1,40}}[\"']?value[\"']?{_EQUALS}{_VALUE}",
    rf"\([\"']\w{{0,40}}{_NAMES}[\"'],\s{{0,4}}{_VALUE}",  # getenv("NAME", "VALUE")
    rf"<\w{{0,40}}{_NAMES}>\s{{0,4}}({_PLAIN})\s{{0,4}}</",
    rf"(?:\b(?:env|arg|setx?|setenv)[ \t]{{1,4}}\w{{0,40}}{_NAMES}|--[\w-]{{0,40}}{_NAME}"
    rf"|--token)[ \t]{{1,4}}{_VALUE}",
    rf"\bbearer[ \t]{{1,4}}({_PLAIN})",
    rf"\bauthorization{_EQUALS}[\"']?(?:basic|token)[ \t]{{1,4}}({_PLAIN})",
    rf"[\"']auth[\"'][ \t]{{0,4}}:[ \t]{{0,4}}({_QUOTED})",  # Docker's config.json
    rf"(?<![\w-])token{_EQUALS}(?=[\"']?\w*[a-z])(?=[\"']?\w*[A-Z]){_VALUE}",
)
_KEYED = [
    re.compile(shape, re.ASCII if "(?=" in shape else re.ASCII | re.IGNORECASE) for shape in _SHAPES
]
"""A name that promises a secret, given a value of 16 characters or more."""

_NO_SECRET = re.compile(
    r"\D*\Z|[^A-Za-z]*\Z"  # one word or number
    r"|.*://|[.~]{1,2}/|[$%@]\w+%?\Z|your[_-]|.*(.)\1{7}",  # a path, a variable, a placeholder
    re.IGNORECASE | re.ASCII,
)

_ESCAPES = re.compile(
    r"(?<!\\)\\++(?:([nrt])|u00([2-7][0-9a-f])|x([2-7][0-9a-f])|([\"'/]))|%(0[AD]|2[0267BF]|3[AD])",
    re.IGNORECASE,
)
_BEFORE = re.compile(
    rb"(?:\\[abefnrtv0]|[%=][0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}"
    rb"|\x1b\[[0-9;]{1,8}m)\Z"
)


def is_named(text: str) -> bool:
    """Return whether a text has a part of a name that promises a secret."""
    return _NAMED.search(text) is not None


def ends_a_keyed_secret(text: str, before: str = "") -> bool:
    """Return whether a line holds the end of a likely secret whose name stands before it.

    Args:
        text: the line, without escapes (`unescaped`).
        before: the line before.
    """
    whole = before + text
    return any(
        match.end() > len(before) and not _NO_SECRET.match(match[1].strip("\"'"))
        for shape in _KEYED
        for match in shape.finditer(whole)
    )


def unescaped(text: str) -> str:
    r"""Return a line of JSON, of JSON within JSON or of an address as the text that it means.

    >>> unescaped(r'key%3Da\nb\u003d\\"c\\"')
    'key=a b="c"'
    """
    return _ESCAPES.sub(_meant, text) if "\\" in text or "%" in text else text


def _meant(match: re.Match[str]) -> str:
    space, *codes, quote, percent = match.groups()
    code = next(filter(None, (*codes, percent)), "")
    # a line's end within a string is no end of the line
    return quote or ("" if space else chr(int(code, 16)).replace("\n", " ")) or " "


def after_an_escape(text: bytes) -> bool:
    r"""Return whether a text ends with an escape: in ``\nhf_``, the token does not start at n."""
    return _BEFORE.search(text[-12:]) is not None
