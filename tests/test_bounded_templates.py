"""Templates of strangers are rendered in a child with limits, in every verb (SECURITY.md)."""

from __future__ import annotations

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import qwen35
from checkpoints import ASSET
from patience import PATIENCE
from qwen35.cli.main import main
from qwen35.errors import InputError
from qwen35.planning.bounded_child import Limits, run_bounded
from qwen35.planning.safetensors_files.chat_template import compiles, text_only_template
from qwen35.verification import bounded_rendering
from qwen35.verification.bounded_rendering import render
from qwen35.verification.chat_prompts import ChatPrompts, special_tokens
from qwen35.verification.questions import IMAGE, TASKS, Question
from running import run
from template_styles import BOMBS, REFUSED, SIMPLE, STYLES

Capture = pytest.CaptureFixture[str]
TEMPLATE = "chat_template.jinja"
SOURCE = Path(qwen35.__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never ends is ended after half a second."""
    monkeypatch.setattr(bounded_rendering, "LIMITS", Limits(0.5, 2**29, 2**26))


@contextmanager
def small() -> Iterator[None]:
    """Check that a block takes few seconds of the processor, and little memory of this process."""
    begin, before = _spent(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert _spent() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10


def _spent() -> float:
    both = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


# --- one child


def test_only_the_child_renders() -> None:
    """No other module has jinja2's sandbox, or asks a library to render a stranger's template."""
    ours = {"publishing/card.py", "reporting/page_frame.py", "ui/page_content.py"}
    child, parser = "verification/rendering_child.py", "planning/safetensors_files/chat_template.py"
    found = set()
    for path in SOURCE.rglob("*.py"):
        names = set(_names(ast.parse(path.read_text("utf-8"))))
        assert not names & {"apply_chat_template", "render_jinja_template", "compile_template"}
        if names & {"jinja2", "jinja2.sandbox", "from_string"}:
            found.add(path.relative_to(SOURCE).as_posix())
    assert found - ours == {child, parser}
    parsing = set(_names(ast.parse((SOURCE / parser).read_text())))
    assert not {"render", "from_string"} & parsing


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Name):
            yield node.id


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_bomb_is_over_in_time(name: str, quick: None) -> None:
    """It ends as an error of the template, or of ours; this process stays small."""
    del quick

    def asked() -> str:
        with pytest.raises(InputError) as caught:
            ChatPrompts(TEMPLATE, BOMBS[name], {})
        return str(caught.value)

    with small():
        assert asked().startswith(f"{TEMPLATE}: ")


def test_the_limits_leave_time_to_say_so() -> None:
    assert bounded_rendering.LIMITS.seconds <= 4
    assert bounded_rendering.LIMITS.memory <= 2**29


def test_a_template_that_went_beyond_is_not_tried_again() -> None:
    """And it is told from the one beside it."""
    endless = BOMBS["endless loops"] + "{# of this test #}"
    with pytest.raises(InputError, match="takes too long or too much memory"):
        render([SIMPLE, endless], [{"messages": []}])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded_rendering, "run_bounded", lambda *_: pytest.fail("tried again"))
        with pytest.raises(InputError, match="takes too long or too much memory"):
            render([endless], [{"messages": []}])
    [[one]] = render([SIMPLE], [{"messages": [], "add_generation_prompt": True}])
    assert one.text == "<|im_start|>assistant\n"


def test_a_template_far_too_long_is_not_rendered() -> None:
    with pytest.raises(InputError, match=r"expected at most 131072"):
        render(["x" * 2**18], [{}])


def test_no_process_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(InputError, match="cannot be rendered: no process for it"):
        render(["x"], [{}])


PROGRAM = """
import os, sys, time
what = sys.stdin.read()
if what == "flood":
    while True:
        os.write(1, b"x" * 2**16)
if what == "fork":
    if os.fork() == 0:
        os.close(1)
        time.sleep(9999)
    print(os.getpid())
if what == "hush":
    os.close(1)
    time.sleep(9999)
if what == "sleep":
    time.sleep(60)
if what == "write":
    os.write(os.open(sys.argv[0] + ".txt", os.O_WRONLY | os.O_CREAT), b"x")
if what == "look":
    sys.stderr.write("noise")
    print(sorted(os.environ), os.path.basename(sys.argv[0]), [p for p in sys.path if "site" in p])
if what == "import":
    import numpy
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize(
    ("what", "whole"),
    [("", True), ("flood", False), ("sleep", False), ("write", False), ("import", False)],
)
def test_a_child_that_misbehaves_is_ended(what: str, whole: bool, program: Path) -> None:
    seconds = 0.5 if what == "sleep" else 60
    output, ended = run_bounded(program, what.encode(), Limits(seconds, 2**29, 1000), ())
    assert ended is whole
    assert len(output) <= 1000
    written = program.with_name("program.py.txt")
    assert not written.exists() or written.stat().st_size == 0


def test_what_a_child_starts_ends_with_it(program: Path) -> None:
    """Its own session holds all of it: a leftover would keep the group alive."""
    output, _ = run_bounded(program, b"fork", Limits(PATIENCE, 2**29), ())
    end = time.monotonic() + PATIENCE
    while alive(int(output)):
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(group: int) -> bool:
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            states.append(fields[0])
    return any(state not in "ZX" for state in states)


def test_a_child_sees_little(
    program: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, tmp_path: Path
) -> None:
    """No token, no working directory, no noise; modules planted there are not its own."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    for name in ("json", "jinja2", "runpy", "resource", "tokenizers"):
        (tmp_path / f"{name}.py").write_text("open('planted', 'w')")
    output, whole = run_bounded(program, b"look", Limits(60, 2**29), ())
    assert whole
    assert b"HF_TOKEN" not in output
    assert b"[]\n" in output
    [[one]] = render(["{{ 1 + 1 }}"], [{}])
    assert one.text == "2"
    assert not (tmp_path / "planted").exists()
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_ends_the_child(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []

    def interrupted(kind: int, child: int, options: int) -> None:
        del kind, options
        assert alive(child)
        children.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "waitid", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bounded(program, b"hush", Limits(PATIENCE, 2**29), ())
    assert not alive(*children)


def test_a_small_machine_renders_too() -> None:
    """A limit that is lower already stays as it is."""
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**31, 2**31)); "
        "r.setrlimit(r.RLIMIT_CPU, (60, 60));"
        "from qwen35.verification.bounded_rendering import render; print(render(['{{ 3 }}'], [{}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "text='3', failed=False" in done.stdout


# --- parsed by us, never run

DEEP = 2**17 - 200
PARSED = {
    "a sum of 30,000": "{{ " + "a+" * (DEEP // 4) + "a }}",
    "alternatives of images": "{% if " + "'image' in a or " * 8000 + "a %}x{% endif %}",
    "130,000 signs": "{{ " + "-" * (DEEP - 9) + "a }}",
    "a number of 100,000 digits": "{{ " + "1" * 100_000 + " }}",
    "1,000 branches for images": "{% if 'image' in a %}x{% endif %}" * 1000,
    "power at compile time": "{{ 9 ** (9 ** (9 ** 9)) }}",
}


@pytest.mark.parametrize("name", list(PARSED))
def test_parsing_is_bounded(name: str) -> None:
    for parse in (compiles, text_only_template):
        with small():
            try:
                parse(PARSED[name], TEMPLATE)
            except InputError as error:
                assert str(error).startswith(f"{TEMPLATE}: ")  # noqa: PT017 - either is right


# --- styles


@pytest.mark.parametrize("style", list(STYLES))
def test_every_style_can_be_asked(style: str) -> None:
    template, thinking = STYLES[style]
    prompts = ChatPrompts(TEMPLATE, template, TOKENS)
    assert prompts.thinking == thinking
    for on in thinking:
        for task in TASKS:
            question = Question(task.prompt, "", thinking=on)
            assert task.prompt.casefold() in prompts.write(question).casefold()
    assert prompts.sees is (style in {"content in parts", "the embedded one"})
    switched = thinking == (False, True)
    assert any("no switch for thinking" in note for note in prompts.notes) is not switched
    added = any("does not render otherwise" in note for note in prompts.notes)
    assert added is ("required" in style)


@pytest.mark.parametrize("style", list(STYLES))
def test_prompts_are_those_of_transformers(style: str) -> None:
    """The same text as from transformers, in the form that the template takes."""
    template, thinking = STYLES[style]
    if "required" in style:
        pytest.skip("transformers refuses a plain question, too")
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    tokenizer.bos_token = "<s>"
    named = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    prompts = ChatPrompts(TEMPLATE, template, named)

    def theirs(content: object, *, on: bool) -> object:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=on,
        )

    for on in thinking:
        text = TASKS[1].prompt
        parts = [{"type": "text", "text": text}] if style == "content in parts" else text
        assert prompts.write(Question(text, "", thinking=on)) == theirs(parts, on=on)
    if prompts.sees:
        content = [{"type": "image"}, {"type": "text", "text": IMAGE.prompt}]
        assert prompts.write(IMAGE) == theirs(content, on=False)


def test_special_tokens_are_those_of_transformers() -> None:
    from qwen35.checkpoint.locations import LocalFolder

    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    ours = special_tokens(LocalFolder(ASSET))
    for name in ("eos_token", "pad_token", "image_token"):
        assert ours[name] == tokenizer.special_tokens_map[name]


def test_reasoning_that_nobody_asked_for_is_no_part_of_the_answer() -> None:
    question = Question("2 + 2?", "4")
    simple = ChatPrompts(TEMPLATE, SIMPLE, {})
    assert simple.answer(question, "<think>\n2\n</think>\n\n4") == "\n\n4"
    assert simple.answer(question, "4") == "4"
    switched = ChatPrompts(TEMPLATE, STYLES["the embedded one"][0], {})
    assert switched.answer(question, "<think>\n2\n</think>\n\n4").startswith("<think>")


def test_without_a_template_chatml_is_taken() -> None:
    prompts = ChatPrompts(TEMPLATE, None, {})
    assert prompts.write(Question("Hi", "")) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts.notes == ("no chat template: asked in ChatML, as llama.cpp would",)


@pytest.mark.sentences
@pytest.mark.parametrize("template", list(REFUSED))
def test_a_template_that_takes_no_question(template: str) -> None:
    with pytest.raises(InputError, match=REFUSED[template]):
        ChatPrompts(TEMPLATE, template, {})


@pytest.mark.sentences
def test_a_template_that_writes_a_book() -> None:
    with pytest.raises(InputError, match=r"writes \d+ characters for a plain question, expected"):
        ChatPrompts(TEMPLATE, SIMPLE + "x" * 20_000, {})


# --- verbs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint, text only."""
    return run(ASSET, tmp_path_factory.mktemp("text") / "out", recipe="text").out


def styled(source: Path, folder: Path, template: str | None) -> Path:
    """Copy a checkpoint without its manifest, with another template."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("qwen35.json", TEMPLATE))
    if template is not None:
        (folder / TEMPLATE).write_text(template)
    return folder


@pytest.mark.parametrize("style", ["Gemma", "Mistral, roles must alternate", "content in parts"])
def test_a_simple_template_is_no_finding(
    style: str, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = styled(text, tmp_path / "in", STYLES[style][0])
    assert main(["verify", str(folder), "--quiet"]) == 0
    assert "0 findings" in (shown := capsys.readouterr().out) or "passed" in shown


@pytest.mark.sentences
@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('Closed') }}", "refuses a plain question (TemplateError: Closed)"),
        (BOMBS["huge number format"], "refuses a plain question (MemoryError)"),
        (BOMBS["endless loops"], "takes too long or too much memory"),
    ],
)
def test_verify_names_what_a_template_does(
    template: str, sentence: str, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Also beside a source with the same template, and where settings hold it."""
    folder = styled(text, tmp_path / "in", None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template})
    )
    with small():
        assert main(["verify", str(folder), "--source", str(folder), "--json", "--quiet"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    [(check, subject, message)] = [tuple(one.values()) for one in found]
    assert (check, subject) == ("template", "tokenizer_config.json")
    assert sentence in message


@pytest.mark.sentences
@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('Closed on Sundays. ' * 10) }}",
        "{% for a in range(10**6) %}{% endfor %}",
        "{{ 2 ** 20000 }}",
        BOMBS["endless loops"],
        BOMBS["doubling"],
    ],
)
def test_one_fault_of_a_template_is_one_finding(
    template: str,
    text: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also beside a source whose template is another; what is cut ends in an ellipsis."""
    monkeypatch.setattr(bounded_rendering, "LIMITS", Limits(1, 2**29, 2**26))
    folder = styled(text, tmp_path / "in", template + "{# once #}")
    with small():
        assert main(["verify", str(folder), "--source", str(text), "--json", "--quiet"]) == 1
    [finding] = json.loads(capsys.readouterr().out)["findings"]
    message = finding["message"]
    assert message.startswith(("refuses a plain question", "takes too long"))
    assert len(message) < 250
    assert message.count("Sundays") < 10 or "..." in message
    assert (
        "range(10**6)" not in template or "MAX_RANGE (100000)" in message or "too long" in message
    )


def test_a_slow_template_is_not_rendered_for_every_conversation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error that it ended with counts; text that took too long does not."""
    monkeypatch.setattr(bounded_rendering, "LIMITS", Limits(PATIENCE, 2**29, 2**26))
    slow = "{% for a in range(99999) %}{% for b in range(50) %}{% endfor %}{% endfor %}"
    begin = _spent()
    [failed] = render([slow + "{{ nothing.at.all }}"], [{}] * 1000)
    assert {one.failed for one in failed} == {True}
    assert "UndefinedError" in failed[-1].text
    [late] = render([slow + "x"], [{}] * 1000)
    assert (late[0].text, late[-1].text) == ("x", "it takes too long")
    assert _spent() - begin < 5


@pytest.mark.parametrize("verb", ["convert", "gguf"])
def test_what_converts_never_renders(
    verb: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that never ends travels as it is."""
    folder = styled(text, tmp_path / "in", BOMBS["endless loops"])
    monkeypatch.setattr(bounded_rendering, "run_bounded", lambda *_: pytest.fail("rendered"))
    more = {"convert": ["--recipe", "nf4"], "gguf": ["--types", "F16"]}[verb]
    assert main([verb, str(folder), str(tmp_path / "out"), *more, "--quiet"]) == 0
