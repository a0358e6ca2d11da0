"""Publishing by the API, as a task of `hub_client`: push, look, push nothing, be refused."""

from __future__ import annotations

import json
from pathlib import Path

import qwen35
from qwen35.errors import InputError

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Publish the folder and print what came of it."""
    folder, repo = argv
    looked = qwen35.publish(folder, repo, mode="check")
    pushed = qwen35.publish(folder, repo, message="By the API")
    again = qwen35.publish(folder, repo, mode="diff")
    (Path(folder) / ".env").write_text("SECRET=1")
    try:
        qwen35.publish(folder, repo)
        refused = ""
    except InputError as error:
        refused = str(error)
    said = [looked.to_json(), pushed.to_json(), again.to_json()]
    print(json.dumps({"said": said, "text": pushed.text, "refused": refused}))
    return 0
