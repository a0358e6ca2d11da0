"""Expected failures: everything that can go wrong without a bug in this package.

    Qwen35Error
    +-- UsageError          a flag, a name or a recipe that does not exist or does not fit
    +-- InputError          an input is damaged, incomplete or of the wrong kind
    |   +-- HeaderError     a safetensors header or an index file
    |   +-- ConfigError     config.json
    |   +-- TensorError     a tensor: unknown, missing, wrong shape, not finite
    +-- OutputError         the output exists, does not fit on the disk or cannot be written
    +-- HubError            the Hub refused a request or could not be reached
    +-- EndpointError       a server of models refused a request, failed or could not be reached
    +-- WorkerError         a worker process died, or a GPU ran out of memory

The command line prints these as one sentence and exits with 2; other exceptions keep their
traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "ConfigError",
    "EndpointError",
    "Finding",
    "HeaderError",
    "HubError",
    "InputError",
    "OutputError",
    "Qwen35Error",
    "TensorError",
    "UsageError",
    "WorkerError",
    "did_you_mean",
    "extra_hint",
    "unknown_name",
]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return a hint naming the candidate spelled most like `name`; empty if none is close.

    >>> did_you_mean("Convrt", ["convert", "plan"]), did_you_mean("q_proj", ["self_attn.q_proj"])
    ('did you mean convert?', 'did you mean self_attn.q_proj?')
    """
    import difflib  # only needed once something has failed

    wanted = _normalized(name)
    names = {_normalized(candidate): candidate for candidate in candidates}
    ends = sorted((known for known in names if wanted and known.endswith(f".{wanted}")), key=len)
    starts = sorted(
        (known for known in names if wanted and known.startswith(f"{wanted}-")), key=len
    )
    same = [wanted] if wanted in names else []
    close = difflib.get_close_matches(wanted, names, n=3)
    matches = same or ends or starts or [name for name in close if _rest_is_alike(wanted, name)]
    return f"did you mean {names[matches[0]]}?" if matches else ""


def _rest_is_alike(one: str, other: str) -> bool:
    """Whether two names are alike apart from words they share: a word alone, such as size, is not.

    >>> _rest_is_alike("max-shard-size", "mse-grid-size"), _rest_is_alike("max-size", "size")
    (False, True)
    """
    import difflib

    words, others = one.split("-"), other.split("-")
    rest = "-".join(word for word in words if word not in others)
    left = "-".join(word for word in others if word not in words)
    return not rest or not left or difflib.SequenceMatcher(None, rest, left).ratio() >= _ALIKE


_ALIKE = 0.5


def extra_hint(extra: str) -> str:
    """Return the hint on how to install an extra of this package, which no index has yet.

    >>> extra_hint("tune")
    "in your clone of qwen35: pip install '.[tune]'"
    """
    return f"in your clone of qwen35: pip install '.[{extra}]'"


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").lstrip("-")  # dashes would make any two options alike


class Qwen35Error(Exception):
    """An expected failure, reported in one sentence.

    Args:
        subject: the file, tensor or flag at fault.
        found: the actual state.
        expected: the required state, if that helps.
        hint: the next step for the user.
    """

    def __init__(self, subject: str, found: str, *, expected: str = "", hint: str = "") -> None:
        self.subject = subject
        self.found = found
        self.expected = expected
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.subject}: {self.message}"

    @property
    def message(self) -> str:
        """The sentence without its subject, which a `Finding` stores separately."""
        text = f"{self.found}, expected {self.expected}" if self.expected else self.found
        return f"{text}; {self.hint}" if self.hint else text


class UsageError(Qwen35Error):
    """A flag, a name or a recipe that does not exist or does not fit."""


def unknown_name(
    subject: str, name: object, known: Iterable[str], found: str = "", hint: str = ""
) -> UsageError:
    """Return the error for a name that is none of those `known`, with the one most like it.

    Args:
        subject: the flag or entry that holds it.
        name: the user's input.
        known: what it may be.
        found: what to call it; the name, if empty.
        hint: what to say if nothing is spelled like it.
    """
    names = list(known)
    shown = found or f"{str(name)[:80]!r} is unknown"
    near = did_you_mean(str(name)[:80], names) if len(names) > 1 else ""  # one says it already
    return UsageError(subject, shown, expected=", ".join(names), hint=near or hint)


class InputError(Qwen35Error):
    """An input is damaged, incomplete or of the wrong kind."""


class HeaderError(InputError):
    """A safetensors header or an index file breaks the format's rules."""


class ConfigError(InputError):
    """config.json is missing, damaged or describes another model family."""


class TensorError(InputError):
    """A tensor is unknown, missing, has the wrong shape or is not finite."""


class OutputError(Qwen35Error):
    """The output already exists, does not fit on the disk or cannot be written."""


class HubError(Qwen35Error):
    """The Hub refused a request or could not be reached."""


class EndpointError(Qwen35Error):
    """A server of models refused a request, failed, or could not be reached.

    Attributes:
        status: the HTTP status that it answered with; 0 if it did not answer properly.
    """

    status: int = 0

    @property
    def refused(self) -> bool:
        """Whether the server says that it does not do this, rather than that it failed."""
        return self.status in (400, 404, 405, 415, 422, 501)


class WorkerError(Qwen35Error):
    """A worker died repeatedly or a GPU ran out of memory; a retry may succeed."""


@dataclass(frozen=True)
class Finding:
    """One problem reported by a check.

    Args:
        check: short name of the check, stable for programs (``companions``).
        subject: the tensor or file.
        message: the actual and the expected state.
    """

    check: str
    subject: str
    message: str

    def to_json(self) -> dict[str, str]:
        """Return the finding as a dict of strings."""
        return {"check": self.check, "subject": self.subject, "message": self.message}
