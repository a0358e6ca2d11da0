"""The command line: exit codes, what goes to stdout and what to stderr, errors as sentences."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import qwen35
from checkpoints import ASSET, random_tensors, tiny_config, write_checkpoint
from qwen35 import errors
from qwen35.cli import signals
from qwen35.cli.console import Console
from qwen35.cli.main import VERBS, main, run_verb
from qwen35.cli.signals import SignalInterrupt, raise_on_signals
from qwen35.errors import HeaderError, Qwen35Error, UsageError
from qwen35.version import __version__

Capture = pytest.CaptureFixture[str]
PLAN = ["plan", "Qwen3.5-0.8B"]


def command(*arguments: str, cwd: Path, stdout: Any = subprocess.PIPE) -> Any:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "qwen35.cli.main", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(qwen35.__file__).parent.parent)},
        check=False,
    )


# --- the dispatcher


def test_no_arguments_print_the_help(capsys: Capture) -> None:
    assert main([]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for verb, text in VERBS.items():
        assert f"  {verb}" in shown.out
        assert text in shown.out
    codes = "Exit codes: 0 success, 1 findings, 2 wrong input or usage; interrupted: 130 by"
    assert codes in shown.out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_same_by_flag(capsys: Capture, flag: str) -> None:
    main([])
    expected = capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([flag])
    assert stop.value.code == 0
    assert capsys.readouterr().out == expected


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr() == (f"qwen35 {__version__}\n", "")
    assert qwen35.__version__ == __version__


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["conver"], "convert"),
        (["plam", "x"], "plan"),
        ([""], ""),
        (["PLAN"], "plan"),
    ],
)
def test_unknown_verb_is_refused_with_the_known_ones(
    capsys: Capture, arguments: list[str], near: str
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    hint = f"; did you mean {near}?" if near else ""
    expected = f"error: verb {arguments[0]!r}: unknown, expected {', '.join(VERBS)}{hint}\n"
    assert shown.err == expected


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_says_what_it_does(capsys: Capture, verb: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith(f"usage: qwen35 {verb} ")
    assert "--json" in shown.out
    assert "--quiet" in shown.out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("plan --bogus", "--bogus: not an option of qwen35 plan; qwen35 plan --help shows all"),
        ("plan a --rec nf4", "--rec: not an option of qwen35 plan; did you mean --recipe?"),
        ("convert a b --recipee=nf4", "--recipee: not an option of qwen35 convert; did you mean"),
        ("gguf a b --type F16", "--type: not an option of qwen35 gguf; did you mean --types?"),
        (
            "convert a b --max-shard-size 5",
            "--max-shard-size: not an option of qwen35 convert; files",
        ),
        (
            "plan a --max_shard_size 5",
            "--max_shard_size: not an option of qwen35 plan; files hold 5",
        ),
        (
            "gguf a b --shard-size 5",
            "--shard-size: not an option of qwen35 gguf; did you mean --split-",
        ),
        (
            "verify a --max-shard-size 5",
            "--max-shard-size: not an option of qwen35 verify; qwen35 v",
        ),
        (
            "convert a b --grid-size 5",
            "--grid-size: not an option of qwen35 convert; did you mean --mse",
        ),
        ("gguf a b --lora c", "--lora: not an option of qwen35 gguf; did you mean --adapter?"),
        ("convert a b --imatrix f", "--imatrix: not an option of qwen35 convert; it is an option"),
        ("publish a b/c --onto x", "--onto: not an option of qwen35 publish; it is an option of"),
        ("convert a b -o c", "-o: not an option of qwen35 convert; qwen35 convert --help"),
        ("plan a b c", "b: one argument too many, expected MODEL; qwen35 plan --help"),
        ("convert a b c", "c: one argument too many, expected MODEL OUT; qwen35 convert"),
        ("plan a --threads 0", "--threads: '0', expected a positive number"),
        ("plan a --threads -1", "--threads: '-1', expected a positive number"),
        ("plan a --threads two", "--threads: 'two', expected a positive number"),
        ("plan a --threads", "--threads: expected one argument"),
        ("verify a --depth behavior", "--depth: 'behavior', expected structure or numbers or"),
        ("convert", "qwen35 convert: the following arguments are required: MODEL, OUT; qwen35"),
        ("convert a", "qwen35 convert: the following arguments are required: OUT; qwen35"),
    ],
)
def test_wrong_arguments_are_one_sentence(capsys: Capture, command: str, sentence: str) -> None:
    assert main(command.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {sentence}")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "verb"),
    [("quantize", "convert"), ("upload", "publish"), ("Check", "verify"), ("evalute", "evaluate")],
)
def test_words_of_other_tools_are_understood(capsys: Capture, word: str, verb: str) -> None:
    assert main([word, "x"]) == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {verb}?\n")


def test_a_value_behind_two_hyphens_is_no_option(capsys: Capture) -> None:
    assert main(["plan", "Qwen3.5-0.8B", "--recipe", "--", "nf4"]) == 2
    assert "--recipe: expected one argument" in capsys.readouterr().err


def test_a_models_folder_is_no_output(capsys: Capture, tmp_path: Path) -> None:
    """Someone's model is never called a thing to remove: MODEL and OUT may be swapped."""
    model = "assets/qwen3.5-tiny"
    assert main(["convert", str(tmp_path / "new"), model]) == 2
    shown = capsys.readouterr().err
    assert "holds a model that qwen35 did not write" in shown
    assert "remove" not in shown
    assert main(["convert", f"{model}/config.json", str(tmp_path / "new")]) == 2
    assert f"; its folder is {model}" in capsys.readouterr().err


