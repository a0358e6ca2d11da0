"""The package: what is built, installed and works away from the tree; what the core needs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from checkpoints import ASSET
from qwen35.version import __version__

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DATA = (".css", ".jinja", ".js", ".toml", "py.typed")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a program that must succeed; return what it wrote to stdout."""
    kept = {key: os.environ[key] for key in ("HOME", "PATH", "TMPDIR") if key in os.environ}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist, and a wheel made from it, both without network; by their suffix."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tree / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", tree]
    run(*build, cwd=folder)
    return {path.suffix: path for path in (folder / "dist").iterdir()}


def test_names_carry_the_version(built: dict[str, Path]) -> None:
    assert built[".whl"].name == f"qwen35-{__version__}-py3-none-any.whl"
    assert built[".gz"].name == f"qwen35-{__version__}.tar.gz"


def test_the_wheel_holds_the_package_and_all_its_data(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(n for n in wheel.namelist() if n.endswith("/METADATA"))
        text = wheel.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    source = ROOT / "src"
    wanted = {
        str(path.relative_to(source))
        for path in (source / "qwen35").rglob("*")
        if path.suffix == ".py" or path.name.endswith(DATA)
    }
    assert held == wanted
    assert sum(name.endswith(DATA) for name in held) > 12
    assert "License-Expression: Apache-2.0" in text
    for extra in PROJECT["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in text


def test_no_file_of_the_package_is_of_a_kind_that_nobody_packs() -> None:
    tracked = run("git", "ls-files", "src/qwen35", cwd=ROOT).split()
    assert all(name.endswith((".py", *DATA)) for name in tracked)


def test_the_sdist_is_enough_to_build_from(built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/qwen35/py.typed"} <= names


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and the libraries of this one; its folder of programs."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--no-compile", built[".whl"], cwd=folder.parent)
    paths = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    paths |= {path for path in sys.path if path.endswith("site-packages")}
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text("\n".join(sorted(paths)))
    return folder / "bin"


def test_the_wheel_works_away_from_the_tree(installed: Path, tmp_path: Path) -> None:
    def qwen35(*arguments: str | Path) -> str:
        return run(installed / "qwen35", *arguments, cwd=tmp_path)

    where = run(installed / "python", "-c", "import qwen35; print(qwen35.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert qwen35("--version") == f"qwen35 {__version__}\n"
    assert "186 weights in NF4" in qwen35("plan", "Qwen3.5-0.8B", "--recipe", "text-nf4")
    made = json.loads(qwen35("convert", ASSET, "out", "--recipe", "nf4", "--json", "--quiet"))
    assert made["nf4"] > 0
    assert "passed" in qwen35("verify", "out", "--source", ASSET)
    assert json.loads(qwen35("gguf", ASSET, "g", "--types", "F16", "--json"))["bytes"] > 10**6
    api = "import qwen35; print(qwen35.plan('Qwen3.5-9B', recipe='fp8').recipe.format)"
    assert run(installed / "python", "-c", api, cwd=tmp_path) == "fp8\n"


def test_every_old_name_is_a_program(installed: Path, tmp_path: Path) -> None:
    for name in PROJECT["scripts"]:
        assert (installed / name).is_file()
    assert "usage: qwen35-strip " in run(installed / "qwen35-strip", "--help", cwd=tmp_path)


# --- one version, and what needs what


def test_the_version_is_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    tracked = run("git", "ls-files", "src", "*.toml", "*.cff", "Makefile", cwd=ROOT).split()
    quoted = re.compile(rf"""["']{re.escape(__version__)}["']""")
    holding = [name for name in tracked if quoted.search((ROOT / name).read_text())]
    assert holding == ["src/qwen35/version.py"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0]
    assert newest == __version__
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    assert all("### Changed bytes" in section for section in sections)


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found[0].lower().replace("_", "-")


def imports() -> Iterator[tuple[Path, str, bool]]:
    """Yield module, top-level name, and whether importing the module is enough to need it."""
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                yield path, name.partition(".")[0], id(node) in top


def test_everything_imported_is_declared() -> None:
    distributions = packages_distributions()
    core = {name_of(row) for row in PROJECT["dependencies"]}
    extras = {name_of(row) for rows in PROJECT["optional-dependencies"].values() for row in rows}
    behind = {
        "tokenizers",
        "torchvision",
        "vllm",
        "xxhash",
    }  # asked for by their own names, where used
    behind |= {"cryptography", "httpx2", "hf-xet", "markupsafe"}  # parts of what is declared
    behind |= {"tqdm"}  # of huggingface_hub
    behind |= {"llvmlite"}  # of Numba, which needs an exact version of it
    for path, name, _ in imports():
        if name in sys.stdlib_module_names or name in ("qwen35", "__future__"):
            continue
        owners = {name_of(owner) for owner in distributions.get(name, [name])}
        assert owners & (core | extras | behind), f"{path.name} imports {name}: declared nowhere"


def test_the_core_is_small() -> None:
    assert len(PROJECT["dependencies"]) <= 10
    heavy = {"torch", "transformers", "bitsandbytes", "llama-cpp-python", "matplotlib", "scipy"}
    assert not heavy & {name_of(row) for row in PROJECT["dependencies"]}


_LIGHT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # as if none were installed
import qwen35
loaded = sorted({"numpy", "numba", "huggingface_hub", "rich", "shtab", "jinja2"} & set(sys.modules))
assert not loaded, f"import qwen35 loads {loaded}"
from qwen35.cli.main import main
for line in sys.argv[3:]:
    words = [word.replace("ASSET", sys.argv[2]) for word in line.split()]
    assert main(words) == 0, line
"""


def test_the_core_alone_plans_converts_and_verifies(tmp_path: Path) -> None:
    modules = [
        "torch", "transformers", "bitsandbytes", "accelerate", "PIL", "llama_cpp", "matplotlib",
        "scipy", "ray", "triton", "model_signing", "OpenSSL", "peft", "safetensors",
    ]  # fmt: skip
    lines = [
        "inspect ASSET",
        "plan Qwen3.5-397B-A17B --recipe text-fp8",
        "plan --roles",
        "convert ASSET nf4 --recipe text-nf4",
        "convert ASSET fp8 --recipe fp8 --quiet",
        "verify nf4 --source ASSET",
        "verify fp8",
        "gguf ASSET gguf --types F16,Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q3_K_M,IQ4_XS,IQ4_NL",
        "verify gguf --source ASSET",
        "run --path A ASSET made --depth numbers",
        "reproduce nf4 --source ASSET",
    ]
    source = str(ROOT / "src")
    command = [sys.executable, "-c", _LIGHT, ",".join(modules), ASSET, *lines]
    run(*command, cwd=tmp_path, PYTHONPATH=source)
