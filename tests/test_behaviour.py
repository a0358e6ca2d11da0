"""Depth behaviour and the old verify commands: answers are checked, and a broken model fails."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from answering import RIGHT, Scripted
from checkpoints import ASSET, write_checkpoint
from qwen35.checkpoint.gguf_header import GgufHeader
from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.open import describe, gguf_files
from qwen35.cli.main import main
from qwen35.cli.old import front_doors
from qwen35.errors import InputError, UsageError
from qwen35.verification import asking_transformers, behaviour, device_choice
from qwen35.verification.behaviour import IMAGE, TASKS, Answer, ask, behaviour_findings
from qwen35.verification.device_choice import choose
from qwen35.verification.gguf_subject import GgufSubject
from qwen35.verification.questions import Halves, Question, is_right
from qwen35.verification.verdict import verify
from running import load_all, read_config, run

Capture = pytest.CaptureFixture[str]

RECIPES = ("text", "nf4", "text-nf4", "fp8", "fp8-conservative", "text-fp8")
AGAIN = ("text", "text-nf4", "fp8-conservative")
"""Text-only FP8 is asked, too; an old command asks the second; the third packs fewer layers."""


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask two questions, and of the picture: enough to go on from one to the next."""
    monkeypatch.setattr(behaviour, "TASKS", TASKS[-2:])


def faults(change: Callable[[Question, str], str]) -> list[str]:
    """Return the messages of a scripted model's findings."""
    answers = list(ask(Scripted(change), image=True))
    return [finding.message for finding in behaviour_findings(answers)]


def shuffled(folder: Path) -> Path:
    """Write the embedded checkpoint with the rows of every projection in another order."""
    tensors = load_all(ASSET)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") and "visual" not in name:
            tensors[name] = tensor[torch.randperm(len(tensor), generator=generator)]
    made = write_checkpoint(folder, read_config(ASSET), tensors)
    for file in ASSET.iterdir():
        if file.suffix != ".safetensors" and not (made / file.name).exists():
            (made / file.name).write_bytes(file.read_bytes())
    return made


# --- what a right answer is


def test_a_good_model_passes_in_both_modes() -> None:
    engine = Scripted()
    answers = list(ask(engine, image=True))
    assert [answer.right for answer in answers] == [True] * (1 + 2 * len(TASKS))
    assert [answer.question.thinking for answer in answers] == [False] * 6 + [True] * 5
    assert engine.penalties == {1.15}
    assert list(behaviour_findings(answers)) == []
    assert json.dumps([answer.to_json() for answer in answers])


def test_reasoning_with_thinking_off_is_a_fault() -> None:
    found = faults(lambda q, said: said if q.thinking else f"<think>\nHm.\n</think>\n\n{said}")
    assert found == ["thinking OFF: there is a reasoning block"] * 6


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("Paris", "thinking ON: the reasoning does not end"),
        ("\n</think>\nx", "thinking ON: no rea"),
    ],
)
def test_no_reasoning_with_thinking_on_is_a_fault(said: str, message: str) -> None:
    found = faults(lambda q, right: said if q.thinking else right)
    assert len(found) == 5
    assert all(text.startswith(message) for text in found)


def test_a_wrong_answer_is_quoted() -> None:
    found = faults(lambda q, said: said.replace("Paris", "London"))
    assert found == ["'The capital of France is **London**.', expected 'Paris'"] * 2


@pytest.mark.parametrize("prompt", list(RIGHT))
def test_every_question_can_be_answered_wrongly(prompt: str) -> None:
    found = faults(lambda q, said: "I do not know." if q.prompt == prompt else said)
    assert len(found) == (1 if prompt == IMAGE.prompt else 2)


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("def f(a, b):\n    return a + b", True),
        ("```python\ndef f(a, b):\n    '''Sum.'''\n    return b + a\n```\nDone.", True),
        (
            "```py\ndef f(first: float, second: float = 0) -> float:\n    return first+second\n```",
            True,
        ),
        ("```python\ndef f(a, b):\n    return a - b\n```", False),
        ("```python\ndef f(a, b):\n    return a + a\n```", False),
        ("```python\ndef f(a, b, c):\n    return a + b\n```", False),
        ("```python\nprint(a + b)\n```", False),
        ("```python\ndef f(a, b:\n    return a + b\n```", False),
        ("a + b", False),
        ("", False),
    ],
)
def test_a_function_that_adds_is_recognised_without_running_it(code: str, right: bool) -> None:
    question = next(task for task in TASKS if task.match == "sum")
    assert is_right(question, code) is right


