"""The verifier on the keys of a GGUF file: each is edited alone, with a source and without."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from checkpoints import ASSET
from qwen35.checkpoint.gguf_header import GgufHeader, read_container
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import GgufFiles
from qwen35.checkpoint.source import open_folder
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.gguf_keys import compare_keys
from qwen35.verification.gguf_subject import GgufSubject
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.writing.write import write


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = make_plan(
        open_folder(ASSET), load_recipe("mix", "gguf"), types=("F16",), projector="F16"
    )
    out = write(plan, tmp_path_factory.mktemp("keys") / "out").out
    (out / "qwen35.json").unlink()
    return out


@cache
def header(folder: Path, *, vision: bool = False) -> GgufHeader:
    pattern = "mmproj-*.gguf" if vision else "q*.gguf"
    return read_container(next(folder.glob(pattern)))


def subject_of(container: GgufHeader) -> GgufSubject:
    """Open a file whose header is replaced by another."""
    folder = container.path.parent
    files = GgufFiles(LocalFolder(folder), (container.path.name,), whole=False, root=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen35.checkpoint.gguf_parts.read_gguf", lambda *_: container)
        return GgufSubject("x", files)


def noticed(container: GgufHeader, source: Path | None) -> list[str]:
    """Return what the structure check, and the comparison with a source, say about keys."""
    said = [finding.message for finding in subject_of(container).structure()]
    if source is not None:
        result = SettingsComparison()
        compare_keys(container, open_folder(source), result)
        said += [finding.message for finding in result.findings] + result.notes
    return said


def other(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        swapped = [*value]
        swapped[0], swapped[-1] = (
            (not value[0], value[-1]) if isinstance(value[0], bool) else (value[-1], value[0])
        )
        return swapped
    return f"{value}x" if isinstance(value, str) else value * 2


KEYS = [
    "general.architecture", "general.type", "general.name", "general.size_label",
    "qwen35.block_count", "qwen35.context_length", "qwen35.embedding_length",
    "qwen35.feed_forward_length", "qwen35.attention.head_count", "qwen35.attention.head_count_kv",
    "qwen35.rope.dimension_sections", "qwen35.rope.freq_base",
    "qwen35.attention.layer_norm_rms_epsilon", "qwen35.attention.key_length",
    "qwen35.attention.value_length", "general.file_type", "qwen35.nextn_predict_layers",
    "qwen35.ssm.conv_kernel", "qwen35.ssm.state_size", "qwen35.ssm.group_count",
    "qwen35.ssm.time_step_rank", "qwen35.ssm.inner_size", "qwen35.attention.recurrent_layers",
    "qwen35.full_attention_interval", "qwen35.rope.dimension_count",
    "general.quantization_version", "tokenizer.ggml.model", "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
    "tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.chat_template",
]  # fmt: skip
ONLY_BY_SOURCE = {
    "general.name",
    "qwen35.context_length",
    "qwen35.rope.freq_base",
    "qwen35.attention.layer_norm_rms_epsilon",
    "qwen35.rope.dimension_sections",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.chat_template",
}
"""Whose other value is as sound: order of sections, of tokens, of merges, another name."""


def test_these_are_all_keys(made: Path) -> None:
    assert list(header(made).keys) == KEYS
    assert noticed(header(made), ASSET) == []
    assert noticed(header(made, vision=True), ASSET) == []


@pytest.mark.sentences
@pytest.mark.parametrize("key", KEYS)
def test_every_edited_key_is_noticed(key: str, made: Path) -> None:
    sound = header(made)
    keys = {**sound.keys, key: other(sound.keys[key])}
    edited = GgufHeader(sound.path, sound.nbytes, keys, sound.tensors)
    alone = noticed(edited, None)
    if key in ONLY_BY_SOURCE:
        known = key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id")
        assert bool(alone) is known  # doubled, these are beyond the vocabulary
    else:
        assert alone
    if key != "general.architecture":  # then nothing else can be read
        assert len(noticed(edited, ASSET)) > len(alone) or key not in ONLY_BY_SOURCE


def test_every_edited_key_of_the_projector_is_noticed(made: Path) -> None:
    sound = header(made, vision=True)
    missed = []
    for key, value in sound.keys.items():
        keys = {**sound.keys, key: other(value)}
        edited = GgufHeader(sound.path, sound.nbytes, keys, sound.tensors)
        same = keys[key] == value  # a mean of three equal numbers
        if not same and not noticed(edited, ASSET if key != "general.architecture" else None):
            missed.append(key)
    assert missed == []


@pytest.mark.parametrize("value", ["", "x", -1, 2**40, 1.5, float("nan"), True, [], [[1]], ["x"]])
def test_a_key_of_any_type_is_no_traceback(value: Any, made: Path) -> None:
    for sound in (header(made), header(made, vision=True)):
        for key in sound.keys:
            keys = {**sound.keys, key: value}
            noticed(GgufHeader(sound.path, sound.nbytes, keys, sound.tensors), None)


@pytest.mark.heavy
@pytest.mark.parametrize("value", ["x", -1, True, [], [[1]]])
def test_nor_beside_a_source(value: Any, made: Path) -> None:
    for sound in (header(made), header(made, vision=True)):
        for key in sound.keys:
            keys = {**sound.keys, key: value}
            edited = GgufHeader(sound.path, sound.nbytes, keys, sound.tensors)
            subject = subject_of(edited)
            checkpoint = open_folder(ASSET)
            if not list(subject.strangers(checkpoint)):
                subject.settings(checkpoint)
