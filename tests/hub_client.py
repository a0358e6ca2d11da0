"""Commands in a process of their own that talks to a Hub named by HF_ENDPOINT.

The process lives for many commands, so that its imports are paid for once; whatever the client
would sleep between two tries is cut short.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import qwen35
from fake_hub import FakeHub, Repo
from patience import PATIENCE

__all__ = ["CONTENT", "REPO", "Client", "Done", "World", "environment", "files_in"]

_LONGEST_SLEEP = 0.02

REPO = "owner/artifact"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Parse what it printed."""
        return json.loads(self.out)


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    """Return the environment of a command that knows no Hub but this."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(Path(qwen35.__file__).parents[1]), str(HERE)]),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(home / "cache"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


HERE = Path(__file__).parent


class Client:
    """The process; `run` runs one command in it.

    Args:
        hub: the only Hub it knows.
        home: where it keeps its caches.
        settings: what is otherwise in its environment.
    """

    def __init__(self, hub: FakeHub, home: Path, **settings: str) -> None:
        self.token: str | None = hub.token
        self.home = home
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "hub_client.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(hub, home) | settings,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        assert self._process.stdout
        self._process.stdout.close()

    def start(self, *arguments: object, entry: str = "qwen35.cli.main:main") -> None:
        """Send a command; `finish` waits for it."""
        task = {"argv": [str(a) for a in arguments], "entry": entry, "token": self.token}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def finish(self) -> Done:
        """Wait for the command that was sent."""
        assert self._process.stdout
        return Done(**json.loads(self._process.stdout.readline()))

    def run(self, *arguments: object, entry: str = "qwen35.cli.main:main") -> Done:
        """Run a command."""
        self.start(*arguments, entry=entry)
        return self.finish()


@dataclass
class World:
    """A Hub, a client and a folder to publish.

    Args:
        hub: the server.
        client: the process.
        tmp: the test's own folder.
        folder: a small artifact.
    """

    hub: FakeHub
    client: Client
    tmp: Path
    folder: Path

    @classmethod
    def fresh(cls, hub: FakeHub, client: Client, tmp: Path) -> Self:
        """Empty the Hub and write the artifact."""
        hub.repos.clear()
        hub.faults.clear()
        hub.requests.clear()
        hub.page = 1000
        hub.folder = tmp / "store"
        client.token = hub.token
        folder = tmp / "artifact"
        (folder / "onnx").mkdir(parents=True)
        for name, content in CONTENT.items():
            (folder / name).write_bytes(content)
        return cls(hub, client, tmp, folder)

    @property
    def repo(self) -> Repo:
        """The repository that tests publish to."""
        return self.hub.repos[REPO]

    def publish(self, *arguments: object, folder: Path | None = None) -> Done:
        """Run `qwen35 publish` on the folder and the repository."""
        return self.client.run("publish", folder or self.folder, REPO, *arguments)

    def pushed(self, *arguments: object) -> Done:
        """Publish; it must work. Forget the requests."""
        done = self.publish(*arguments)
        assert done.code == 0, done.err
        self.hub.requests.clear()
        return done

    def refused(self, *arguments: object, folder: Path | None = None) -> str:
        """Publish; it must be refused in one sentence, which is returned."""
        done = self.publish(*arguments, folder=folder)
        assert done.code == 2, done.out + done.err
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.err
        assert "Traceback" not in done.err
        return errors[0].removeprefix("error: ")

    def remote(self) -> dict[str, bytes]:
        """Return what the repository holds, but for the Hub's own file."""
        return {n: self.repo.read(n) for n in self.repo.files if n != ".gitattributes"}


CONTENT = {
    "config.json": b'{"model_type": "qwen3_5"}',
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 30,
    "notes.md": b"# Notes",
    "onnx/graph.txt": b"deep inside",
}


def files_in(folder: Path) -> dict[str, bytes]:
    """Return what a folder holds."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _run(task: dict[str, Any]) -> Done:
    os.environ.pop("HF_TOKEN", None)
    if task["token"]:
        os.environ["HF_TOKEN"] = task["token"]
    out, err = io.StringIO(), io.StringIO()
    module, name = task["entry"].split(":")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = getattr(importlib.import_module(module), name)(task["argv"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:  # noqa: BLE001 - a bug: the test shows its traceback
            traceback.print_exc()
            code = 99
    return Done(code, out.getvalue(), err.getvalue())


def _main() -> None:
    real = time.sleep

    def short(seconds: float) -> None:
        real(min(seconds, _LONGEST_SLEEP))

    time.sleep = short  # type: ignore[assignment]
    answers = sys.stdout
    for line in sys.stdin:
        done = _run(json.loads(line))
        answers.write(json.dumps({"code": done.code, "out": done.out, "err": done.err}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
