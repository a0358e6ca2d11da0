"""Load a tokenizer as engines do: read it from stdin, write why it does not load.

Runs as a bounded child (`qwen35.planning.bounded_child`).
"""

from __future__ import annotations

import sys


def main() -> None:
    """Load it; silence means that it loads."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return
    try:
        Tokenizer.from_buffer(sys.stdin.buffer.read())
    except Exception as error:  # noqa: BLE001 - whatever the library says against it
        sys.stdout.write(f"{error}"[:200] or type(error).__name__)


if __name__ == "__main__":
    main()
