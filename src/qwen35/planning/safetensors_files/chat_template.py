"""Make chat templates text-only, by editing their source.

The body of each branch taken for an image or a video (``{% if 'image' in item ... %}``) is replaced
by a single statement that raises an error. All other text stays in place, so text renders as
before. A ``set`` used only in those bodies is removed where that cannot change white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from qwen35.errors import InputError

__all__ = ["compiles", "text_only_template", "writes_vision"]

MAX_LENGTH = 2**17
_VISION_WORDS = {"image", "image_url", "video", "video_url"}
_ERROR = "{{- raise_exception('This is a text-only model: it takes no images and no videos.') }}"
_REPAIR = "repair the chat template of the source"
_WORD = re.compile(r"[A-Za-z_]\w*")
_ENDRAW = re.compile(r"\{%[-+]?\s*endraw")
_PAIRS = {"{%": "%}", "{{": "}}", "{#": "#}"}


class GenerationTag(Extension):
    """``{% generation %}``, which transformers adds to mark the assistant's output."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Parse the block's body and drop its tags."""
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


_ENVIRONMENT = Environment(  # noqa: S701 - only parses, never renders
    extensions=[GenerationTag, "jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class _Tag:
    """One ``{% ... %}``, ``{{ ... }}`` or ``{# ... #}``, with its position in the source."""

    start: int
    end: int
    kind: str
    content: str

    @property
    def word(self) -> str:
        """The keyword of a statement; empty for other tags."""
        match = _WORD.match(self.content) if self.kind == "{%" else None
        return match[0] if match else ""

    @property
    def rest(self) -> str:
        """A statement's text after the keyword."""
        return self.content.removeprefix(self.word).strip()


def find_tags(source: str) -> Iterator[_Tag]:
    """Yield the tags of a template that parses."""
    position = 0
    while (start := source.find("{", position)) >= 0:
        kind = source[start : start + 2]
        if kind not in _PAIRS:
            position = start + 1
            continue
        end = _closing(source, start + 2, kind)
        content = source[start + 2 : end - 2]
        content = content[1:] if content[:1] in ("-", "+") else content
        content = content[:-1] if content[-1:] in ("-", "+") and kind == "{%" else content
        tag = _Tag(start, end, kind, content.strip())
        yield tag
        position = end
        if tag.word == "raw":
            endraw = _ENDRAW.search(source, end)
            assert endraw is not None  # the template parses
            position = endraw.start()


def _closing(source: str, position: int, kind: str) -> int:
    """Return the end of the tag whose content starts at `position`, skipping strings."""
    closing = _PAIRS[kind]
    depth = 0
    while not (depth <= 0 and source.startswith(closing, position)):
        character = source[position]
        if kind != "{#":
            if character in "'\"":
                position = _string_end(source, position)
                continue
            depth += (character in "([{") - (character in ")]}")
        position += 1
    return position + 2


def _string_end(source: str, position: int) -> int:
    quote = source[position]
    position += 1
    while source[position] != quote:
        position += 2 if source[position] == "\\" else 1
    return position + 1


def _parse(source: str, name: str) -> nodes.Template:
    try:
        return _ENVIRONMENT.parse(source)
    except TemplateSyntaxError as error:
        raise InputError(
            name,
            f"not a valid Jinja template, line {error.lineno}: {error.message}",
            hint=_REPAIR,
        ) from error
    except ValueError as error:  # a number of more digits than Python reads
        raise InputError(name, f"not a valid Jinja template ({error})", hint=_REPAIR) from error


def compiles(source: str, name: str) -> None:
    """Check that a template parses. It is never compiled, let alone rendered, in this process.

    Raises:
        InputError: the template is far longer than any chat template, or does not parse; then the
            message gives the line.
    """
    _compiles(source, name)


@lru_cache(maxsize=16)  # several files have the same template, and each check asks again
def _compiles(source: str, name: str) -> None:
    with _depth(name):
        _parse_bounded(source, name)


@contextmanager
def _depth(name: str) -> Iterator[None]:
    """Refuse a template that is nested deeper than the parser, or a search of its tree, goes."""
    try:
        yield
    except RecursionError as error:
        raise InputError(name, "a Jinja template nested too deeply") from error


def _parse_bounded(source: str, name: str) -> nodes.Template:
    """Parse a stranger's template; parsing takes a second for 100,000 tags."""
    if len(source) > MAX_LENGTH:
        raise InputError(name, f"{len(source)} characters", expected=f"at most {MAX_LENGTH}")
    return _parse(source, name)


def _is_vision_test(node: nodes.Node) -> bool:
    """Return whether an expression is true only for images or videos."""
    if isinstance(node, nodes.Or):
        return _is_vision_test(node.left) and _is_vision_test(node.right)
    if isinstance(node, nodes.And):
        return _is_vision_test(node.left) or _is_vision_test(node.right)
    if not isinstance(node, nodes.Compare) or len(node.ops) != 1:
        return False
    operator = node.ops[0]
    if operator.op not in ("in", "eq"):
        return False
    sides = (node.expr, operator.expr) if operator.op == "eq" else (node.expr,)
    if any(isinstance(side, nodes.Const) and side.value in _VISION_WORDS for side in sides):
        return True
    choices = operator.expr
    if not isinstance(choices, nodes.List | nodes.Tuple) or not choices.items:
        return False
    return all(isinstance(c, nodes.Const) and c.value in _VISION_WORDS for c in choices.items)


def writes_vision(source: str) -> bool:
    """Return whether a template still contains image or video tokens."""
    return "<|image_pad|>" in source or "<|video_pad|>" in source


def _condition(expression: str, name: str) -> nodes.Node:
    parsed = _parse("{% if " + expression + " %}{% endif %}", name)
    statement = parsed.find(nodes.If)
    assert statement is not None  # written a line above
    return statement.test


@dataclass(frozen=True)
class _Edit:
    start: int
    end: int
    text: str


def _branch_edits(source: str, name: str) -> Iterator[_Edit]:
    """Yield a replacement for the body of each outermost vision branch."""
    branches: list[_Tag | None] = []  # the open ones: a vision branch by its tag, others as None
    for tag in find_tags(source):
        if tag.word in ("elif", "else", "endif", "endfor"):
            opened = branches.pop()
            if opened is not None:
                yield _Edit(opened.end, tag.start, _error_body(source[opened.end : tag.start]))
        if tag.word in ("if", "elif"):
            vision = not any(branches) and _is_vision_test(_condition(tag.rest, name))
            branches.append(tag if vision else None)
        elif tag.word in ("for", "else"):
            branches.append(None)


def _error_body(body: str) -> str:
    """Return the error statement with the surrounding white space of `body`."""
    before = body[: len(body) - len(body.lstrip())]
    after = body[len(body.rstrip()) :]
    return f"{before}{_ERROR}{after}"


def _apply(source: str, edits: list[_Edit]) -> str:
    for edit in sorted(edits, key=lambda e: -e.start):  # from the end: positions stay valid
        source = source[: edit.start] + edit.text + source[edit.end :]
    return source


def _read_names(parsed: nodes.Template) -> set[str]:
    names = {node.name for node in parsed.find_all(nodes.Name) if node.ctx == "load"}
    return names | {node.name for node in parsed.find_all(nodes.NSRef)}


def _dead_sets(source: str, dead: set[str]) -> Iterator[_Edit]:
    """Yield removals of ``{%- set x = ... %}`` for unused names, if white space cannot change."""
    tags = list(find_tags(source))
    for tag, following in pairwise(tags):
        target, assigned, _ = tag.rest.partition("=")
        if tag.word != "set" or not assigned or target.strip() not in dead:
            continue
        # Only where both tags strip the white space before them does the removal leave no trace.
        stripped = all(source[t.start + 2] == "-" for t in (tag, following))
        if stripped and not source[tag.end : following.start].strip():
            yield _Edit(tag.start, following.start, "")


def text_only_template(source: str, name: str) -> str:
    """Return the template with its image and video branches replaced by errors.

    Args:
        source: a Jinja chat template.
        name: its file, for error messages.

    Raises:
        InputError: the template is not valid Jinja, nested too deeply, or far longer than any
            chat template.
    """
    return _text_only(source, name)


@lru_cache(maxsize=16)  # plans, documents and checks all ask for it
def _text_only(source: str, name: str) -> str:
    with _depth(name):
        return _without_vision(source, name)


def _without_vision(source: str, name: str) -> str:
    before = _read_names(_parse_bounded(source, name))
    edits = list(_branch_edits(source, name))
    if not edits:
        return source
    result = _apply(source, edits)
    dead = before - _read_names(_parse(result, name))
    result = _apply(result, list(_dead_sets(result, dead)))
    _parse(result, name)
    return result