# --- where it runs


@pytest.mark.parametrize(
    ("total", "visual", "free", "strategy"),
    [
        (95, 20, 100, "cuda_direct"),
        (96, 20, 100, "cuda_drop"),
        (115, 20, 100, "cuda_drop"),
        (116, 20, 100, "cpu"),
        (96, 0, 100, "cpu"),
        (1, 0, 0, "cpu"),
    ],
)
def test_strategy_follows_bytes_on_disk(total: int, visual: int, free: int, strategy: str) -> None:
    assert choose(total, visual, free) == strategy


FUNCTION = "```python\ndef add(a, b):\n    return a + b\n```"


@pytest.mark.parametrize(
    ("match", "expect", "said", "right"),
    [
        ("any", "4 four", "The answer is four.", True),
        ("any", "4 four", "44", False),
        ("all", "ciel bleu", "Le ciel est bleu", True),
        ("all", "ciel bleu", "Le ciel", False),
        ("all", "fox dog", "Fox dog", True),
        ("all", "fox dog", "a fox", False),
        ("words", "fox dog", "Fox dog.", True),
        ("words", "fox dog", "A fox. A dog.", False),
        ("words", "fox dog", "A cat.", False),
        ("contains", "a + b", "so A + B it is", True),
        ("code", "a + b", FUNCTION, True),
        ("code", "a + b", f"Sure: {FUNCTION}", False),
        ("code", "a + b", FUNCTION.strip("`"), False),
        ("code", "a + b", FUNCTION.replace("def add", "add ="), False),
        ("code", "a - b", FUNCTION, False),
    ],
)
def test_answers_are_matched_as_asked(match: str, expect: str, said: str, right: bool) -> None:
    assert is_right(Question("?", expect, match), said) is right


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("hm</think>four", True),
        ("hm</think>no</think>four", False),
        ("</think>four", False),
        (" \n</think>four", False),
        ("four", False),
    ],
)
def test_reasoning_ends_once_and_is_not_empty(said: str, right: bool) -> None:
    assert is_right(Question("?", "four", "word", thinking=True), said) is right


def test_an_unknown_match_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        is_right(Question("2 + 2?", "4", "sometimes"), "4")
    assert str(caught.value) == "2 + 2?: match 'sometimes', expected word, words, ..."


def test_a_question_is_read_from_a_row() -> None:
    row = {"id": "a", "prompt": "2 + 2?", "expect": "4", "match": "any", "thinking": 1}
    assert Question.from_json(row) == Question("2 + 2?", "4", "any", thinking=True)
    shown = {"left": "red", "right": "blue", "size": [8, 2]}
    halves = Halves("red", "blue", 8, 2)
    question = Question("?", "4", "all", image=halves)
    read = Question.from_json({"image": shown, **row, "prompt": "?", "match": "all", "thinking": 0})
    assert read == question
    assert read.thinking is False


def test_a_picture_is_two_halves() -> None:
    image = asking_transformers.drawn(Halves("red", "blue", 5, 3))
    assert image.size == (5, 3)
    red, blue = asking_transformers.COLORS["red"], asking_transformers.COLORS["blue"]
    for y in range(3):
        assert [image.getpixel((x, y)) for x in range(5)] == [red, red, blue, blue, blue]


def test_an_answer_names_its_file_if_there_are_several() -> None:
    one = Answer(Question("?", "4"), "4").to_json()
    assert (one["said"], one["right"], "file" in one) == ("4", True, False)
    assert Answer(Question("?", "4"), "4", "a.gguf").to_json() == {"file": "a.gguf", **one}


def test_sizes_count_the_tower() -> None:
    items = inventory(describe(str(ASSET)))
    tower = [i for i in items if i.weight.name.startswith("model.visual.")]
    sizes = [sum(item.weight.nbytes for item in part) for part in (items, tower)]
    assert device_choice.sizes(items) == tuple(sizes)
    assert 0 < sizes[1] < sizes[0]


@pytest.mark.parametrize(("there", "free"), [(True, 30), (False, 0)])
def test_free_memory_is_that_of_the_first_gpu(
    there: bool, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30, 100))
    assert device_choice.free_gpu_bytes() == free


