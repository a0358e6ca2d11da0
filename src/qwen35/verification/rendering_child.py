"""Render chat templates: read a job from stdin, write a line of results for each template.

Templates come from strangers. Runs as a bounded child (`qwen35.planning.bounded_child`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

LONGEST = 2**20
"""Characters of one result."""

ALL = 2**22
"""Characters of all results of one template."""


def _environment() -> Any:
    """Return the environment that transformers renders in (5.23 ``chat_template_utils.py``)."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Marked(Extension):
        """``{% generation %}`` marks the assistant's text; here its body alone counts."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    def fail(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **more)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Marked, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = fail
    moment = datetime(2026, 1, 2, 3, 4, 5)
    environment.globals["strftime_now"] = moment.strftime
    return environment


def _said(error: Exception) -> list[str]:
    """Return the error; its own text may be as long or as hostile as the template likes."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - the same
        text = type(error).__name__
    return ["error", text[:200].rstrip(": ")]


def _results(environment: Any, source: str, conversations: list[Any]) -> Iterator[list[str]]:
    try:
        template = environment.from_string(source)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's template raises is its result
        yield from [_said(error)] * len(conversations)
        return
    total = 0
    for variables in conversations:
        try:
            text = template.render(**variables)
            total += len(text)
            long = len(text) > LONGEST or total > ALL
            yield ["error", f"it writes {len(text)} characters"] if long else ["text", text]
        except Exception as error:  # noqa: BLE001 - the same
            yield _said(error)


def main() -> None:
    """Render every template with every set of variables."""
    job = json.loads(sys.stdin.buffer.read())
    environment = _environment()
    for source in job["templates"]:
        # A line at a time: whoever ends this program knows which template it was about.
        results = list(_results(environment, source, job["with"]))
        sys.stdout.write(json.dumps(results) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
