"""What the page shows at once: commands, plans, types that fit, reports as pages."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import qwen35
from qwen35.api.plan_api import types_that_fit
from qwen35.display import cut, printable, size
from qwen35.errors import InputError, Qwen35Error, UsageError
from qwen35.planning.memory import peak_memory, threads_within
from qwen35.planning.output_plan import Plan
from qwen35.ui.actions import ACTIONS, FITTING, PLANNED, action_named

__all__ = ["dry_run", "preview", "report_page", "shown_command"]

T = TypeVar("T")


def shown_command(arguments: Sequence[str]) -> str:
    """Return a command as people type it, quoted for a shell."""
    return shlex.join(["qwen35", *arguments])


def dry_run(saved: str) -> list[str]:
    """Return what makes a dry run of publishing, which saves what it finds."""
    return ["--dry-run", "--save", saved]


def preview(name: Any, given: Any) -> dict[str, Any]:
    """Return the command of an action and, where it has a plan, the plan, or why there is none.

    Raises:
        UsageError: the values are none of the action's.
    """
    action = action_named(name)
    values = action.values(given)
    arguments = action.arguments(values)
    if name == "publish":
        arguments += dry_run("DIFFERENCE")
    shown: dict[str, Any] = {"command": shown_command(arguments)}
    try:
        if name in PLANNED:
            chosen = {key: values[key] for key in values if key in _names(name)}
            shown["plan_command"] = shown_command(PLANNED[name].arguments(chosen))
            PLANNED[name].require(chosen)
            shown["plan"] = _told(lambda: _plan(chosen))
        elif name == FITTING:
            action.require(values)
            shown["fit"] = _told(lambda: _fit(values))
    except Qwen35Error as error:
        shown["error"] = printable(str(error))
    return shown


def report_page(given: Any) -> str:
    """Return the page of one or more reports.

    Raises:
        UsageError: the values are none of the action's.
        InputError: a report cannot be read.
    """
    from qwen35.reporting.evaluation_page import ranking_page

    action = ACTIONS["report"]
    values = action.values(given)
    action.require(values)
    if "loss" in values:
        try:
            values["loss"] = float(values["loss"])
        except ValueError as error:
            expected = "a number of nats such as 0.03"
            raise UsageError("--loss", repr(values["loss"]), expected=expected) from error
    return _told(lambda: ranking_page(qwen35.report(**values)))


def _names(name: str) -> set[str]:
    return {field.name for field in PLANNED[name].fields}


def _told(work: Callable[[], T]) -> T:
    """Return the result of `work`; what the system refuses becomes a sentence."""
    try:
        return work()
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise InputError(cut(printable(str(error.filename or "a file")), 80), found) from error
    except MemoryError as error:
        raise InputError("memory", "not enough for this plan") from error


def _plan(values: Mapping[str, Any]) -> dict[str, Any]:
    memory, threads = values.get("memory"), values.get("threads")
    limit = _bytes(memory)
    keywords = {key: value for key, value in values.items() if key not in ("memory", "threads")}
    planned = qwen35.plan(**keywords)
    within = threads_within(lambda count: peak_memory(planned, count), threads, limit)
    container = planned.container
    return {
        "figures": [
            ["writes", size(planned.total_bytes)],
            ["reads", size(planned.read_bytes)],
            ["needs", f"about {size(peak_memory(planned, within))} of memory, {within} threads"],
        ],
        "shares": _shares(planned),
        "files": [[name, f"{nbytes:,}"] for name, nbytes in planned.all_sizes()],
        "notes": [printable(note) for note in planned.notes],
        "text": "\n".join(map(printable, container.text(planned, within).split("\n"))),
    }


def _bytes(memory: str | None) -> int | None:
    from qwen35.api.given_values import size_given

    return size_given("--memory", memory)


def _shares(plan: Plan) -> list[list[Any]]:
    """Return what the written bytes are: operation, bytes, size; the largest first."""
    found: Counter[str] = Counter()
    for step in plan.steps:
        for target in step.targets:
            found[target.op] += target.nbytes * len(target.files)
    return [[op, nbytes, size(nbytes)] for op, nbytes in found.most_common() if nbytes]


def _fit(values: Mapping[str, Any]) -> dict[str, Any]:
    found = types_that_fit(**values)
    rows = [
        [row.type, size(row.file_bytes), size(row.total_bytes), row.needs_imatrix]
        for row in found.types
    ]
    about = f"{size(found.kv_cache)} of it for a context of {found.context:,} tokens"
    return {"about": about, "rows": rows, "notes": [printable(note) for note in found.notes]}
