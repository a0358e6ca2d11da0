"""Exceptions as plain JSON values: what fails in a worker is raised again in this process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from qwen35 import errors
from qwen35.errors import Qwen35Error

__all__ = ["Work", "WorkerBugError", "answered", "failure_json", "raise_failure"]

Work = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Does a job, which is plain JSON, and returns its answer, which is too."""


class WorkerBugError(Exception):
    """An unexpected exception in a worker, with its traceback."""


def answered(do: Callable[[Mapping[str, Any]], Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job; return ``done``, its result, or after an error ``failure``, for `raise_failure`."""
    try:
        return {"done": do(job)}
    except Exception as error:  # noqa: BLE001 - raised again by the dispatcher
        return {"failure": failure_json(error)}


def failure_json(error: BaseException) -> dict[str, Any]:
    """Return an exception as plain values."""
    if isinstance(error, Qwen35Error):
        # keep an OSError as the cause: by it `sinks.staging` decides whether a rerun can succeed
        cause = error.__cause__
        return {
            "kind": type(error).__name__,
            "said": [error.subject, error.found],
            "more": {"expected": error.expected, "hint": error.hint},
            "cause": failure_json(cause) if isinstance(cause, OSError) else None,
        }
    if isinstance(error, OSError) and error.errno is not None:
        name = None if error.filename is None else str(error.filename)
        return {"kind": "OSError", "said": [error.errno, error.strerror, name]}
    if isinstance(error, MemoryError):
        return {"kind": "MemoryError"}
    return {"kind": "", "trace": "".join(traceback.format_exception(error))}


def raise_failure(failure: Mapping[str, Any]) -> NoReturn:
    """Raise the exception that `failure_json` serialized.

    Raises:
        Qwen35Error: of the same class and message.
        OSError: of the same number and file.
        MemoryError: the worker ran out of memory.
        WorkerBugError: any other exception.
    """
    kind = failure["kind"]
    if kind == "OSError":
        raise _os_error(failure)
    if kind == "MemoryError":
        raise MemoryError
    if not kind:
        raise WorkerBugError(f"in a worker:\n{failure['trace']}")
    error: Qwen35Error = getattr(errors, kind)(*failure["said"], **failure["more"])
    raise error from (_os_error(failure["cause"]) if failure["cause"] else None)


def _os_error(failure: Mapping[str, Any]) -> OSError:
    return OSError(*failure["said"])
