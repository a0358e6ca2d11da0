"""Render chat templates as a separate program: read a job from stdin, write results to stdout.

Templates come from strangers. The program runs in its own interpreter without this package, under
limits of memory, time and files that it sets before it reads anything.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

LONGEST = 2**20
"""Characters of one result."""


def _limit(seconds: int, nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


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


def _render(template: Any, variables: dict[str, Any]) -> list[str]:
    try:
        text = template.render(**variables)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's template raises is its result
        return ["error", f"{type(error).__name__}: {error}"[:200]]
    return ["text", text] if len(text) <= LONGEST else ["error", f"{len(text)} characters"]


def main() -> None:
    """Render every template with every set of variables."""
    seconds, nbytes = map(int, sys.argv[1:])
    _limit(seconds, nbytes)
    job = json.load(sys.stdin)
    environment = _environment()
    results = []
    for source in job["templates"]:
        try:
            template = environment.from_string(source)
        except Exception as error:  # noqa: BLE001 - the same
            results.append([["error", f"{type(error).__name__}: {error}"[:200]]] * len(job["with"]))
            continue
        results.append([_render(template, variables) for variables in job["with"]])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
