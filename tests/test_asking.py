"""What transformers, llama.cpp and vLLM are given when a model is asked: they are stood in for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, RepetitionPenaltyLogitsProcessor

from answering import Scripted
from checkpoints import ASSET
from qwen35.checkpoint.gguf_header import read_container
from qwen35.cli.main import main
from qwen35.errors import InputError, UsageError
from qwen35.verification import asking_vllm
from qwen35.verification.asking_engines import in_engine
from qwen35.verification.asking_llama import LlamaAsker
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.behaviour import IMAGE, TASKS
from qwen35.verification.bounded_rendering import render
from qwen35.verification.questions import Question
from running import run

Capture = pytest.CaptureFixture[str]

# --- transformers


class FakeTransformers:
    """The model, tokenizer and image processor that `Asker` calls: all on the meta device."""

    device = torch.device("meta")
    merge_size = 2

    def __init__(self) -> None:
        self.written: list[Question] = []
        self.given: dict[str, Any] = {}
        self.model = SimpleNamespace(visual=self)
        self.full = False
        self.places: list[str] = []

    def to(self, place: str) -> None:
        self.places.append(place)
        if self.full and place != "cpu":
            raise torch.OutOfMemoryError

    def write(self, question: Question) -> str:
        self.written.append(question)
        return "the prompt"

    def answer(self, question: Question, turn: str) -> str:
        assert question == self.written[-1]
        return f"{turn}."

    def __call__(self, text: str = "", **options: Any) -> dict[str, Any]:
        if text:
            assert (text, options) == ("the prompt", {"add_special_tokens": False})
            return {"input_ids": [7, 8, 99, 9]}
        assert options.pop("images").size == (448, 224)
        assert options == {"return_tensors": "pt"}
        return {
            "pixel_values": torch.ones(24, 3),
            "image_grid_thw": torch.tensor([[1, 4, 6]]),
        }

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<|image_pad|>": 99}[token]

    def generate(self, **given: Any) -> Any:
        self.given = given
        return torch.tensor([[1] * given["input_ids"].shape[1] + [5, 6]])

    def decode(self, turn: Any, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return f"said {turn.tolist()}"


@pytest.fixture
def fake() -> tuple[Asker, FakeTransformers]:
    asker, engine = object.__new__(Asker), FakeTransformers()
    asker.torch, asker.vision = torch, True
    asker.model = asker.tokenizer = asker.images = asker.prompts = engine  # type: ignore[assignment]
    return asker, engine


def test_transformers_is_asked_greedily(fake: tuple[Asker, FakeTransformers]) -> None:
    asker, engine = fake
    question = Question("2 + 2?", "4", thinking=True, tokens=5)
    assert asker.ask(question) == "said [5, 6]."
    rows = {name: engine.given.pop(name) for name in ("input_ids", "attention_mask")}
    assert {(row.shape, row.device.type) for row in rows.values()} == {((1, 4), "meta")}
    assert engine.given == {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 1.0}
    asker.ask(question, repetition_penalty=1.5)
    assert engine.given["repetition_penalty"] == 1.5
    assert engine.written == [question] * 2


def test_transformers_is_shown_a_picture(fake: tuple[Asker, FakeTransformers]) -> None:
    """One token for every 2 x 2 patches, where the template has one for the whole picture."""
    asker, engine = fake
    engine.device = torch.device("cpu")
    asker.ask(IMAGE)
    parts = {n: part for n, part in engine.given.items() if isinstance(part, torch.Tensor)}
    given = {name: part.tolist() for name, part in parts.items()}
    assert given.pop("pixel_values") == [[1.0] * 3] * 24
    assert given == {
        "input_ids": [[7, 8, *[99] * 6, 9]],
        "attention_mask": [[1] * 9],
        "mm_token_type_ids": [[0, 0, *[1] * 6, 0]],
        "image_grid_thw": [[1, 4, 6]],
    }
    assert engine.written == [IMAGE]


def test_a_dropped_tower_sees_nothing(fake: tuple[Asker, FakeTransformers]) -> None:
    asker, engine = fake
    assert asker.move("cuda", drop_tower=False)
    assert (asker.vision, engine.model.visual) == (True, engine)
    assert asker.move("cuda", drop_tower=True)
    assert (asker.vision, engine.model.visual) == (False, None)
    assert engine.places == ["cuda", "cuda"]


def test_out_of_memory_leaves_the_model_on_the_cpu(
    fake: tuple[Asker, FakeTransformers],
) -> None:
    asker, engine = fake
    engine.full = True
    assert asker.move("cuda", drop_tower=False) is False
    assert engine.places == ["cuda", "cpu"]


def test_without_transformers_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError) as caught:
        Asker(ASSET)
    assert str(caught.value).startswith("asking the model: transformers is not installed; in your")


# --- llama.cpp


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint as an F16 file."""
    out = tmp_path_factory.mktemp("gguf") / "out"
    assert main(["gguf", str(ASSET), str(out), "--types", "F16", "--quiet"]) == 0
    return out / "qwen3.5-tiny-F16.gguf"


