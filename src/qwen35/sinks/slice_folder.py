"""One work folder that several independent runs, the slices of one, fill together.

Each has a journal of its own, which it holds while it runs; what all of them must agree on is the
order, which the first one leaves there. Nothing is ever removed by a slice.
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
from qwen35.planning.work_order import ORDER_NAME, order_bytes, other_names
from qwen35.sinks.files import write_file
from qwen35.sinks.journal import Journal, fsync_folder
from qwen35.sinks.staging import (
    FILES_NAME,
    JOURNAL_NAME,
    claim,
    os_errors,
    work_path,
)

__all__ = ["joined", "read_order", "slice_name"]


def slice_name(number: int, count: int) -> str:
    """Return the name of a slice's journal."""
    return f"slice-{number}-of-{count}"


@contextmanager
def joined(out: Path, number: int, order: Mapping[str, Any]) -> Iterator[tuple[Path, Journal]]:
    """Take part in the work folder of `out`; yields the folder of files, and a slice's journal.

    Whatever happens, what is finished stays.

    Args:
        out: the output, resolved.
        number: of the slice, from 1.
        order: `qwen35.planning.work_order.order_of` with ``slices``, their number.

    Raises:
        OutputError: the same slice is being run, the folder holds other work, or the disk refuses.
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
    """Make the folders; another run may just then take an empty one for a leftover."""
    files = work / FILES_NAME
    if work.is_symlink():
        claim(work)
    if files.is_symlink():
        raise OutputError(str(files), "is a link, expected a folder of ours", hint="remove it")
    while not files.is_dir():
        claim(work)
        with suppress(FileNotFoundError):
            files.mkdir(exist_ok=True)
            fsync_folder(work)
    return files


def _agree(work: Path, order: Mapping[str, Any]) -> None:
    """Leave the order, or compare with the one that is there."""
    if not (work / ORDER_NAME).exists():
        beside = work / f"{ORDER_NAME}.{uuid4().hex}"
        write_file(beside, order_bytes(order))
        os.replace(beside, work / ORDER_NAME)
        fsync_folder(work)
    found = read_order(work)
    if found == order:
        return
    if "slices" not in found:
        raise OutputError(str(work), _WITHOUT, hint="remove this to start over")
    names = other_names(found, order["key"])
    names += [word for name, word in _WORDS.items() if found.get(name) != order.get(name)]
    before, now = _inputs(found), _inputs(order)
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
"""What an order has beside the key of the work and what the plan tells already."""

_INPUTS = {"activations": "path to the statistics", "imatrix": "path to the importance matrix"}


def _inputs(order: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = order.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def read_order(work: Path) -> dict[str, Any]:
    """Read the order that slices left in a work folder.

    Raises:
        OutputError: there is none.
    """
    try:
        order = json.loads((work / ORDER_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        order = None
    if not isinstance(order, dict) or not isinstance(order.get("key"), dict):
        raise OutputError(str(work), "no order of slices in it", hint="nothing can be finalized")
    for name, sound in _SOUND.items():
        if name in order and not sound(order[name]):
            found = f"holds a damaged order ({name})"
            raise OutputError(str(work), found, hint="remove this to start over")
    return order


_SOUND: dict[str, Callable[[Any], bool]] = {
    "root": lambda value: isinstance(value, str),
    "repo": lambda value: value is None or isinstance(value, str),
    "revision": lambda value: value is None or isinstance(value, str),
    "task_bytes": lambda value: type(value) is int and value > 0,
    "slices": lambda value: type(value) is int and value > 0,
    "overwrite": lambda value: isinstance(value, bool),
    "inputs": lambda value: (
        isinstance(value, dict)
        and value.keys() <= _INPUTS.keys()
        and all(isinstance(path, str) for path in value.values())
    ),
}
"""What of an order must be so, whoever wrote it."""
