"""A program that starts a fake server on a port, with a child that outlives signals to it alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from fake_server import Asked, FakeServer, Turn, serving


def main(port: str, children: str, deadly: str = "") -> None:
    """Serve; a question with the words `deadly` ends the program."""

    def change(asked: Asked, turn: Turn) -> Turn:
        if deadly and deadly in asked.text:
            sys.stderr.write("no memory is left\n")
            os._exit(7)
        return turn

    child = subprocess.Popen(["sleep", "600"])
    Path(children).write_text(f"{child.pid}\n")
    with serving(FakeServer(change=change, port=int(port))):
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