def test_a_wrong_recipe_is_told_before_an_output_that_exists(
    capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("")
    for command in (["convert", "--recipe", "nf5"], ["gguf", "--types", "Q4_KM"]):
        assert main([command[0], "assets/qwen3.5-tiny", str(tmp_path), *command[1:]]) == 2
        assert "did you mean" in capsys.readouterr().err


def test_plan_without_a_model_says_how(capsys: Capture) -> None:
    assert main(["plan"]) == 2
    assert capsys.readouterr().err == ("error: MODEL: not given; qwen35 plan MODEL --recipe NAME\n")


def test_the_command_is_installed_as_this_function() -> None:
    project = Path(__file__).parent.parent / "pyproject.toml"
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    assert scripts["qwen35"] == "qwen35.cli.main:main"


# --- errors


class Verb:
    """A verb for tests."""

    __doc__ = "A verb for tests."

    def __init__(self, act: Callable[[], int]) -> None:
        self.act = act

    def add_arguments(self, parser: Any) -> None:
        """Add nothing."""

    def run(self, args: Any, output: Console) -> int:
        """Do what the test asks."""
        return self.act()


def run_with(monkeypatch: pytest.MonkeyPatch, act: Callable[[], int], *arguments: str) -> int:
    """Run a verb that does `act`."""
    monkeypatch.setattr(importlib, "import_module", lambda name: Verb(act))
    return run_verb("plan", arguments)


def raising(error: BaseException) -> Callable[[], int]:
    """Return a function that raises."""

    def act() -> int:
        raise error

    return act


OWN_ERRORS = [
    getattr(errors, name)
    for name in errors.__all__
    if isinstance(getattr(errors, name), type) and issubclass(getattr(errors, name), Qwen35Error)
]


@pytest.mark.parametrize("kind", OWN_ERRORS)
def test_our_errors_become_a_sentence_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, kind: type[Qwen35Error]
) -> None:
    error = kind("the file", "is broken", expected="a whole one", hint="mend it")
    assert run_with(monkeypatch, raising(error)) == 2
    sentence = "the file: is broken, expected a whole one; mend it"
    assert capsys.readouterr() == ("", f"error: {sentence}\n")
    assert run_with(monkeypatch, raising(error), "--json", "--quiet") == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": kind.__name__, "message": sentence}
    assert shown.err == f"error: {sentence}\n"


@pytest.mark.parametrize("kind", [ValueError, OSError, AssertionError, KeyError, RecursionError])
def test_any_other_error_is_a_bug_and_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        run_with(monkeypatch, raising(kind("bug")))


