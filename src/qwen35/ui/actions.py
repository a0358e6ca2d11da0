"""What the page offers: each action stands for one command, with some of its options."""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen35.api.plan_api import plan, types_that_fit
from qwen35.errors import UsageError, unknown_name

__all__ = ["ACTIONS", "FITTING", "PLANNED", "STARTED", "Action", "Field", "action_named"]

_LONGEST, _MOST = 4096, 64
_ORDERS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Classes of characters that change the order of others: a command would not be what it seems."""


@dataclass(frozen=True)
class Field:
    """One argument of a command.

    Args:
        name: the keyword of the API's function; its flag follows from it.
        label: what people call it.
        kind: ``text``, ``number``, ``flag`` (true or false) or ``list`` of texts.
        place: what a command line calls it, if it is no flag (``MODEL``).
        needed: whether the command needs it.
        joined: whether a list is one argument, with commas.
        rare: whether the page folds it away.
        hint: an example of a value.
    """

    name: str
    label: str
    kind: str = "text"
    place: str = ""
    needed: bool = False
    joined: bool = False
    rare: bool = False
    hint: str = ""

    @property
    def flag(self) -> str:
        """The flag, or what a command line calls the argument."""
        return self.place or f"--{self.name.replace('_', '-')}"

    def checked(self, value: Any) -> Any:
        """Return a value from the browser, which may be anything, as the API takes it.

        Raises:
            UsageError: it is not of the field's kind.
        """
        kinds: dict[str, type] = {"flag": bool, "list": list}
        kind = kinds.get(self.kind, str)
        if not isinstance(value, kind):
            expected = {bool: "true or false", list: "a list of texts"}.get(kind, "a text")
            raise UsageError(self.flag, f"is of type {type(value).__name__}", expected=expected)
        if isinstance(value, list):
            if len(value) > _MOST:
                raise UsageError(self.flag, f"{len(value)} values", expected=f"at most {_MOST}")
            return [text for text in map(self._text, value) if text]
        if isinstance(value, bool):
            return value
        text = self._text(value)
        if self.kind != "number" or not text:
            return text
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
            raise UsageError(self.flag, repr(text), expected="a positive number")
        return int(text)

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise UsageError(self.flag, f"holds {type(value).__name__}", expected="texts")
        if len(value) > _LONGEST:
            found, expected = f"{len(value)} characters", f"at most {_LONGEST}"
            raise UsageError(self.flag, found, expected=expected)
        if any(map(_is_control, value)):
            raise UsageError(self.flag, "holds control characters", hint="type it again")
        text = value.strip()
        if text.startswith("-"):
            hint = f"write ./{text} for a file of this name"
            raise UsageError(self.flag, f"{text!r} begins like an option", hint=hint)
        return text

    def words(self, value: Any) -> Iterator[str]:
        """Yield the words of a command for a checked value."""
        if self.place:
            yield from value if isinstance(value, list) else [value]
        elif isinstance(value, bool):
            yield self.flag
        elif isinstance(value, list) and not self.joined:
            for text in value:
                yield from (self.flag, text)
        else:
            yield from (self.flag, ",".join(value) if isinstance(value, list) else str(value))


def _is_control(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _ORDERS


@dataclass(frozen=True)
class Action:
    """A command with its fields; the first ones are its places, in order."""

    verb: str
    fields: tuple[Field, ...]

    def values(self, given: Any) -> dict[str, Any]:
        """Return keywords for the API: what is given and not empty.

        Raises:
            UsageError: a name or a value is none of the action's.
        """
        if not isinstance(given, dict):
            raise UsageError("values", f"are of type {type(given).__name__}", expected="an object")
        known = {field.name: field for field in self.fields}
        for name in given:
            if name not in known:
                raise unknown_name(self.verb, name, known)
        checked = {name: known[name].checked(value) for name, value in given.items()}
        empty: tuple[object, ...] = ("", [], False)
        return {name: value for name, value in checked.items() if value not in empty}

    def require(self, values: Mapping[str, Any]) -> None:
        """Refuse values without those that the command needs.

        Raises:
            UsageError: one is missing.
        """
        for field in self.fields:
            if field.needed and field.name not in values:
                raise UsageError(field.flag, "not given", hint=f"fill in {field.label}")

    def arguments(self, values: Mapping[str, Any]) -> list[str]:
        """Return the command without the program's name; what is missing has a name for people."""
        words = [self.verb]
        for field in self.fields:
            if field.name in values:
                words += field.words(values[field.name])
            elif field.needed:
                words += [field.place] if field.place else [field.flag, field.name.upper()]
        return words

    def within(self, verb: str, function: Callable[..., Any], *also: str) -> Action:
        """Return another verb's action, with those of these fields that its function takes."""
        names = {*inspect.signature(function).parameters, *also}
        return Action(verb, tuple(field for field in self.fields if field.name in names))


