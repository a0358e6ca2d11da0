"""Nothing that lies in a model's folder, beside an output or where we work is ever run."""

from __future__ import annotations

import ast
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qwen35
from checkpoints import ASSET
from qwen35.checkpoint.open import fetch
from qwen35.model.named_code import code_keys, without_code
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify

COMMAND = [
    sys.executable,
    "-P",
    "-c",
    "import sys; from qwen35.cli.main import main; sys.exit(main())",
]
"""The console script, which has its own folder first on the path, not the one where it is run."""

OURS = ("qwen35", "torch", "numpy", "safetensors", "numba", "yaml", "jinja2", "ray", "transformers")
START = ("sitecustomize", "usercustomize", "conftest")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and an output's folder; in each, modules of every name."""
    shutil.copytree(ASSET, tmp_path / "model")
    return tmp_path


def plant(place: Path, *, but: Sequence[str] = ()) -> None:
    """Put a module of every name of Python's and of ours there, which says that it was run."""
    names = {*sys.stdlib_module_names, *OURS, *START} - set(but)
    code = f"with open({str(place / 'RAN')!r}, 'a') as f: f.write(__name__ + '\\n')\n"
    for folder in (place, place / "model"):
        for name in names:
            (folder / f"{name}.py").write_text(code)


def run(place: Path, *arguments: str, command: Sequence[str] = (), **variables: str) -> str:
    """Run a command in the model's folder; return what it printed."""
    package = str(Path(qwen35.__file__).parent.parent)
    done = subprocess.run(
        [*(command or COMMAND), *arguments],
        cwd=place / "model",
        env={**os.environ, "PYTHONPATH": package, **variables},
        capture_output=True,
        text=True,
    )
    assert not (place / "RAN").exists(), (place / "RAN").read_text()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_workers_run_nothing_from_where_they_are_started(place: Path) -> None:
    plant(place)
    run(place, "convert", ".", "../out", "--recipe", "nf4", "--workers", "2", "--quiet")
    run(place, "gguf", ".", "../gguf", "--types", "Q8_0", "--workers", "1", "--quiet")


def test_a_run_and_its_children(place: Path) -> None:
    plant(place)
    arguments = ["--path", "A", "--depth", "numbers", ".", "../run", "--quiet"]
    run(place, "run", *arguments, XDG_CACHE_HOME=str(place / "cache"))


@pytest.mark.parametrize("module", ["qwen35", "qwen35.cli.main"])
def test_python_m_and_its_workers(place: Path, module: str) -> None:
    loaded = [sys.executable, "-c", "import sys, runpy; print(*sys.modules)"]
    before = subprocess.run(loaded, capture_output=True, text=True, check=True).stdout.split()
    plant(place, but=["qwen35", *before])  # what Python itself loads before our first line
    command = [sys.executable, "-m", module]
    run(
        place,
        "convert",
        ".",
        "../out",
        "--recipe",
        "text",
        "--workers",
        "1",
        "--quiet",
        command=command,
    )


def test_python_m_with_p_runs_nothing_at_all(place: Path) -> None:
    plant(place)
    run(place, "inspect", ".", command=[sys.executable, "-P", "-m", "qwen35"])


def test_a_module_of_another_program_keeps_its_path(tmp_path: Path) -> None:
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import qwen35\n")
    (tmp_path / "program" / "__main__.py").write_text("import beside\n")
    (tmp_path / "beside.py").write_text("print('here')\n")
    package = str(Path(qwen35.__file__).parent.parent)
    command = [sys.executable, "-m", "program", "qwen3.5"]
    environment = {**os.environ, "PYTHONPATH": package}
    said = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout == "here\n"


def test_an_empty_entry_of_pythonpath_does_not_reach_workers(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen35.execution.process_pool import worker_environment

    monkeypatch.setenv("PYTHONPATH", f":/own{os.pathsep}{os.pathsep}")
    environment = worker_environment((), 0)
    package = str(Path(qwen35.__file__).parent.parent)
    assert environment["PYTHONPATH"].split(os.pathsep) == [package, "/own"]
    assert environment["PYTHONSAFEPATH"] == "1"


def test_interpreters_that_libraries_start_import_nothing_either(place: Path) -> None:
    (place / "model" / "random.py").write_text(f"open({str(place / 'RAN')!r}, 'w')\n")
    code = (
        "import sys, qwen35.cli.main as cli; cli.tune_process()\n"
        "import subprocess; subprocess.run([sys.executable, '-c', 'import random'], check=True)\n"
        "import multiprocessing as m\n"
        "if __name__ == '__main__':\n"
        "    p = m.get_context('spawn').Process(target=print); p.start(); p.join()\n"
    )
    run(place, command=[sys.executable, "-P", "-c", code])


def test_settings_of_numba_are_not_read_from_where_we_work(place: Path) -> None:
    kernels = place / "kernels"
    kernels.mkdir()  # compiled kernels are pickled: whoever names their folder runs code
    text = json.dumps({"cache_dir": str(kernels), "disable_jit": 1})
    (place / "model" / ".numba_config.yaml").write_text(text)
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from qwen35.codecs.nf4.kernels import encode_f32\n"
        "import numba, yaml\n"
        "numba.njit(lambda x: x + 1)(1)\n"
        "print([numba.config.CACHE_DIR, numba.config.DISABLE_JIT])\n"
    )
    python = [sys.executable, "-P", "-c", code]
    assert run(place, command=python) == "['', 0]\n"
    assert run(place, command=python, NUMBA_CACHE_DIR=str(kernels)) == f"['{kernels}', 0]\n"