def test_interruption_is_code_130(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert run_with(monkeypatch, raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert run_with(monkeypatch, raising(KeyboardInterrupt()), "--quiet") == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_command_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str, code: int
) -> None:
    number = signal.Signals[name]
    monkeypatch.setattr(signals, "REPEATED_SECONDS", 60)

    def act() -> int:
        raise_on_signals()
        signal.raise_signal(number)
        raise AssertionError("the signal did nothing")

    with handlers(signal.SIG_DFL):
        assert run_with(monkeypatch, act) == code
        assert capsys.readouterr() == ("", f"interrupted by {name}\n")
        signal.raise_signal(number)  # again at once, as `timeout` does: ignored
        monkeypatch.setattr(signals, "REPEATED_SECONDS", 0)
        with pytest.raises(SignalInterrupt):
            signal.raise_signal(number)


def test_a_signal_that_is_ignored_stays_so() -> None:
    with handlers(signal.SIG_IGN):  # as `nohup` does
        raise_on_signals()
        signal.raise_signal(signal.SIGHUP)


@contextmanager
def handlers(handler: signal.Handlers) -> Iterator[None]:
    """Set the handlers of both signals for a while."""
    both = (signal.SIGHUP, signal.SIGTERM)
    before = [signal.signal(number, handler) for number in both]
    try:
        yield
    finally:
        for number, old in zip(both, before, strict=True):
            signal.signal(number, old)


@pytest.mark.parametrize("code", [0, 1])
def test_code_of_the_verb_is_passed_on(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    assert run_with(monkeypatch, lambda: code) == code


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UsageError("a", "b"), "a: b"),
        (UsageError("a", "b", expected="c"), "a: b, expected c"),
        (UsageError("a", "b", hint="d"), "a: b; d"),
        (HeaderError("a", "b", expected="c", hint="d"), "a: b, expected c; d"),
    ],
)
def test_sentence_of_an_error(error: Qwen35Error, text: str) -> None:
    assert str(error) == text
    assert error.args == (text,)


def test_tree_of_errors() -> None:
    assert len(OWN_ERRORS) == len({kind.__name__ for kind in OWN_ERRORS}) == 10
    for name in ("HeaderError", "ConfigError", "TensorError"):
        assert getattr(errors, name).__base__ is errors.InputError
        assert f"+-- {name}" in str(errors.__doc__)
    assert errors.__all__ == sorted(errors.__all__)