_MODEL = Field("model", "model", place="MODEL", needed=True)
_OUT = Field("out", "folder to write", place="OUT", needed=True, hint="qwen35-out")
_OUTDIR = Field("out", "folder to write", place="OUTDIR", needed=True, hint="qwen35-gguf")
_RECIPE = Field("recipe", "recipe", hint="a .toml file")
_SOURCE_CHANGES = (
    Field("adapter", "LoRA adapters to merge", "list", rare=True, hint="folders, one a line"),
    Field("mtp", "MTP layer", rare=True),
)
_MACHINE = (
    Field("threads", "threads", "number", rare=True, hint="all processors"),
    Field("memory", "memory of this machine to use", rare=True, hint="8GB"),
    Field("overwrite", "replace an output of qwen35", "flag", rare=True),
)

_CONVERT = Action(
    "convert",
    (
        *(_MODEL, _OUT, _RECIPE),
        Field("keep", "left unquantized", "list", rare=True, hint="roles, such as self_attn"),
        *_SOURCE_CHANGES,
        Field("activation_stats", "activation statistics", rare=True, hint="a file of calibrate"),
        *_MACHINE,
    ),
)
_GGUF = Action(
    "gguf",
    (
        *(_MODEL, _OUTDIR),
        Field("types", "types", "list", needed=True, joined=True),
        _RECIPE,
        Field("mmproj", "also the vision tower", "flag"),
        Field("imatrix", "importance matrix", hint="a file, or a folder of calibrate"),
        *_SOURCE_CHANGES,
        *_MACHINE,
    ),
)
_FIT = Action(
    "plan",
    (
        _MODEL,
        Field("fit", "memory to run it in", needed=True, hint="6GB"),
        Field("context", "tokens of context", "number", hint="32768"),
        *(field for field in _GGUF.fields if field.name not in ("model", "out", "types")),
    ),
)

ACTIONS: dict[str, Action] = {
    "convert": _CONVERT,
    "gguf": _GGUF,
    "fit": _FIT.within("plan", types_that_fit),
    "verify": Action(
        "verify",
        (
            Field("model", "artifact", place="MODEL", needed=True),
            Field("source", "made from", hint="the checkpoint, to compare with"),
            Field("depth", "depth"),
        ),
    ),
    "evaluate": Action(
        "evaluate",
        (
            Field("base", "unquantized model", place="BASE", needed=True),
            Field("candidates", "candidates", "list", place="CANDIDATE", hint="one a line"),
            Field("text", "text", needed=True, hint="wiki.test.raw"),
            Field("chunks", "chunks at most", "number", hint="the whole text"),
            Field("report", "folder for the report", hint="report"),
            Field("memory", "memory of this machine to use", rare=True, hint="16GB"),
            Field("overwrite", "replace a report there", "flag", rare=True),
        ),
    ),
    "report": Action(
        "report",
        (
            Field("reports", "reports", "list", place="REPORT", needed=True, hint="one a line"),
            Field("loss", "mean divergence to accept", hint="0.01"),
        ),
    ),
    "publish": Action(
        "publish",
        (
            Field("folder", "folder", place="DIR", needed=True),
            Field("repo", "repository", place="REPO", needed=True, hint="owner/name"),
            Field("private", "private, if it is new", "flag"),
            Field("base_model", "base named in the card", rare=True, hint="owner/name"),
            Field("message", "commit message", rare=True),
        ),
    ),
}
"""The actions by name; `fit` lists the types that fit a memory."""

STARTED = ("convert", "gguf", "verify", "evaluate", "publish")
"""What runs as a command of its own; the others show something at once."""

PLANNED: dict[str, Action] = {
    name: ACTIONS[name].within("plan", plan, "threads", "memory") for name in ("convert", "gguf")
}
"""What is planned while it is filled in, without where it goes."""

FITTING = "fit"


def action_named(name: Any, names: tuple[str, ...] = tuple(ACTIONS)) -> Action:
    """Return an action by the name that the browser gave.

    Raises:
        UsageError: it is none of `names`.
    """
    if not isinstance(name, str) or name not in names:
        raise unknown_name("action", name, names)
    return ACTIONS[name]
