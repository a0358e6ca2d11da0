"""The start of a bounded child: set limits, say where packages are, then run the program.

Runs in its own interpreter, without this package (`qwen35.planning.bounded_child`).
"""

from __future__ import annotations

import resource
import runpy
import sys


def _limit(what: int, most: int) -> None:
    """Lower a limit; one that is lower already stays."""
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def main() -> None:
    """Run the program that the arguments name."""
    program, seconds, nbytes, *folders = sys.argv[1:]
    _limit(resource.RLIMIT_CPU, int(float(seconds)) + 1)
    _limit(resource.RLIMIT_AS, int(nbytes))
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    sys.path += folders
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
