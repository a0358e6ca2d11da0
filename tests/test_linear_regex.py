"""Regular expressions from files: linear time, and what transformers' own would match."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from checkpoints import ASSET
from qwen35.cli.main import main
from qwen35.codecs.nf4.config import is_skipped
from qwen35.errors import UsageError
from qwen35.linear_regex import MOST_PATTERNS, compile_linear
from qwen35.planning.gguf_files.type_patterns import pattern_rules

BOMBS = (
    "((((([a-z0-9_.]+)+)+)+)+)+!",
    "(.*.*.*.*.*.*.*.*.*.*.*.*)*!",
    "(([a-z_]+)+[.]?)+!",
    "(.|[a-z]|[^!])+!",
    "(a?|b?|[a-z._0-9]?){50}!",
    "([a-z]*[._]*[0-9]*)*!",
)
"""Each takes a backtracking engine longer than any test may wait."""

NAMES = ("model.language_model.layers.11.linear_attn.in_proj_qkv", "lm_head", "model.visual.x.")


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_matched_at_once(bomb: str) -> None:
    pattern = compile_linear(bomb)
    assert not any(pattern.search(name * 10) for name in NAMES)
    assert pattern.search("a!")


@pytest.mark.parametrize("text", ["(?=a)b", "(a)\\1", "(a", "((x{1,30}){1,30}y){900}", "\ud800"])
def test_what_cannot_be_linear_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        compile_linear(text)


ENTRY = st.lists(
    st.sampled_from(
        [*"amod", ".", r"\.", ".*", "[a-z]+", "(a|model)", "model", "layers", r"\d+", "$", "^", "?"]
    ),
    max_size=6,
).map("".join)
MODULE = st.lists(st.sampled_from(["model", "layers", "a", "11", "mod", "o"]), min_size=1).map(
    ".".join
)


@given(ENTRY, MODULE)
def test_skip_lists_match_as_in_transformers(entry: str, module: str) -> None:
    assume(compiles(entry))
    # transformers 5.23, quantizers_utils.should_convert_module
    expected = re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module) is not None
    assert is_skipped(module, [entry]) == (expected or module.endswith(entry))


def compiles(entry: str) -> bool:
    try:
        return re.compile(entry) is not None
    except re.error:
        return False


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("door", ["--tensor-type", "--tensor-type-file"])
def test_bombs_as_patterns_of_types(
    bomb: str, door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{bomb}=q8_0"
    (tmp_path / "types.txt").write_text(line)
    value = line if door == "--tensor-type" else str(tmp_path / "types.txt")
    out = str(tmp_path / "out")
    code = main(["gguf", str(ASSET), out, "--types", "Q4_K_M", "--dry-run", door, value])
    assert code == 2
    assert "no tensor" in capsys.readouterr().err


def test_patterns_of_a_manifest_are_held_to_the_same_syntax() -> None:
    for line in ("(?!a)b=q8_0", "(?=a)b=q8_0", "(a)\\1=q8_0", "x(?==)y=q8_0"):
        with pytest.raises(UsageError, match="without look-ahead"):
            pattern_rules([line], [])


@pytest.mark.sentences
def test_an_equals_sign_too_many() -> None:
    with pytest.raises(UsageError, match="more than one ="):
        pattern_rules(["a=b=q8_0"], [])


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_in_a_skip_list(
    bomb: str, nf4_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = verify_with_skip(nf4_artifact, tmp_path / "copy", bomb)
    assert code == 1  # config.json no longer has its hash, nothing else
    assert "skip-list" not in capsys.readouterr().out


def test_an_entry_that_cannot_be_linear_is_a_finding(
    nf4_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_with_skip(nf4_artifact, tmp_path / "copy", "(a)\\1") == 1
    assert "no regular expression that RE2 reads" in capsys.readouterr().out


# --- how many


@pytest.mark.sentences
def test_a_skip_list_without_an_end_is_one_finding(
    nf4_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [f"x{i}.*y.*z.*w" for i in range(200_000)]
    begin = time.process_time()
    assert verify_with_skip(nf4_artifact, tmp_path / "copy", *many) == 1
    assert time.process_time() - begin < 5
    shown = capsys.readouterr().out
    assert shown.count("skip-list") == 1
    assert "entries, expected at most 2048" in shown


@pytest.mark.sentences
@pytest.mark.parametrize("files", [1, 2])
def test_a_file_of_types_without_an_end(files: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.txt" for i in range(files)]
    for path in paths:
        path.write_text("".join(f"x{i}.*y=q8_0\n" for i in range(MOST_PATTERNS // files + 1)))
    with pytest.raises(UsageError, match=r"\d rules, expected at most 2048"):
        pattern_rules([], paths)


def test_as_many_patterns_as_are_allowed_take_seconds() -> None:
    begin = time.process_time()
    for i in range(MOST_PATTERNS):
        assert not is_skipped(NAMES[0], [f"(a{{0,30}}b{{0,30}}){{0,9}}{i}"])
    assert time.process_time() - begin < 10


def verify_with_skip(artifact: Path, copy: Path, *entries: str) -> int:
    shutil.copytree(artifact, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"][:0] = entries
    (copy / "config.json").write_text(json.dumps(config, indent=2))
    return main(["verify", str(copy), "--depth", "structure"])
