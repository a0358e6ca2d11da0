"""The embedded checkpoint's GGUF files in llama.cpp: logits, tokens, template, answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from checkpoints import ASSET
from gguf_models import make_variant
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.source import open_folder
from qwen35.engines.llama import Llama
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.questions import Question, is_right
from qwen35.writing.write import write

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
MIXED = (
    "def naïve(x: int) -> str:\n\treturn f'{x:>4}'  # 注释 — déjà vu 👩‍🚀🇨🇭 שלום ١٢٣\n\n\n"
    "<|im_start|>user\nHello, wörld!  What's 12345?<|im_end|>\n<think>\n</think> a\u200bb ÷ ½ Ⅷ\r\n"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = make_plan(open_folder(ASSET), load_recipe("mix", "gguf"), types=TYPES)
    return write(plan, tmp_path_factory.mktemp("gguf") / "out").out


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def reference(tokenizer: Any) -> tuple[list[list[int]], torch.Tensor]:
    """Windows of held-out text and transformers' float32 logits on them."""
    ids = tokenizer((ASSET / "eval.txt").read_text()[:20_000])["input_ids"]
    windows = [ids[i : i + 512] for i in range(0, 4 * 512, 512)]
    model = transformers.AutoModelForImageTextToText.from_pretrained(ASSET, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(windows)).logits
    return windows, logits


@pytest.fixture
def load(files: Path) -> Iterator[Any]:
    loaded: list[Llama] = []

    def one(kind: str) -> Llama:
        loaded.append(Llama(files / f"{ASSET.name}-{kind}.gguf"))
        return loaded[-1]

    yield one
    for model in loaded:
        model.close()


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence, in nats a token."""
    p, q = (torch.log_softmax(x.double(), dim=-1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("F32", 1e-7), ("F16", 1e-6), ("BF16", 2e-4), ("Q8_0", 2e-3), ("Q6_K", 2e-2), ("Q4_K_M", 0.1)],
)
def test_logits_agree_with_transformers(kind: str, bound: float, load: Any, reference: Any) -> None:
    windows, expected = reference
    model = load(kind)
    found = torch.from_numpy(np.stack([model.logits(ids) for ids in windows]))
    value = divergence(expected, found)
    assert -1e-12 < value < bound


@pytest.mark.parametrize("name", ["dense", "equal-heads", "three-to-one", "moe", "moe-per-expert"])
def test_random_variants_agree_with_transformers(name: str, tmp_path: Path) -> None:
    source = make_variant(tmp_path, name)
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("F32",))
    path = write(plan, tmp_path / "out").out / plan.files[0].name
    config = transformers.AutoConfig.from_pretrained(source)
    kind = config.architectures[0]
    expected_model = getattr(transformers, kind).from_pretrained(source, dtype=torch.float32)
    ids = torch.randint(0, 250, (64,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = expected_model.eval()(input_ids=ids[None]).logits[0]
    model = Llama(path)
    try:
        found = torch.from_numpy(model.logits(ids.tolist()))
    finally:
        model.close()
    assert divergence(expected, found) < 1e-8
    assert float((expected - found).abs().max()) < 1e-3


def test_the_same_tokens(load: Any, tokenizer: Any) -> None:
    model = load("Q4_K_M")
    text = MIXED + (ASSET / "eval.txt").read_text()[:50_000]
    assert model.encode(text) == tokenizer(text)["input_ids"]


def test_special_tokens_are_text_unless_parsed(load: Any, tokenizer: Any) -> None:
    model = load("F16")
    (end,) = tokenizer("<|im_end|>")["input_ids"]
    assert model.encode("<|im_end|>") == [end]
    assert end not in model.encode("<|im_end|>", special=False)


def test_text_that_is_not_nfc_gets_other_tokens_and_the_plan_says_so(
    load: Any, tokenizer: Any
) -> None:
    model = load("F16")
    text = "cafe\u0301 noe\u0308l"
    assert model.encode(text) != tokenizer(text)["input_ids"]
    plan = make_plan(open_folder(ASSET), load_recipe("mix", "gguf"), types=("F16",))
    assert any("NFC" in note for note in plan.notes)


def test_the_chat_template_travels(files: Path, load: Any, tokenizer: Any) -> None:
    keys = read_container(files / f"{ASSET.name}-Q4_K_M.gguf").keys
    assert keys["tokenizer.chat_template"] == (ASSET / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    options = {"add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids = tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
    assert load("F16").encode(text) == ids


ROWS = [row for row in json.loads((ASSET / "questions.json").read_text()) if row["image"] is None]


@pytest.mark.parametrize(("kind", "lost"), [("F16", 0.0), ("Q8_0", 0.0), ("Q4_K_M", 0.05)])
def test_questions_are_answered(kind: str, lost: float, load: Any, tokenizer: Any) -> None:
    model = load(kind)
    wrong = []
    for row in ROWS:
        question = Question.from_json(row)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=question.thinking,
        )
        said = model.decode(model.answer(model.encode(prompt)))
        if not is_right(question, said):
            wrong.append((question.prompt, said))
    assert len(wrong) <= lost * len(ROWS), wrong


def test_a_wrong_head_order_would_be_seen(files: Path, tmp_path: Path, reference: Any) -> None:
    """The control of the agreement above: one tensor in transformers' order instead of ggml's."""
    path = tmp_path / "wrong.gguf"
    content = bytearray((files / f"{ASSET.name}-F32.gguf").read_bytes())
    entry = read_container(files / f"{ASSET.name}-F32.gguf").tensors["blk.0.attn_gate.weight"]
    half = entry.nbytes // 4
    begin = entry.begin + half
    second, third = content[begin : begin + half], content[begin + half : begin + 2 * half]
    content[begin : begin + 2 * half] = third + second
    path.write_bytes(content)
    model = Llama(path)
    windows, expected = reference
    try:
        found = torch.from_numpy(model.logits(windows[0]))
    finally:
        model.close()
    assert divergence(expected[0], found) > 1e-5
