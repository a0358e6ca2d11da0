"""Render chat templates: read a job from stdin, write a line of results for each template.

Templates come from strangers. Runs as a bounded child (`qwen35.planning.bounded_child`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

LONGEST = 2**20
"""Characters of one result."""

ALL = 2**22
"""Characters of all results of one template."""

SECONDS = 0.5
"""Processor time, which a busy machine does not change, for all conversations of one template;
whoever takes longer is not asked again. Published templates take a hundredth."""

_SLOW = "it takes too long"


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
    text = text.rstrip(": ")
    return ["error", text if len(text) <= 200 else f"{text[:197]}..."]


def _results(environment: Any, source: str, conversations: list[Any]) -> Iterator[list[str]]:
    try:
        template = environment.from_string(source)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's template raises is its result
        yield from [_said(error)] * len(conversations)
        return
    total, begin = 0, time.process_time()
    for done, variables in enumerate(conversations):
        result = _rendered(template, variables)
        total += len(result[1])
        if total > ALL:
            result = ["error", f"it writes more than {ALL} characters"]
        yield result
        if time.process_time() - begin > SECONDS:
            slow = result if result[0] == "error" else ["error", _SLOW]
            yield from [slow] * (len(conversations) - done - 1)
            return


def _rendered(template: Any, variables: dict[str, Any]) -> list[str]:
    try:
        text = template.render(**variables)
    except Exception as error:  # noqa: BLE001 - the same
        return _said(error)
    long = len(text) > LONGEST
    return ["error", f"it writes {len(text)} characters"] if long else ["text", text]


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
