"""A stranger's tokenizer: whatever it asks for ends in a sentence, and soon."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from checkpoints import ASSET
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.errors import ConfigError
from qwen35.planning import bounded_tokenizer
from qwen35.planning.bounded_tokenizer import check_tokenizer, encode_bounded

TEXT = (ASSET / "eval.txt").read_text()[:4000]


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the embedded tokenizer with a change."""
    parsed = json.loads((ASSET / "tokenizer.json").read_text())
    change(parsed)
    return json.dumps(parsed).encode()


def cut_off(parsed: dict[str, Any]) -> None:
    parsed["truncation"] = {
        "direction": "Right",
        "max_length": 1,
        "strategy": "LongestFirst",
        "stride": 5,
    }


def pad(parsed: dict[str, Any]) -> None:
    parsed["padding"] = {
        "strategy": {"Fixed": 2_000_000_000},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }


def explode(parsed: dict[str, Any]) -> None:
    """Backtrack for ever in a row of x."""
    parsed["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(x+x+)+y"},
        "behavior": "Isolated",
        "invert": False,
    }


def multiply(parsed: dict[str, Any]) -> None:
    """Make 10 ** 12 letters of one."""
    ten = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}
    parsed["normalizer"] = {"type": "Sequence", "normalizers": [ten] * 12}


def panic(parsed: dict[str, Any]) -> None:
    """Name a second text where there is one: the library panics."""
    parsed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }


def test_ids_are_those_of_the_library() -> None:
    content = (ASSET / "tokenizer.json").read_bytes()
    library = Tokenizer.from_buffer(content)
    texts = [TEXT, "", "<|im_start|>naïve 你好"]
    for text, ids in zip(texts, encode_bounded(content, [t.encode() for t in texts]), strict=True):
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("change", [cut_off, pad])
def test_what_concerns_batches_is_left_out(change: Callable[[dict[str, Any]], None]) -> None:
    """Truncation and padding, as in transformers, which asks for either by its own arguments."""
    [exact] = encode_bounded((ASSET / "tokenizer.json").read_bytes(), [TEXT.encode()])
    [ids] = encode_bounded(changed(change), [TEXT.encode()])
    assert np.array_equal(ids, exact)


@pytest.mark.parametrize(("change", "text"), [(explode, "x" * 60), (multiply, TEXT), (panic, TEXT)])
def test_bombs_end(
    change: Callable[[dict[str, Any]], None], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_tokenizer, "SECONDS", 4)
    monkeypatch.setattr(bounded_tokenizer, "MEMORY", 2**30)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        encode_bounded(changed(change), [text.encode()])


def hostile(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(ASSET, tmp_path / "hostile"))
    (folder / "tokenizer.json").write_bytes(changed(multiply))
    return folder


def test_calibration_and_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_tokenizer, "MEMORY", 2**30)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert read_text(open_folder(ASSET), [text], context=64).tokens > 500
    folder = hostile(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        read_text(open_folder(folder), [text])


def test_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bounded_tokenizer, "MEMORY", 2**30)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--text", str(text), "--chunks", "2", "--context", "64", "--quiet"]
    assert main(["evaluate", str(hostile(tmp_path)), *options]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from qwen35.verification.asking_transformers import prompts_of

    monkeypatch.setattr(bounded_tokenizer, "MEMORY", 2**30)
    tokenizer, prompts = prompts_of(ASSET, transformers)
    assert len(prompts.texts) > 4
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        prompts_of(hostile(tmp_path), transformers)
    assert tokenizer is not None


def test_a_folder_without_one_is_left_to_its_engine(tmp_path: Path) -> None:
    check_tokenizer(tmp_path, ["text"])