def test_penalty_and_template_are_those_of_transformers(gguf: Path) -> None:
    """The same words from both engines, greedy with the penalty, on the unquantized file."""
    theirs = Asker(ASSET)
    questions = [replace(task, thinking=thinking) for task in TASKS for thinking in (False, True)]
    with LlamaAsker(read_container(gguf)) as ours:
        for question in questions:
            said = ours.ask(question, repetition_penalty=1.15)
            assert said == theirs.ask(question, repetition_penalty=1.15)


def test_llama_cpp_is_asked_with_the_penalty_of_transformers(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class FakeLlama:
        def __init__(self, path: Path, *, context: int, threads: int) -> None:
            self.opened = path, context, threads
            made.append(self)

        def encode(self, text: str) -> str:
            return text

        def answer(self, prompt: str, tokens: int, change: Callable[..., Any]) -> Any:
            self.prompt, self.tokens, self.change = prompt, tokens, change
            return "ids"

        def decode(self, answered: str) -> str:
            return f"said {answered}"

    monkeypatch.setattr("qwen35.verification.asking_llama.Llama", FakeLlama)
    container = read_container(gguf)
    asker = LlamaAsker(container, threads=3)
    [engine] = made
    assert engine.opened == (gguf, 2048, 3)
    question = Question("2 + 2?", "4", thinking=True, tokens=5)
    assert asker.ask(question, repetition_penalty=1.5) == "said ids"
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    assert (engine.prompt, engine.tokens) == (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "2 + 2?"}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        ),
        5,
    )
    row = np.array([3, -3, 0, 6, -6, 0.5], np.float32)
    theirs = RepetitionPenaltyLogitsProcessor(1.5)
    for seen in ([0, 1, 1, 2], [5], [4, 3, 4]):
        changed = theirs(torch.tensor([seen]), torch.tensor(row[None]))
        assert engine.change(row, seen).tolist() == changed[0].tolist()
    assert row.tolist() == [3, -3, 0, 6, -6, 0.5]
    asker.ask(question)
    assert engine.change(row, [0, 1]).tolist() == row.tolist()
    LlamaAsker(container)
    assert made[-1].opened == (gguf, 2048, 1)
    broken = replace(container, keys={**container.keys, "tokenizer.chat_template": "{% if %}"})
    refused = rf"^{gguf.name}: refuses a plain question .TemplateSyntaxError"
    with pytest.raises(InputError, match=refused):
        LlamaAsker(broken)