def test_finding_is_plain_strings() -> None:
    finding = errors.Finding("companions", "w", "no absmax")
    assert finding.to_json() == {
        "check": "companions",
        "subject": "w",
        "message": "no absmax",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "./nowhere"], "./nowhere: no such folder, expected a folder, a Hub id"),
        (["plan", "Qwen3.5-0.8B", "--recipe", "fp4"], "recipe 'fp4': not a built-in recipe"),
        (["plan", "Qwen3.5-0.8B", "--keep", "up"], "--keep up: 'up' is not a role"),
        (["plan", "Qwen3.5-0.8B", "--keep", "mlp.experts"], "no tensor of this checkpoint"),
        (["convert", "Qwen3.5-0.8B", "out"], "published size, without weights; give a folder"),
        (["convert", "./nowhere", "out"], "no such folder"),
        (["convert", "./x", "out", "--device", "tpu"], "--device tpu: unknown, expected auto, cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert words in shown.err
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_hostile_name_does_not_reach_the_terminal_raw(tmp_path: Path, capsys: Capture) -> None:
    config = tiny_config(layers=1)
    tensors = random_tensors(config)
    name = "model.\x1b[2J\nerror: all is well \u202e\ud800"
    tensors["model.evil"] = tensors["model.language_model.norm.weight"].clone()
    source = write_checkpoint(tmp_path / "source", config, tensors, index=False)
    file = source / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + length])
    table = json.dumps({name if key == "model.evil" else key: row for key, row in head.items()})
    file.write_bytes(len(table).to_bytes(8, "little") + table.encode() + raw[8 + length :])
    assert main(["plan", str(source)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.rstrip("\n").isprintable()
    assert "not a tensor of Qwen3.5" in shown


# --- output


def test_output_speaks_to_the_right_stream(capsys: Capture) -> None:
    Console().data("text", {"a": "é"})
    Console(as_json=True).data("text", {"a": "é"})
    Console().info("going on")
    Console(quiet=True).info("going on")
    assert capsys.readouterr() == ('text\n{\n  "a": "é"\n}\n', "going on\n")


@pytest.fixture
def told(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What is printed of work of a total: pieces that take some seconds, of some bytes each."""

    def lines(total: int, pieces: Iterable[tuple[float, int, str]]) -> list[str]:
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        progress = Console().progress()
        progress.begin("writing out", total)
        for seconds, nbytes, name in pieces:
            now[0] += seconds
            progress.advance(nbytes, name)
        progress.end()
        return capsys.readouterr().err.splitlines()

    return lines


def test_lines_of_progress_are_few(told: Callable[..., list[str]]) -> None:
    pieces = ((1.0, 100_000_000, f"tensor {i}") for i in range(40))
    assert told(4_000_000_000, pieces) == [
        "writing out: 4.00 GB to read",
        "writing out: 25%, about 30 s left, tensor 9",
        "writing out: 50%, about 20 s left, tensor 19",
        "writing out: 75%, about 10 s left, tensor 29",
        "writing out: 100%, about 0 s left, tensor 39",
    ]


def test_the_time_left_is_told_once_it_means_something(told: Callable[..., list[str]]) -> None:
    """Kernels compile before the first piece, which once made 1261 s of a job of 23 s."""
    assert told(1000, [(12, 10, "a"), (11, 20, "a"), (10, 470, "a")])[1:] == [
        "writing out: 1%, no estimate yet, a",
        "writing out: 3%, no estimate yet, a",
        "writing out: 50%, about 21 s left, a",  # 490 in 21 s, and 500 to go
    ]


def test_the_time_left_of_long_work_does_not_wait_for_a_share_of_it(
    told: Callable[..., list[str]],
) -> None:
    assert [line.split(", ")[1] for line in told(10_000, [(40, 100, "a")] * 3)[1:]] == [
        "no estimate yet",
        "no estimate yet",
        "about 3880 s left",
    ]


def test_quiet_progress_says_nothing(capsys: Capture) -> None:
    progress = Console(quiet=True).progress()
    progress.begin("x", 1)
    progress.advance(1, "y")
    progress.end()
    assert capsys.readouterr() == ("", "")


def test_progress_of_nothing_does_not_divide_by_it(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Console().progress()
    progress.begin("x", 0)
    now[0] = 60.0
    progress.advance(0, "y")
    assert "0%" in capsys.readouterr().err


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    progress = Console().progress()
    progress.begin("writing out", 10)
    progress.advance(10, "x")
    progress.end()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "writing out" in shown.err
    assert "\x1b[2K" in shown.err  # the bar's line is wiped in the end


def test_reader_that_stops_reading_is_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = command(*PLAN, "--json", cwd=tmp_path, stdout=write)
    finally:
        os.close(write)
    assert b"Traceback" not in done.stderr


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = command(*PLAN, "--json", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(json.loads(done.stdout)["steps"]) == 488
    done = command("plan", "./nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: ./nowhere: no such folder")


# --- mistakes met halfway


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["convert", "MODEL", "theirs", "--recipe", "fp8"], "(MODEL comes first, then the output)"),
        (["convert", "new", "linked", "--recipe", "fp8"], "(MODEL comes first, then the output)"),
        (["run", "--path", "nf4", "new", "theirs"], "(MODEL comes first, then the output)"),
        (["convert", "MODEL", "out", "--recipe", "mlx"], "did you mean mlx-4bit?"),
        (["convert", "MODEL", "out", "--recipe", "q4_k_m"], "`qwen35 gguf --types Q4_K_M`"),
        (["gguf", "MODEL", "out.gguf"], "named like a file, expected a folder to write"),
        (["gguf", "MODEL", "out", "--types", "Q8_0", "F16"], "write --types Q8_0,F16"),
        (["inspect", "missing.gguf"], "missing.gguf: no such file"),
        (["publish", "owner/name", "theirs"], "the folder comes first, then the repository"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else "",
)
def test_what_was_meant_is_said(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(ASSET)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"")
    (tmp_path / "linked").symlink_to(tmp_path / "theirs")
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MODEL", "linked", "theirs"]


@pytest.mark.parametrize("types", [["Q8_0,F16"], ["Q8_0", "--types", "F16"], ["Q8_0 F16"]])
def test_types_in_pieces_are_all_written(types: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main(["plan", str(ASSET), "--types", *types, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert list(files)[:2] == ["qwen3.5-tiny-Q8_0.gguf", "qwen3.5-tiny-F16.gguf"]
