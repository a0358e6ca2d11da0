"""Open a page in the browser that plans, starts and watches the other commands.

It listens on 127.0.0.1 alone, and answers only to the address that it prints, which holds a
secret. What it starts ends with it (Ctrl-C).
"""

from __future__ import annotations

import argparse
import os
import webbrowser

from qwen35.cli.console import Console
from qwen35.ui.web_server import serve_page

EXAMPLES = {
    "open the page": "qwen35 ui",
    "on another machine, through `ssh -L 8735:127.0.0.1:8735`": (
        "qwen35 ui --port 8735 --no-browser"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--port", type=_port, default=0, metavar="N", help="port to listen on (default: a free one)"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="only print the address, open nothing"
    )


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the verb."""

    def ready(address: str) -> None:
        output.data(address, {"address": address})
        if not args.no_browser and _on_a_screen():
            webbrowser.open(address)

    serve_page(args.port, ready)
    return 0


def _port(text: str) -> int:
    """Parse a port; argparse prints the error."""
    if text.isascii() and text.isdecimal() and len(text) < 6 and int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}, expected a number below 65536")


def _on_a_screen() -> bool:
    """Whether a browser can open a window: one of text would take over the terminal."""
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