def gpu(
    monkeypatch: pytest.MonkeyPatch, free: int, *, full: bool = False
) -> list[tuple[str, bool]]:
    """Pretend that there is a GPU; it is the CPU. Returns where models were moved."""
    moves: list[tuple[str, bool]] = []
    real = asking_transformers.Asker.move

    def move(self: asking_transformers.Asker, device: str, *, drop_tower: bool) -> bool:
        moves.append((device, drop_tower))
        if full:
            return False
        return real(self, "cpu", drop_tower=drop_tower)

    monkeypatch.setattr("qwen35.cli.old.old_verify.free_gpu_bytes", lambda: free)
    monkeypatch.setattr(asking_transformers.Asker, "move", move)
    return moves


def test_tower_is_dropped_after_the_picture(
    few_tasks: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    total, visual = device_choice.sizes(inventory(describe(str(ASSET))))
    moves = gpu(monkeypatch, free=int((total - visual) / 0.95) + 1)
    assert front_doors.verify_qwen35(["--model", str(ASSET)]) == 0
    shown = capsys.readouterr().out
    assert "strategy cuda_drop" in shown
    assert "tower dropped, text on the GPU" in shown
    assert moves == [("cuda", True)]


def test_full_gpu_falls_back_to_the_cpu(
    few_tasks: None, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    moves = gpu(monkeypatch, free=10**12, full=True)
    assert front_doors.verify(["--model", str(ASSET)]) == 0
    shown = capsys.readouterr().out
    assert "out of memory on the GPU, back on the CPU" in shown
    assert "strategy cpu" in shown
    assert moves == [("cuda", False)]


# --- the old commands


def test_old_command_goes_through_its_stages(capsys: Capture) -> None:
    assert front_doors.verify_qwen35(["--model", str(ASSET)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[Qwen3.5 · local · vlm · f16] {ASSET}"
    assert lines[1].startswith("Size on disk: ")
    stages = [line for line in lines if line[:1].isdigit()]
    assert stages == [
        "1 Config",
        "2 Load",
        "3 Precision",
        "4 Inference [IMAGE]",
        "5a THINKING OFF",
        "5b THINKING ON",
    ]
    assert "   0/73 linear layers quantized (0%)" in lines
    assert "   10 visual tower layers at full precision" in lines
    assert "   expected: 'red'" in lines
    assert lines[-1] == "ALL CHECKS PASSED"


def test_old_generic_command_on_text_only_nf4(
    few_tasks: None, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    run(ASSET, out, "text-nf4")
    assert front_doors.verify(["--model", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"[Qwen3.5 · local · text · bnb] {out}" in shown
    assert "   62/63 linear layers quantized (98%)" in shown
    assert "   no visual tower" in shown
    assert "   skipped: text only" in shown


def test_broken_model_fails_the_old_command(
    few_tasks: None, tmp_path: Path, capsys: Capture
) -> None:
    assert front_doors.verify(["--model", str(shuffled(tmp_path / "in")), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert [answer["right"] for answer in found["answers"]] == [False] * 4


@pytest.mark.sentences
def test_defect_is_reported_before_loading(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head missing from the skip list: nothing is loaded, nothing repaired."""
    out = tmp_path / "out"
    run(ASSET, out, "nf4")
    config = read_config(out)
    config["quantization_config"]["llm_int8_skip_modules"].remove("lm_head")
    (out / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(asking_transformers.Asker, "__init__", lambda *_: pytest.fail("loaded"))
    assert front_doors.verify_qwen35(["--model", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "FAILED lm_head: " in shown
    assert "FAILED: do not use this checkpoint" in shown


@pytest.mark.sentences
def test_missing_image_library_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = builtins.__import__

    def without_pillow(name: str, *args: Any, **options: Any) -> Any:
        if (
            name == "PIL"
            and args
            and args[0].get("__name__") == "qwen35.verification.asking_transformers"
        ):
            raise ImportError("No module named 'PIL'", name="PIL")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    assert front_doors.verify_qwen35(["--model", str(ASSET)]) == 2
    assert "Pillow is not installed" in capsys.readouterr().err


def test_what_is_not_there_is_an_error(capsys: Capture) -> None:
    assert front_doors.verify(["--model", "./nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


# --- the verb


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=pytest.mark.heavy if r in AGAIN else ()) for r in RECIPES]
)
def test_embedded_checkpoint_answers_in_every_format(
    recipe: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    run(ASSET, out, recipe)
    arguments = ["verify", str(out), "--source", str(ASSET), "--depth", "behaviour"]
    assert main([*arguments, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert all(answer["right"] for answer in found["answers"])
    assert len(found["answers"]) == (10 if recipe.startswith("text") else 11)


def test_embedded_checkpoint_itself_answers(capsys: Capture) -> None:
    assert main(["verify", str(ASSET), "--depth", "behaviour"]) == 0
    shown, told = capsys.readouterr()
    assert f"asking {ASSET.name}: 11 questions\n" in told
    assert shown.count("  right") == 11
    assert "note: asked in transformers, on the cpu" in shown


def test_broken_model_is_found_by_what_it_says(
    few_tasks: None, tmp_path: Path, capsys: Capture
) -> None:
    folder = shuffled(tmp_path / "in")
    assert main(["verify", str(folder), "--depth", "numbers", "--quiet"]) == 0
    assert main(["verify", str(folder), "--depth", "behaviour", "--quiet"]) == 1
    assert "[behaviour]" in capsys.readouterr().out


def test_nothing_is_asked_when_the_files_are_wrong(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    run(ASSET, out, "fp8")
    config = read_config(out)
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (out / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(out), "--depth", "behaviour", "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert "weight_block_size" in shown
    assert "note: no questions asked" in shown


def test_answer_is_judged_once_more_from_its_fields() -> None:
    answer = Answer(replace(TASKS[0], thinking=True), "Two and two.\n</think>\n\n4")
    assert answer.right
    assert behaviour.Answer(TASKS[0], "5").fault == "'5', expected '4 four'"


# --- GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "out"
    types = "F16,BF16,Q8_0,Q6_K,Q5_K_M,Q4_K_M"
    assert main(["gguf", str(ASSET), str(out), "--types", types, "--mmproj", "--quiet"]) == 0
    return out


def test_every_gguf_file_answers(gguf: Path, capsys: Capture) -> None:
    arguments = ["verify", str(gguf), "--source", str(ASSET), "--depth", "behaviour"]
    assert main([*arguments, "--json"]) == 0
    shown, told = capsys.readouterr()
    found = json.loads(shown)
    files = {path.name for path in gguf.glob("qwen3.5-tiny-*.gguf")}
    assert {f"asking {name}: 10 questions" for name in files} <= set(told.splitlines())
    assert len(files) == 6
    assert {answer["file"] for answer in found["answers"]} == files
    assert len(found["answers"]) == 60
    assert all(answer["right"] for answer in found["answers"])


def test_wrong_answers_of_every_file_are_found(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Scripted):
        """Knows another capital."""

        def __init__(self, container: GgufHeader, threads: int) -> None:
            super().__init__(lambda _, said: said.replace("Paris", container.path.stem[-4:]))
            opened.append((container.path.name, threads))

        def __enter__(self) -> Wrong:
            return self

        def __exit__(self, *_: object) -> None:
            opened.append(("closed", 0))

    opened: list[tuple[str, int]] = []
    monkeypatch.setattr("qwen35.verification.asking_llama.LlamaAsker", Wrong)
    files = gguf_files(str(gguf))
    assert files is not None
    verdict = verify(GgufSubject(str(gguf), files), depth="behaviour", threads=3)
    asked = [name for name in files.names if not name.startswith("mmproj")]
    assert opened == [entry for name in asked for entry in ((name, 3), ("closed", 0))]
    capital = TASKS[-1]
    assert [(f.check, f.subject, f.message) for f in verdict.findings] == [
        (
            "behaviour",
            f"{name}: {capital.prompt}",
            f"'The capital of France is **{Path(name).stem[-4:]}**.', expected 'Paris'",
        )
        for name in asked
        for _ in ("off", "on")
    ]
    assert [answer.file for answer in verdict.answers] == [
        name for name in asked for _ in range(10)
    ]
    assert verdict.notes == (
        "asked in llama.cpp, without pictures: the binding is built without vision support",
    )


def test_gguf_of_a_broken_model_is_found_by_what_it_says(tmp_path: Path, capsys: Capture) -> None:
    source, out = shuffled(tmp_path / "in"), tmp_path / "out"
    assert main(["gguf", str(source), str(out), "--types", "Q8_0", "--quiet"]) == 0
    assert main(["verify", str(out), "--depth", "numbers", "--quiet"]) == 0
    assert main(["verify", str(out), "--depth", "behaviour", "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert "-Q8_0.gguf: What is the capital of France?" in shown


@pytest.mark.sentences
def test_gguf_that_llama_cpp_does_not_load(tmp_path: Path) -> None:
    from qwen35.engines.llama import Llama

    path = tmp_path / "none.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="llama.cpp cannot load it"):
        Llama(path)