def test_code_in_a_model_is_not_even_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from qwen35.engines.torch_model import NO_CODE

    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", answer)
    for options in ({}, NO_CODE):  # transformers asks unless it is told
        with pytest.raises(ValueError, match="trust_remote_code"):
            transformers.AutoConfig.from_pretrained(tmp_path, **options)
        assert len(asked) == 1
    assert not (tmp_path / "RAN").exists()


EVIL = "evil/kernel"
NAMED: dict[str, Any] = {
    "attn_implementation": EVIL,
    "text_config._attn_implementation": f"{EVIL}@main:forward",
    "vision_config._attn_implementation_internal": "https://evil",
    "experts_implementation": {"text_config": EVIL},
    "text_config._experts_implementation": [EVIL],
    "auto_map": {"AutoConfig": "evil/code--configuration.Own"},
    "transformers_weights": "other.safetensors",
}
OWN = {"attn_implementation": "paged|eager", "experts_implementation": {"": "grouped_mm"}}


@pytest.mark.sentences
@pytest.mark.parametrize("path", list(NAMED))
def test_what_config_json_names_is_found_and_left_out(path: str, tmp_path: Path) -> None:
    config = json.loads((ASSET / "config.json").read_text())
    section, _, key = path.rpartition(".")
    (config[section] if section else config)[key] = NAMED[path]
    config.setdefault("_attn_implementation", "sdpa")  # transformers' own may stay
    folder = Path(shutil.copytree(ASSET, tmp_path / "in"))
    (folder / "config.json").write_text(json.dumps(config))
    findings = verify(open_artifact(str(folder))).findings
    assert [f.message.split()[0] for f in findings if f.check == "files"] == [path]
    plan = make_plan(fetch(str(folder)), load_recipe("fp8"))
    assert [note.split()[0] for note in plan.notes if "left out" in note] == [path]
    written = json.loads(plan.documents["config.json"])
    assert key not in (written[section] if section else written)
    assert written["_attn_implementation"] == "sdpa"


def test_implementations_of_transformers_itself_stay() -> None:
    raw = {**OWN, "text_config": {**OWN, "auto_map": None}}
    assert without_code(raw) == raw
    assert not list(code_keys(raw))


def test_no_kernel_is_loaded_whatever_config_json_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that loads native code from the Hub is not imported, even where it is there."""
    pytest.importorskip("transformers")
    from qwen35.engines.torch_model import TorchModel

    config = json.loads((ASSET / "config.json").read_text())
    named = {"attn_implementation": EVIL, "experts_implementation": EVIL}
    for section in (config, config["text_config"], config["vision_config"]):
        section.update(named)
    folder = Path(shutil.copytree(ASSET, tmp_path / "in"))
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "no"}))
    (tmp_path / "kernels.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = TorchModel(folder).model.config
    assert loaded.text_config._attn_implementation == "sdpa"
    assert loaded.vision_config._attn_implementation == "sdpa"
    with pytest.raises(ImportError):
        importlib.import_module("kernels")
    assert not (tmp_path / "RAN").exists()


def test_advice_to_install_kernels_is_not_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers")
    from qwen35.engines.torch_model import refuse_hub_kernels

    refuse_hub_kernels()
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "x")
    log.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_every_load_says_that_no_code_is_trusted() -> None:
    calls = 0
    for path in Path(qwen35.__file__).parent.rglob("*.py"):
        text = path.read_text("utf-8")
        if not any(word in text for word in ("from_pretrained", "pickle", "torch.load")):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "pickle.load", "pickle.loads"), path
            if node.func.attr == "from_pretrained":
                calls += 1
                given = {ast.unparse(word.value) for word in node.keywords if word.arg is None}
                assert given & {"NO_CODE", "MODEL_OPTIONS", "options"}, ast.unparse(node)
    assert calls >= 5
