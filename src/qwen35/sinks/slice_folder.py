"""A work folder that the slices of one output, independent runs, fill together.

Each slice locks its own journal while it runs. The first one writes the order, which all the others
must match. A slice never removes anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from qwen35.errors import OutputError
from qwen35.planning.key_differences import key_differences
from qwen35.planning.work_order import order_bytes
from qwen35.sinks.files import write_file
from qwen35.sinks.journal import Journal
from qwen35.sinks.staging import os_errors
from qwen35.sinks.work_folder import (
    FILES_NAME,
    JOURNAL_NAME,
    ORDER_NAME,
    claim,
    fsync_folder,
    open_folder,
    open_ours,
    work_path,
)

__all__ = ["joined", "read_order", "slice_name"]


def slice_name(number: int, count: int) -> str:
    """Return the name of a slice's journal."""
    return f"slice-{number}-of-{count}"


@contextmanager
def joined(out: Path, number: int, order: Mapping[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """Join the work folder of `out`; yield the folder of files and the slice's journal.

    Finished work stays, however the block ends.

    Args:
        out: the output, resolved.
        number: number of the slice, from 1.
        order: `qwen35.planning.work_order.order_of` with ``slices``, the number of slices.

    Raises:
        OutputError: the slice is running, the folder holds other work, or the folder cannot be
            written.
    """
    work = work_path(out)
    with os_errors(out):
        files = _files_folder(work)
        _agree(work, order)
        path = work / slice_name(number, order["slices"])
        with Journal(path, order["key"], home=work) as journal:
            if (work / JOURNAL_NAME).exists():
                if not journal:
                    path.unlink()
                raise OutputError(str(work), _WITHOUT, hint="remove this to start over")
            yield files, journal


def _files_folder(work: Path) -> Path:
    """Create the folders; retry if another run removes an empty one as a leftover."""
    claim(work)
    while not (work / FILES_NAME).is_dir():
        with suppress(FileNotFoundError):
            claim(work)
            with open_folder(work) as folder:
                with suppress(FileExistsError):
                    os.mkdir(FILES_NAME, dir_fd=folder)
                os.fsync(folder)
    return work / FILES_NAME


def _agree(work: Path, order: Mapping[str, Any]) -> None:
    """Write the order, or compare it with the existing one."""
    if not (work / ORDER_NAME).exists():
        # under a unique name first: several slices may start at once, and each reads a whole file
        temporary = work / f"{ORDER_NAME}.{uuid4().hex}"
        write_file(temporary, order_bytes(order))
        os.replace(temporary, work / ORDER_NAME)
        fsync_folder(work)
    existing = read_order(work)
    if existing == order:
        return
    if "slices" not in existing:
        raise OutputError(str(work), _WITHOUT, hint="remove this to start over")
    names = key_differences(existing["key"], order["key"])
    implied = ("check",) if "plan" in names else ()  # only a plan with FP8 is checked
    changed = [name for name in _WORDS if existing.get(name) != order.get(name)]
    names += [_WORDS[name] for name in changed if name not in implied]
    before, now = _inputs(existing), _inputs(order)
    names += [word for name, word in _INPUTS.items() if before.get(name) != now.get(name)]
    raise OutputError(
        str(work),
        f"holds slices of a run with another {' and another '.join(names or ['order'])}",
        hint="give all slices the same arguments, or remove this to start over",
    )


_WITHOUT = "holds a run without slices, or one that is being finalized"

_WORDS = {
    "slices": "number of slices",
    "overwrite": "--overwrite",
    "check": "--skip-verify",
    "root": "path to the source",
}
"""Keys of an order that its ``key`` does not cover, and their names in messages."""

_INPUTS = {
    "activations": "path to the statistics",
    "imatrix": "path to the importance matrix",
    "hessians": "path to the Hessians",
}


def _inputs(order: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = order.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def read_order(work: Path) -> dict[str, Any]:
    """Read the order in a work folder of slices.

    Raises:
        OutputError: it is missing or malformed.
    """
    try:
        order = json.loads(_content(work / ORDER_NAME))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        order = None
    if not isinstance(order, dict) or not isinstance(order.get("key"), dict):
        raise OutputError(str(work), "holds no order of slices", hint="nothing can be finalized")
    absent = () if "slices" in order else ("slices", "overwrite")  # then a run without slices
    for name, is_valid in _VALID.items():
        if name not in absent and not (name in order and is_valid(order[name])):
            found = f"holds a damaged order ({name})"
            raise OutputError(str(work), found, hint="remove this to start over")
    return order


def _content(path: Path) -> bytes:
    with os.fdopen(open_ours(path, os.O_RDONLY), "rb") as file:
        return file.read(_MAX_BYTES)  # what is longer is no JSON then


_MAX_BYTES = 2**26
_MAX_SLICES = 2**20
"""Bound on the slices of an order: each is a list of tasks."""

_VALID: dict[str, Callable[[Any], bool]] = {
    "key": lambda value: isinstance(value.get("tool version", {}), dict),
    "root": lambda value: isinstance(value, str),
    "repo": lambda value: value is None or isinstance(value, str),
    "revision": lambda value: value is None or isinstance(value, str),
    "task_bytes": lambda value: type(value) is int and value > 0,  # not isinstance: bool is an int
    "slices": lambda value: type(value) is int and 0 < value <= _MAX_SLICES,
    "overwrite": lambda value: isinstance(value, bool),
    "inputs": lambda value: (
        isinstance(value, dict)
        and value.keys() <= _INPUTS.keys()
        and all(isinstance(path, str) for path in value.values())
    ),
}
"""Checks of an order's values, so that a damaged file is an error and not a traceback."""
