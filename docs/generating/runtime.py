"""Exit codes, environment variables and extras, compared with the code."""

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
_LEAD = "These apply to every command."
_LIBRARIES = {
    "HF_HOME": "huggingface_hub: its cache of sources and files from the Hub",
    "HF_ENDPOINT": "huggingface_hub: another Hub",
    "HF_HUB_OFFLINE": "huggingface_hub: 1 to use only the cache, without network",
    "NUMBA_CACHE_DIR": "Numba: where compiled kernels are kept",
    "OMP_NUM_THREADS": "PyTorch and llama.cpp: threads, unless `--threads` is given",
    "TMPDIR": "Python: folder for temporary files",
}
_EXTRAS_LEAD = (
    "`pip install '.[NAME]'` in a clone installs packages that only some commands need. GGUF files "
    "are written, checked and measured (`evaluate --streamed`) without any extra but `nf4`."
)
_EXTRAS = {
    "lm-eval": "tasks of lm-eval, asked of servers (`evaluate --lm-eval`)",
    "cuda": "`--device cuda` with NF4, FP8 or refined codes, without the packages that load models",
    "docs": "building these pages",
    "eval": "charts in reports",
    "fuzz": "fuzzing (`make fuzz`)",
    "llama-cpp": "running GGUF files in llama.cpp: `verify --depth behaviour`, `evaluate` without "
    "`--streamed`; `gguf` with types that have no kernel of ours. Built from source: C and C++ "
    "compilers and three minutes",
    "nf4": "`calibrate`, `evaluate`, `verify --depth behaviour` of checkpoints, `--device cuda`; "
    "peft, because NF4 is for QLoRA",
    "ray": "`convert --ray-address`",
    "sign": "`publish --sign`",
    "test": "the tests",
    "tune": "`tune`",
    "ui": "`ui`",
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
    lines += ["Libraries have their own variables; the most important ones:", ""]
    lines += table(("variable", "does"), ([code(v), cell(t)] for v, t in _LIBRARIES.items()))
    lines += ["## Extras", "", _EXTRAS_LEAD, ""]
    rows = ([code(n), cell(_EXTRAS[n]), ", ".join(map(code, p))] for n, p in sorted(extras.items()))
    lines += table(("extra", "for", "packages"), rows)
    return "\n".join(lines).rstrip() + "\n"


def _agree(what: str, found: set[object], documented: set[object]) -> None:
    if found != documented:
        missing, extra = found - documented, documented - found
        raise SystemExit(f"{what}: missing on the page: {missing}, not in the code: {extra}")


def _trees() -> Iterator[ast.AST]:
    for path in sorted(_SOURCE.rglob("*.py")):
        yield ast.parse(path.read_text("utf-8"))


def _exit_codes() -> Iterator[int]:
    """Yield the value of every constant named EXIT_..."""
    for tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                if any(name.startswith("EXIT_") for name in names):
                    assert isinstance(node.value.value, int)
                    yield node.value.value


def _variables() -> Iterator[str]:
    """Yield every name that is read from or written to ``os.environ``."""
    for tree in _trees():
        for node in ast.walk(tree):
            key: ast.expr | None = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if ast.unparse(owner) == "os.environ" or ast.unparse(node.func) == "os.getenv":
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
    """Return the name of a required package, without versions."""
    for mark in (">", "=", "<", ";", "[", " "):
        requirement = requirement.partition(mark)[0]
    return requirement
