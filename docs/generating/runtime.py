"""Exit codes, environment variables and extras, held against the code that has them."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from generating.markdown import cell, code, heading, table
from generating.meanings import ENVIRONMENT, EXIT_CODES

__all__ = ["runtime_page"]

_ROOT = Path(__file__).parents[2]
_SOURCE = _ROOT / "src" / "qwen35"
_LEAD = "What holds for every command."
_LIBRARIES = {
    "HF_HOME": "huggingface_hub: its cache, where sources and files from the Hub are kept",
    "HF_ENDPOINT": "huggingface_hub: another Hub",
    "HF_HUB_OFFLINE": "huggingface_hub: 1 for no network; what is in the cache is used",
    "NUMBA_CACHE_DIR": "Numba: where compiled kernels are kept",
    "OMP_NUM_THREADS": "PyTorch and llama.cpp: threads, where `--threads` does not say",
    "TMPDIR": "Python: folder for temporary files",
}
_EXTRAS_LEAD = "`pip install 'qwen35[NAME]'` brings what only some commands need."
_EXTRAS = {
    "cuda": "`--device cuda` with NF4 and FP8 recipes, without what loads a model",
    "docs": "building these pages",
    "eval": "charts in reports",
    "fuzz": "fuzzing (`make fuzz`)",
    "gguf": "`gguf` with quantized types, `evaluate` and `verify --depth behaviour` of GGUF files",
    "nf4": "`calibrate`, `evaluate`, `verify --depth behaviour` of checkpoints, `--device cuda`; "
    "peft, because NF4 is for QLoRA",
    "ray": "`convert --ray-address`",
    "sign": "`publish --sign`",
    "test": "the tests",
    "tune": "`tune`",
}


def runtime_page() -> str:
    """Return the page of exit codes, variables and extras."""
    _agree("exit codes", set(_exit_codes()) | {0}, set(EXIT_CODES))
    _agree("environment variables", set(_variables()), set(ENVIRONMENT))
    extras = _extras()
    _agree("extras", set(extras), set(_EXTRAS))
    lines = [*heading("Exit codes, environment, extras", _LEAD), "## Exit codes", ""]
    lines += table(("code", "means"), ([str(c), cell(t)] for c, t in EXIT_CODES.items()))
    lines += ["## Environment variables", ""]
    lines += table(("variable", "does"), ([code(v), cell(t)] for v, t in ENVIRONMENT.items()))
    lines += ["The libraries beneath have their own; these matter most:", ""]
    lines += table(("variable", "does"), ([code(v), cell(t)] for v, t in _LIBRARIES.items()))
    lines += ["## Extras", "", _EXTRAS_LEAD, ""]
    rows = ([code(n), cell(_EXTRAS[n]), ", ".join(map(code, p))] for n, p in sorted(extras.items()))
    lines += table(("extra", "for", "packages"), rows)
    return "\n".join(lines).rstrip() + "\n"


def _agree(what: str, found: set[object], told: set[object]) -> None:
    if found != told:
        raise SystemExit(f"{what}: the code has {found - told}, the page {told - found} beside it")


def _trees() -> Iterator[ast.AST]:
    for path in sorted(_SOURCE.rglob("*.py")):
        yield ast.parse(path.read_text("utf-8"))


def _exit_codes() -> Iterator[int]:
    """Yield the value of every constant called EXIT_..."""
    for tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                if any(name.startswith("EXIT_") for name in names):
                    assert isinstance(node.value.value, int)
                    yield node.value.value


def _variables() -> Iterator[str]:
    """Yield every name that is read from, or put into, ``os.environ``."""
    for tree in _trees():
        for node in ast.walk(tree):
            key: ast.expr | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                asked = node.func.value
                if ast.unparse(asked) == "os.environ" or ast.unparse(node.func) == "os.getenv":
                    key = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                key = node.slice
            if isinstance(key, ast.Constant):
                yield str(key.value)


def _extras() -> dict[str, list[str]]:
    parsed = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))
    extras = parsed["project"]["optional-dependencies"]
    return {name: [_name_of(package) for package in extras[name]] for name in extras}


def _name_of(requirement: str) -> str:
    """Return what a requirement asks for, without its versions."""
    for mark in (">", "=", "<", ";", "[", " "):
        requirement = requirement.partition(mark)[0]
    return requirement
