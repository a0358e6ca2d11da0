"""Everything that can go wrong and is not a bug of ours.

    Qwen35Error
    +-- UsageError          a flag, a name or a recipe that does not exist or does not fit
    +-- InputError          what was given to read is damaged, incomplete or of another kind
    |   +-- HeaderError     a safetensors header or an index file
    |   +-- ConfigError     config.json
    |   +-- TensorError     a tensor: unknown, missing, of another shape, not finite
    +-- OutputError         where the output should go: exists, is full, is not writable
    +-- HubError            the Hub said no, or could not be reached
    +-- WorkerError         what does the work failed: a process died, a GPU ran out of memory

Only these become a sentence on the terminal (exit code 2). Any other exception keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

__all__ = [
    "ConfigError",
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
]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the one of `known` that is spelled most like `name`, or nothing.

    >>> did_you_mean("Convrt", ["convert", "plan"])
    'did you mean convert?'
    """
    import difflib

    names = {_plain(one): one for one in known}
    near = difflib.get_close_matches(_plain(name), names, n=1)
    return f"did you mean {names[near[0]]}?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


class Qwen35Error(Exception):
    """An expected failure, told in one sentence.

    Args:
        subject: the file, tensor or flag it is about.
        found: what is there.
        expected: what should be there instead, if that helps.
        hint: what to do next.
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
        """The sentence without its subject, which a finding names by itself."""
        text = f"{self.found}, expected {self.expected}" if self.expected else self.found
        return f"{text}; {self.hint}" if self.hint else text


class UsageError(Qwen35Error):
    """A flag, a name or a recipe that does not exist or does not fit."""


class InputError(Qwen35Error):
    """Something given to read is damaged, incomplete or of another kind."""


class HeaderError(InputError):
    """A safetensors header or an index file breaks the format's rules."""


class ConfigError(InputError):
    """config.json is missing, damaged or describes another model family."""


class TensorError(InputError):
    """A tensor is unknown, missing, of another shape, or not finite."""


class OutputError(Qwen35Error):
    """The output exists already, does not fit on the disk or cannot be written."""


class HubError(Qwen35Error):
    """The Hub refused, or could not be reached."""


class WorkerError(Qwen35Error):
    """A process died again and again, or a GPU ran out of memory: another try may succeed."""


@dataclass(frozen=True)
class Finding:
    """One thing a check found.

    Args:
        check: the short name of the check, stable for programs (``companions``).
        subject: the tensor or file.
        message: what was found and what was expected.
    """

    check: str
    subject: str
    message: str

    def to_json(self) -> dict[str, str]:
        """Return the finding as plain strings."""
        return asdict(self)
