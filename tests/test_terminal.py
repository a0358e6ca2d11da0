"""The terminal: examples that parse, lines that fit, colours for verdicts, completion."""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import pytest

import qwen35
from checkpoints import ASSET
from evaluating import gguf as gguf_in
from parsers import actions_of, shown_actions_of
from patience import PATIENCE
from qwen35.cli.completion import script
from qwen35.cli.console import Console
from qwen35.cli.main import SHELLS, VERBS, main, parser_of, whole_parser
from qwen35.cli.screen import coloured, fit, width_of
from qwen35.display import bytes_of
from qwen35.model.roles import ROLES
from qwen35.model.sizes import PUBLISHED
from qwen35.planning.recipe import built_in

Capture = pytest.CaptureFixture[str]
LONG = "Qwen3.5-text-0.8B-a-name-that-somebody-found-good-because-it-says-all"
"""69 letters: with a type and a suffix, more than a line has."""


# --- help


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_parse(verb: str) -> None:
    examples: dict[str, str] = import_module(f"qwen35.cli.{verb}_command").EXAMPLES
    assert len(examples) >= 2
    first = {command.split()[1] for command in examples.values()}
    assert verb in first
    for command in examples.values():
        words = shlex.split(command.replace("\\\n", " "))
        assert words[0] == "qwen35"
        parser_of(words[1]).parse_args(words[2:])


def test_examples_name_recipes_and_sizes_that_exist() -> None:
    for verb in VERBS:
        for command in import_module(f"qwen35.cli.{verb}_command").EXAMPLES.values():
            words = shlex.split(command.replace("\\\n", " "))
            args = parser_of(words[1]).parse_args(words[2:])
            recipe = getattr(args, "recipe", None)
            known = recipe is None or recipe.endswith(".toml")
            assert known or recipe in built_in("safetensors") or words[1] == "gguf", command
            model = getattr(args, "model", None) or ""
            if model.startswith("Qwen3.5") and words[1] == "plan":
                assert model in PUBLISHED, command


