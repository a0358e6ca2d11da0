"""Behaviour checks survive fine-tunes as people save them, with whatever template they have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from answering import Scripted
from checkpoints import ASSET
from fine_tunes import FINE_TUNES, save_fine_tune
from pipeline_runs import go
from qwen35.cli.main import main
from qwen35.cli.old import front_doors
from qwen35.engines.torch_model import TorchModel
from qwen35.verification import asking_transformers, behaviour
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.questions import TASKS, Question
from template_styles import SIMPLE, STYLES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
Capture = pytest.CaptureFixture[str]
TEMPLATE = "chat_template.jinja"


@pytest.fixture(scope="session")
def fine_tune(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a fine-tune on first use."""
    base = tmp_path_factory.mktemp("fine-tunes")

    def saved(name: str) -> Path:
        out = base / name.replace(" ", "-")
        return out if out.exists() else save_fine_tune(name, out)

    return saved


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The model answers by a script; its files are loaded, and prompts are written."""
    script = Scripted()

    def said(self: Asker, question: Question, *, repetition_penalty: float = 1.0) -> str:
        assert question.prompt in self.prompts.write(question)
        turn = script.ask(question, repetition_penalty=repetition_penalty)
        return self.prompts.answer(question, turn)

    monkeypatch.setattr(Asker, "ask", said)
    return script


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Copy a fine-tune without some files, with other texts in others."""

    def edit(source: Path, *without: str, **texts: str) -> Path:
        folder = tmp_path / "Model"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*without))
        for name, text in texts.items():
            (folder / f"{name}.{'jinja' if name == 'chat_template' else 'json'}").write_text(text)
        return folder

    return edit


def told(capsys: Capture, folder: Path, code: int) -> dict[str, Any]:
    """Verify by behaviour; return what was said."""
    capsys.readouterr()
    assert main(["verify", str(folder), "--depth", "behaviour", "--json", "--quiet"]) == code
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


NOTES = {
    "whole": "",
    "text": "",
    "merged": "not shown a picture: no preprocessor_config.json",
    "trained head": "no chat template: asked in ChatML, as llama.cpp would",
}


@pytest.mark.parametrize("name", list(FINE_TUNES))
def test_a_fine_tune_answers(
    name: str,
    fine_tune: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """One question is enough: turns end, although only the first has a whole generation config."""
    monkeypatch.setattr(behaviour, "TASKS", TASKS[-1:])
    monkeypatch.setattr(behaviour, "IMAGE", behaviour.IMAGE)
    said = told(capsys, fine_tune(name), 0)
    assert len(said["answers"]) == {"whole": 3, "text": 2, "merged": 2, "trained head": 1}[name]
    assert all(len(answer["said"]) < 700 for answer in said["answers"])
    assert not NOTES[name] or NOTES[name] in said["notes"]


@pytest.mark.parametrize("name", list(FINE_TUNES))
def test_a_stripped_fine_tune_is_asked(
    name: str,
    fine_tune: Callable[[str], Path],
    scripted: Scripted,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    del scripted
    vision = name in {"whole", "merged"}
    arguments = ["--model", str(fine_tune(name)), "--output", str(tmp_path / "out")]
    assert front_doors.strip([*arguments, "--mode", "f16"]) == (0 if vision else 2)
    said = capsys.readouterr()
    assert ("(ok)" in said.out) if vision else ("already a text-only" in said.err)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("whole", front_doors.verify_qwen35),
        ("text", front_doors.verify),
        ("merged", front_doors.verify_qwen35),
        ("trained head", front_doors.verify),
    ],
)
def test_the_old_commands_ask_a_fine_tune(
    name: str,
    command: Callable[[list[str]], int],
    fine_tune: Callable[[str], Path],
    scripted: Scripted,
    capsys: Capture,
) -> None:
    del scripted
    assert command(["--model", str(fine_tune(name))]) == 0
    said = capsys.readouterr().out
    assert not NOTES[name] or f"   note: {NOTES[name]}" in said
    assert ("skipped: the chat template has no switch" in said) is (name == "trained head")
    assert ("skipped: no picture can be shown" in said) is (name == "merged")