def test_a_template_is_rendered_as_transformers_renders_it() -> None:
    """Blocks take their line with them; loops can be left (`render_jinja_template`)."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = "{% for x in 'abc' %}\n  {% if x == 'b' %}\n{% break %}{% endif %}\n-{{ x }}\n"
    source += "{% endfor %}\n."
    [[ours]] = render([source], [{}])
    [theirs], _ = render_jinja_template([[]], chat_template=source)
    assert ours.text == theirs == "-a\n."


# --- vLLM


class FakeVllm:
    """What `VllmAsker` calls of vLLM; answers as scripted and remembers what it was given."""

    def __init__(self) -> None:
        self.scripted = Scripted()
        self.options: dict[str, Any] = {}
        self.asked: list[tuple[bool, bool]] = []
        self.samplings: list[dict[str, Any]] = []

    def llm(self, **options: Any) -> FakeVllm:
        self.options = options
        return self

    def generate(
        self, prompts: list[Any], sampling: dict[str, Any], *, use_tqdm: bool
    ) -> list[Any]:
        assert use_tqdm is False
        [given] = prompts
        picture = given.get("multi_modal_data", {}).get("image")
        if picture is not None:
            assert [picture.getpixel((x, 0)) for x in (0, 447)] == [(255, 0, 0), (0, 0, 255)]
        text = given["prompt"]
        assert text.count("<|image_pad|>") == (picture is not None)
        thinking = text.endswith("<think>\n")
        assert thinking or text.endswith("<think>\n\n</think>\n\n")
        [prompt] = [task.prompt for task in (IMAGE, *TASKS) if task.prompt in text]
        self.asked.append((thinking, picture is not None))
        self.samplings.append(sampling)
        said = self.scripted.ask(Question(prompt, "", thinking=thinking))
        return [SimpleNamespace(outputs=[SimpleNamespace(text=said)])]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    vars(module).update(LLM=fake.llm, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_LOGGING_STREAM", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return fake


@pytest.mark.parametrize("recipe", ["bf16", "text-nf4"])
def test_vllm_is_asked_everything(
    recipe: str, vllm: FakeVllm, tmp_path: Path, capsys: Capture
) -> None:
    """Every question, with the penalty, the template's switch and the picture where it sees."""
    out = run(ASSET, tmp_path / "out", recipe=recipe).out
    arguments = ["verify", str(out), "--depth", "behaviour", "--engine", "vllm", "--quiet"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == ["asked in vLLM"]
    vision = recipe == "bf16"
    assert len(told["answers"]) == len(vllm.asked) == 10 + vision
    assert vllm.options == {
        "model": str(out),
        "max_model_len": 2048,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": int(vision), "video": 0},
    }
    assert vllm.asked == [(False, True)] * vision + [(False, False)] * 5 + [(True, False)] * 5
    questions = [IMAGE] * vision + [*TASKS, *TASKS]
    assert vllm.samplings == [
        {"temperature": 0.0, "max_tokens": question.tokens, "repetition_penalty": 1.15}
        for question in questions
    ]
    vllm.scripted.change = lambda _, said: said.replace("Paris", "Rome")
    assert main(arguments) == 1
    assert "capital of France" in capsys.readouterr().out


def test_what_vllm_refuses_is_a_finding(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **more: Any) -> Any:
        raise ValueError("no\n preprocessor")

    for name, sentence in {
        "generate": "vLLM cannot answer it (ValueError: no preprocessor)",
        "llm": "vLLM cannot load it (ValueError: no preprocessor)",
    }.items():
        if name == "llm":
            monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
        else:
            monkeypatch.setattr(vllm, name, refuse)
        [found] = in_engine("vllm", ASSET, vision=False).findings
        assert (found.check, found.message) == ("load", sentence)


def test_vllm_speaks_to_stderr_unless_told_otherwise(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking_vllm.VllmAsker(ASSET, vision=False)
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    asker = asking_vllm.VllmAsker(ASSET, vision=False)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    asker.ask(TASKS[0])
    assert vllm.samplings[0]["repetition_penalty"] == 1.0


@pytest.mark.sentences
@pytest.mark.parametrize(
    ("model", "more", "sentence"),
    [
        (ASSET, ("--depth", "behaviour"), "vllm is not installed"),
        (ASSET, ("--depth", "numbers"), "is not used at depth numbers"),
        (Path("x.gguf"), ("--depth", "behaviour"), "is for checkpoints"),
    ],
)
def test_vllm_refused(
    model: Path,
    more: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(asking_vllm, "find_spec", lambda _: None)
    assert main(["verify", str(model), "--engine", "vllm", *more]) == 2
    assert sentence in capsys.readouterr().err