@pytest.mark.parametrize("verb", ["", *VERBS])
@pytest.mark.parametrize("columns", [80, 200])
def test_help_fits(
    verb: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([verb, "--help"] if verb else ["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert "--calib_mode" not in shown  # spellings for old scripts stay out of help
    if verb:
        assert "examples:\n" in shown


def test_alone_it_tells_where_to_start(capsys: Capture) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    start = re.search(r"start here:\n((?:  qwen35 .*\n)+)", shown)
    assert start is not None
    assert len(start[1].splitlines()) == 4
    assert len(shown.splitlines()) <= 40


def test_wrong_values_are_told_with_what_is_right(capsys: Capture) -> None:
    assert main(["plan", "x", "--memory", "lots"]) == 2
    assert "'lots', expected a size such as 400MB or 1.5GiB" in capsys.readouterr().err
    assert main(["plan", "x", "--threads", "-2"]) == 2
    assert "'-2', expected a positive number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("plan", "Qwen3.5-9B", "--fit", "6"), "--fit: '6', expected a size such as 6GB or 6MB"),
        (("plan", "x", "--memory", "1.5"), "'1.5', expected a size such as 1.5GB or 1.5MB"),
        (("gguf", "x", "y", "--split-max-size", "40"), "'40', expected a size such as 40GB or"),
        (("merge", "x", "y", "--memory", "999999"), "expected a size such as 999999GB or"),
    ],
)
def test_a_size_without_its_unit_is_asked_for_it(
    words: Sequence[str], told: str, capsys: Capture
) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_bytes_may_be_bare_where_they_are_many() -> None:
    assert bytes_of("1000000") == bytes_of("1MB") == bytes_of("1000000B") == 10**6


@pytest.mark.parametrize("verb", ["serve", "chat", "Generate"])
def test_a_verb_of_engines_resembles_none_of_ours(verb: str, capsys: Capture) -> None:
    assert main([verb, "x"]) == 2
    said = capsys.readouterr().err
    assert "did you mean" not in said
    assert "docs/jobs.md" in said


def test_compilation_is_told_once_and_not_when_quiet(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    lines = []
    for out, *more in (("one",), ("two",), ("three", "--quiet")):
        if more:
            shutil.rmtree(tmp_path / "kernels")
        words = ["convert", str(ASSET), str(tmp_path / out), "--recipe", "text-nf4", *more]
        done = subprocess.run(
            [sys.executable, "-m", "qwen35", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        lines.append(done.stderr.count("compiling kernels, only the first time\n"))
    assert lines == [1, 0, 0]


# --- lines


class Stream(io.StringIO):
    """A stream that is, or is not, a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without what a user may have set."""
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


PATHS = ("--path", "A", "--path", "B", "--path", "fp8")
TEXT = ("--text", ASSET / "eval.txt")
WIDE: dict[str, Callable[[Path, Path], Sequence[object]]] = {
    "inspect": lambda made, _: ["inspect", made / "nf4"],
    "inspect GGUF": lambda made, _: ["inspect", made / "gguf"],
    "plan": lambda made, _: ["plan", "Qwen3.5-397B-A17B"],
    "plan FP8": lambda made, _: ["plan", "Qwen3.5-397B-A17B", "--recipe", "text-fp8"],
    "roles": lambda made, _: ["plan", "--roles"],
    "gguf": lambda made, to: ["gguf", made / LONG, to / "x", "--dry-run", "--recipe", "q8-gates"],
    "convert": lambda made, to: ["convert", made / LONG, to / LONG, "--recipe", "fp8"],
    "verify": lambda made, _: ["verify", made / "nf4", "--source", ASSET],
    "verify GGUF": lambda made, _: ["verify", made / "gguf", "--source", ASSET],
    "run": lambda made, to: ["run", *PATHS, "--dry-run", made / LONG, to / "made"],
    "reproduce": lambda made, _: ["reproduce", made / "text", "--source", ASSET],
    "calibrate": lambda made, to: ["calibrate", ASSET, *TEXT, "--dry-run", "--output", to / "x"],
}


@pytest.fixture(scope="module")
def made(formats: Path) -> Path:
    """The formats of the embedded checkpoint, and the checkpoint under a long name."""
    if not (formats / LONG).exists():
        (formats / LONG).symlink_to(ASSET)
    return formats


def too_long(text: str, columns: int) -> list[str]:
    """Return lines that are longer and could have been folded: they hold more than a word."""
    lines = text.splitlines()
    return [line for line in lines if len(line) > columns and " " in line.strip()]


@pytest.mark.parametrize("verb", WIDE)
def test_what_is_shown_fits_into_80_columns(
    verb: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = list(map(str, WIDE[verb](made, tmp_path)))
    assert main(command) == 0
    whole = capsys.readouterr().out
    shutil.rmtree(tmp_path / LONG, ignore_errors=True)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(command) == 0
    shown = capsys.readouterr()
    assert too_long(shown.out, 80) == []
    assert too_long(shown.err, 80) == []
    free = re.compile(r"\s+|[\d.]+ GB\s+are free")
    assert free.sub("", shown.out) == free.sub("", whole), "something was cut"


TABLE = re.compile(r"^ *(?:(?:make|verify) )?\S+(?: +nf4)?(?: +(?:-|\d[\d,.]*)(?: [kMG]?B)?)+$")


@pytest.mark.parametrize("verb", ["plan", "plan FP8", "verify", "inspect", "gguf", "run"])
def test_rows_of_numbers_are_never_folded(
    verb: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """With names of an ordinary length tables fit as they are."""
    command = list(map(str, WIDE[verb](made, tmp_path)))
    command = [word.replace(LONG, "nf4") if verb == "gguf" else word for word in command]
    if verb in ("gguf", "run"):
        command = [str(ASSET) if word.endswith(("/nf4", LONG)) else word for word in command]
    assert main(command) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if TABLE.match(line)]
    assert rows
    assert max(map(len, rows)) <= 80


def test_candidates_that_do_not_fit_stand_below_each_other(
    formats: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    models = [gguf_in(formats, kind) for kind in ("F16", "Q8_0", "Q4_K_M")]
    asked = ["--text", str(formats / "text.txt"), "--chunks", "2", "--threads", "1", "--quiet"]
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["evaluate", models[0], *models[1:], *asked]) == 0
    shown = capsys.readouterr().out
    assert too_long(shown, 60) == []
    assert shown.count("KLD metric") == 2
    assert shown.count("Mean KLD ") == 2
    monkeypatch.delenv("COLUMNS")
    assert main(["evaluate", models[0], *models[1:], *asked]) == 0
    assert capsys.readouterr().out.count("KLD metric") == 1


def test_a_width_is_asked_for_or_a_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert width_of(Stream(terminal=True)) is None  # no file of the system's behind it
    monkeypatch.setenv("COLUMNS", "100")
    assert width_of(Stream(terminal=False)) == 100
    for nonsense in ("", "0", "3", "x", "-80"):
        monkeypatch.setenv("COLUMNS", nonsense)
        assert width_of(Stream(terminal=False)) is None


def test_folding_keeps_every_letter_and_the_indent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = f"  first {'word ' * 20}\n{'x' * 60}\nshort"
    shown = fit(text, Stream(terminal=False))
    assert re.sub(r"\s+", "", shown) == re.sub(r"\s+", "", text)
    lines = shown.split("\n")
    assert all(line.startswith("      word") for line in lines[1:-2])
    assert lines[-2:] == ["x" * 60, "short"]


def test_hostile_text_in_results_is_escaped() -> None:
    assert fit("a\x1b[2Jb\u202e\ud800\nc", Stream(terminal=False)) == (
        "a\\x1b[2Jb\\u202e\\ud800\nc"
    )


# --- colours


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": ""}, False),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_when_there_are_colours(
    terminal: bool, environment: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert coloured(Stream(terminal)) is expected


def test_colours_add_nothing_but_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "error: x\nnote: y FAILED\npassed: nothing found\nFAILED: 2 findings\n  right WRONG\nz"
    plain = fit(text, Stream(terminal=False))
    painted = fit(text, Stream(terminal=True))
    assert plain == text
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == text
    assert "\x1b[1;31merror:\x1b[0m x" in painted
    assert "\x1b[32mpassed: nothing found\x1b[0m" in painted
    assert painted.endswith("\nz")
    assert painted.count("\x1b[0m") == painted.count("\x1b[") / 2


def test_json_has_neither_colours_nor_folds(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    Console(as_json=True).data("x", {"note": "FAILED " * 20})
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) > 100


def test_json_of_a_name_that_is_no_text(capsys: Capture) -> None:
    Console(as_json=True).data("x", {"file": "a\udcff", "b": "é"})
    assert json.loads(capsys.readouterr().out) == {"file": "a\udcff", "b": "é"}


def in_terminal(columns: int, *words: object, **environment: str) -> str:
    """Run the command with stdout and stderr on a terminal; return what it shows."""
    main_end, command_end = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(command_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    source = str(Path(qwen35.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen35.cli.main", *map(str, words)],
        stdout=command_end,
        stderr=command_end,
        env={**kept, "PYTHONPATH": source, "TERM": "xterm-256color", **environment},
    )
    os.close(command_end)
    shown = bytearray()
    try:
        while part := os.read(main_end, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    process.wait(PATIENCE)
    os.close(main_end)
    return shown.decode().replace("\r\n", "\n")


def test_a_real_terminal_gets_both_and_its_width() -> None:
    narrow = in_terminal(60, "plan", "./nowhere")
    assert narrow.startswith("\x1b[1;31merror:\x1b[0m ./nowhere")
    bare = re.sub(r"\x1b\[[\d;]*m", "", narrow)
    assert len(bare.splitlines()) == 2
    assert max(map(len, bare.splitlines())) <= 60
    assert in_terminal(200, "plan", "./nowhere", NO_COLOR="1").count("\n") == 1


# --- completion


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_verb_and_flag(shell: str, capsys: Capture) -> None:
    assert main(["--print-completion", shell]) == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"\b{verb}\b", text)
        for action in shown_actions_of(parser_of(verb)):
            for option in action.option_strings:
                if option.startswith("--") and "_" not in option:
                    name = option.removeprefix("--") if shell == "fish" else option
                    assert name in text, (verb, option)
    for recipe in built_in("safetensors"):
        assert recipe in text
    assert "--calib_mode" not in text


def test_completion_of_another_shell_is_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "cmd"])
    assert stop.value.code == 2
    assert "bash" in capsys.readouterr().err


def completed(line: str, folder: Path) -> list[str]:
    """Return what bash offers after `line`."""
    program = (
        f"source {folder}/completion.bash\nset -- {line}\n"
        'COMP_WORDS=("$@" ""); COMP_CWORD=$#; COMP_LINE="$* "; COMP_POINT=${#COMP_LINE}\n'
        "_shtab_qwen35\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    return sorted(word.strip() for word in done.stdout.split())


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "completion.bash").write_text(script("bash", whole_parser()))
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").touch()
    assert set(VERBS) <= set(completed("qwen35", tmp_path))
    assert set(completed("qwen35 convert --recipe", tmp_path)) == set(built_in("safetensors"))
    assert "q8-gates" in completed("qwen35 gguf --recipe", tmp_path)
    assert completed("qwen35 verify --depth", tmp_path) == ["behaviour", "numbers", "structure"]
    assert completed("qwen35 inspect", tmp_path) == ["model"]
    assert "notes.txt" in completed("qwen35 evaluate --text", tmp_path)


@pytest.mark.parametrize("shell", ["fish", "zsh"])
def test_other_shells_accept_their_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(script(shell, whole_parser()))
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completes(tmp_path: Path) -> None:
    (tmp_path / "qwen35.fish").write_text(script("fish", whole_parser()))
    (tmp_path / "model").mkdir()

    def offered(line: str) -> set[str]:
        program = f"source {tmp_path}/qwen35.fish; complete -C '{line}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", program],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        return {row.partition("\t")[0] for row in done.stdout.splitlines()}

    assert {"verify"} == offered("qwen35 ver")
    assert offered("qwen35 convert --recipe ") == set(built_in("safetensors"))
    assert offered("qwen35 verify --depth ") == {"structure", "numbers", "behaviour"}
    assert "model/" in offered("qwen35 inspect m")


def test_starting_does_not_load_what_completion_needs(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom qwen35.cli.main import main\nmain(['plan', 'Qwen3.5-0.8B', '--quiet'])\n"
        "loaded = {'shtab', 'rich', 'difflib', 'qwen35.cli.convert_command'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    source = str(Path(qwen35.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def test_the_whole_parser_is_that_of_every_verb() -> None:
    (verbs,) = [a for a in actions_of(whole_parser()) if isinstance(a, argparse._SubParsersAction)]
    for verb in VERBS:
        assert verbs.choices[verb].format_help() == parser_of(verb).format_help()


def test_roles_fold_their_meaning_only(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--roles"]) == 0
    shown = capsys.readouterr().out.splitlines()
    starting = [line for line in shown if not line.startswith(" ")]
    assert len(starting) == len({path.removesuffix(".weight") for path in ROLES}) + 1
    assert max(map(len, shown)) <= 80


# --- errors


SAID_ALREADY = {
    "cli/command_parser.py: error.message",
    "codecs/ggml/library.py: f'cannot be opened ({error})'",
    "planning/gguf_files/type_patterns.py: 'no rules in it'",
    "planning/gguf_files/type_patterns.py: "
    "'not a pattern that llama-quantize would read the same way'",
    "planning/gguf_files/type_patterns.py: f'cannot be read ({error})'",
    "pipeline/run_file.py: f'not valid TOML ({error})'",
    "planning/recipe_files.py: f'a line of more than {_MAX_DOTS} dots'",
    "planning/recipe_files.py: f'not valid TOML ({error})'",
    "publishing/pull.py: 'is a symbolic link: nothing is written through it'",
}
"""Where what is wrong says what to mend, or nobody can know."""


def bare_errors() -> set[str]:
    """Return where an error about usage, output or the Hub ends without a next step."""
    found = set()
    package = Path(qwen35.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id not in ("UsageError", "OutputError", "HubError", "WorkerError"):
                continue
            if not {"hint", "expected"} & {keyword.arg for keyword in node.keywords}:
                where = path.relative_to(package)
                found.add(f"{where}: {ast.unparse(node.args[1]) if node.args[1:] else '...'}")
    return found


def test_errors_end_with_what_to_do_next() -> None:
    assert bare_errors() == SAID_ALREADY