@pytest.mark.parametrize("style", list(STYLES)[:11])
def test_a_fine_tune_with_any_template_is_asked(
    style: str,
    fine_tune: Callable[[str], Path],
    edited: Callable[..., Path],
    scripted: Scripted,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """Never a false alarm for a template that is simply simpler."""
    del scripted
    template, thinking = STYLES[style]
    folder = edited(fine_tune("text"), TEMPLATE, chat_template=template)
    said = told(capsys, folder, 0)
    assert {answer["thinking"] for answer in said["answers"]} == set(thinking)
    assert len(said["answers"]) == 5 * len(thinking)


def test_a_picture_without_a_place_is_not_shown(
    fine_tune: Callable[[str], Path],
    edited: Callable[..., Path],
    scripted: Scripted,
    capsys: Capture,
) -> None:
    del scripted
    folder = edited(fine_tune("whole"), TEMPLATE, chat_template=SIMPLE)
    assert asking_transformers.UNSEEN in told(capsys, folder, 0)["notes"]
    assert front_doors.verify_qwen35(["--model", str(folder)]) == 0


@pytest.mark.sentences
@pytest.mark.parametrize(
    ("without", "texts", "check", "sentence"),
    [
        (("tokenizer.json",), {}, "load", "no tokenizer, so nothing can be asked"),
        (
            (TEMPLATE,),
            {"chat_template": "{{ raise_exception('No') }}"},
            "template",
            "refuses a plain question (TemplateError: No)",
        ),
        (
            (),
            {"preprocessor_config": '{"image_processor_type": "NoSuchProcessor"}'},
            "load",
            "transformers cannot load its image preprocessor",
        ),
        (
            (),
            {"generation_config": '{"transformers_version": [], "max_new_tokens": -3}'},
            "load",
            "transformers cannot load it",
        ),
    ],
)
def test_what_is_missing_or_refuses_is_a_finding(
    without: tuple[str, ...],
    texts: dict[str, str],
    check: str,
    sentence: str,
    fine_tune: Callable[[str], Path],
    edited: Callable[..., Path],
    scripted: Scripted,
    capsys: Capture,
) -> None:
    """By verify a finding; by the old commands a finding or a sentence; never a traceback."""
    del scripted
    folder = edited(fine_tune("whole"), *without, **texts)
    found = told(capsys, folder, 1)["findings"]
    assert [one["check"] for one in found] == [check]
    assert sentence in found[0]["message"]
    for command in (front_doors.verify, front_doors.verify_qwen35):
        assert command(["--model", str(folder)]) in {1, 2}
        said = capsys.readouterr()
        assert sentence in said.out + said.err
    out = folder.parent / "out"
    code = front_doors.strip(["--model", str(folder), "--output", str(out), "--mode", "f16"])
    said = capsys.readouterr()
    if "tokenizer.json" in without:
        assert (code, "inference: skipped, the source has no tokenizer.json" in said.out) == (
            0,
            True,
        )
    elif "preprocessor_config" in texts:
        assert code == 0  # the text model needs none
    else:
        assert code == 1
        assert sentence in said.out


@pytest.mark.sentences
def test_an_answer_that_fails_is_a_finding(
    fine_tune: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fails(*_: Any, **more: Any) -> Any:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(transformers.GenerationMixin, "generate", fails)
    [found] = told(capsys, fine_tune("text"), 1)["findings"]
    assert found["message"] == (
        "transformers cannot answer it (IndexError: index out of range in self)"
    )


def test_a_run_goes_on_with_other_artifacts(
    fine_tune: Callable[[str], Path],
    scripted: Scripted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """One that transformers cannot load closes its gate."""
    del scripted

    def odd(folder: Path) -> Any:
        if folder.name.endswith("bnb-4bit"):
            raise ValueError("an odd file")
        return TorchModel(folder)

    monkeypatch.setattr(asking_transformers, "TorchModel", odd)
    said = go(capsys, fine_tune("merged"), tmp_path / "out", "--depth", "behaviour", paths="AF")
    assert said.code == 1
    states = said.states("verify")
    assert {name.endswith("bnb-4bit"): state for name, state in states.items()} == {
        True: "closed",
        False: "done",
    }


def test_a_run_closes_the_gate_of_a_template_that_refuses(
    fine_tune: Callable[[str], Path], edited: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    text = "{{ raise_exception('No') }}"
    folder = edited(fine_tune("merged"), TEMPLATE, chat_template=text)
    said = go(capsys, folder, tmp_path / "out", paths="A")
    assert said.code == 1
    assert "refuses a plain question (TemplateError: No)" in json.dumps(said.steps)


def test_the_tokenizers_own_end_ends_a_turn(fine_tune: Callable[[str], Path]) -> None:
    """As in vLLM and llama.cpp; transformers knows config.json's token alone."""
    asker = Asker(fine_tune("text"))
    end = asker.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in asker.model.generation_config.eos_token_id
    assert Asker(ASSET).model.generation_config.eos_token_id is not None
