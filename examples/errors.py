"""Catch expected errors and use their parts.

python examples/errors.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import qwen35
from qwen35.errors import InputError, OutputError, UsageError

TINY = Path(__file__).parent.parent / "assets" / "qwen3.5-tiny"


def main() -> None:
    """Provoke four errors."""
    try:
        qwen35.plan(TINY, recipe="nf5")
    except UsageError as error:  # subject, found, expected, hint
        print(f"{error.subject} | {error.found} | {error.expected}")

    with TemporaryDirectory() as folder:
        broken = Path(folder) / "config.json"
        broken.write_text("{")
        try:
            qwen35.inspect(folder)
        except InputError as error:
            print(type(error).__name__, str(error).replace(folder, "FOLDER"), sep=": ")
        try:
            qwen35.convert(TINY, folder)
        except OutputError as error:
            print(error.hint)

    try:
        qwen35.verify("no/such/folder/anywhere")
    except qwen35.Qwen35Error as error:  # the base class; any other exception is a bug
        print(error.found)


if __name__ == "__main__":
    main()
