"""Install the core in every other Python that is here, and run it: `make test-pythons`.

    python tests/other_pythons.py ENVIRONMENTS

Looks for the versions in pyproject.toml's classifiers on PATH, among pyenv's and among uv's. What
is not here is named, not tried. Each gets an environment in the folder, made once, with the
package as it is in this tree. The test suite itself runs in one Python alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ASSET = ROOT / "assets" / "qwen3.5-tiny"
LINES = [
    "--version",
    "plan Qwen3.5-397B-A17B --recipe text-fp8",
    "convert ASSET nf4 --recipe nf4",
    "verify nf4 --source ASSET",
    "gguf ASSET gguf --types F16,Q4_K_M",
    "verify gguf --source ASSET",
]
IMPORTS = "import qwen35; [getattr(qwen35, name) for name in qwen35.__all__]"


def versions() -> list[str]:
    """Return the versions that this package says it runs on, such as ``3.12``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))


def candidates(version: str) -> Iterator[str]:
    """Yield programs that may be this version; pyenv puts names on PATH that run nothing."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))
    yield from filter(None, [shutil.which(f"python{version}")])
    if uv := shutil.which("uv"):
        command = [uv, "python", "find", "--no-python-downloads", version]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        yield from found.stdout.split()


def python_of(version: str) -> str | None:
    """Return a Python of this version, or None."""
    for program in candidates(version):
        command = [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if said.strip() == version:
            return program
    return None


def smoke(python: str, folder: Path) -> None:
    """Install the core in an environment, and run it in an empty folder."""
    if not (folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    inside = str(folder / "bin" / "python")
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    subprocess.run([*pip, "--editable", str(ROOT)], check=True)
    subprocess.run([inside, "-W", "error::SyntaxWarning", "-c", IMPORTS], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        for line in LINES:
            words = [word.replace("ASSET", str(ASSET)) for word in line.split()]
            command = [str(folder / "bin" / "qwen35"), *words]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{python}: qwen35 {line}\n{done.stdout}{done.stderr}")


def main(environments: str) -> int:
    """Try all versions but the one that runs this."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for version in versions():
        if version == own:
            print(f"Python {version}: runs the whole suite")
        elif python := python_of(version):
            started = time.monotonic()
            smoke(python, Path(environments).absolute() / version)
            print(f"Python {version}: core installed and run, {time.monotonic() - started:.0f} s")
        else:
            print(f"Python {version}: not here, not tried")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
