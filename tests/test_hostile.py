"""Hostile input of every kind is refused in a sentence, or handled, in a second and 200 MB."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gguf_models import make_variant
from hostile_corpus import ATTACK, INDEX, Case, cases
from limits import Ended, Limited, limited

SECONDS, NBYTES = 1.0, 200_000_000
KINDS = (
    "safetensors",
    "gguf",
    "index",
    "config",
    "tokenizer",
    "template",
    "toml",
    "statistics",
    "imatrix",
)
MODULES = ("inspect", "plan", "convert", "gguf", "verify")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("sound"), "dense")


@pytest.fixture(scope="module")
def commands(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    modules = [f"qwen35.cli.{name}_command" for name in MODULES]
    with limited(
        *modules,
        "qwen35.planning.gguf_files.gguf_plan",
        "qwen35.verification.gguf_subject",
        "qwen35.planning.safetensors_files.chat_template",
    ) as run:
        empty = tmp_path_factory.mktemp("empty")  # what is imported late is on the disk's cache
        run.run(["verify", str(sound)], empty)
        yield run


def lay_out(case: Case, sound: Path, folder: Path) -> list[str]:
    """Write a case's files beside those of the sound checkpoint; returns the command."""
    place = folder / "place"
    place.mkdir(parents=True)
    weights = {"model.safetensors", INDEX} & case.files.keys()
    for path in sound.iterdir():
        if path.name not in case.files and not (weights and path.suffix == ".safetensors"):
            (place / path.name).symlink_to(path)
    if weights == {INDEX}:
        for path in sound.glob("*.safetensors"):
            (place / path.name).symlink_to(path)
    for name, content in case.files.items():
        if content or name != INDEX or weights == {INDEX}:
            (place / name).write_bytes(content)
    return [
        part.replace("@", str(place)).replace("OUT", str(folder / "out")) for part in case.command
    ]


def judged(case: Case, ended: Ended) -> list[str]:
    """Return what is wrong with how a case ended."""
    wrong = []
    if ended.code not in case.codes:
        wrong.append(f"code {ended.code}: {ended.said[-900:]}")
    elif ended.code == 2 and not ended.said.startswith("error: "):
        wrong.append(f"no sentence: {ended.said[-900:]}")
    if len(ended.said) > 2000:
        wrong.append(f"{len(ended.said)} letters")
    if ended.seconds > SECONDS:
        wrong.append(f"{ended.seconds:.2f} s")
    if ended.nbytes > NBYTES:
        wrong.append(f"{ended.nbytes / 1e6:.0f} MB")
    return [f"{case.kind}, {case.name}: {words}" for words in wrong]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_is_refused_or_handled_within_limits(
    kind: str, sound: Path, commands: Limited, tmp_path: Path
) -> None:
    before = sorted(path.name for path in sound.iterdir())
    wrong = []
    for number, case in enumerate(case for case in cases(sound) if case.kind == kind):
        folder = tmp_path / str(number)
        command = lay_out(case, sound, folder)
        ended = commands.run(command, folder)
        wrong += judged(case, ended)
        escaped = {path.name for path in folder.iterdir()} - {"place"}
        if escaped:
            wrong.append(f"{case.name}: made {escaped}")
    assert wrong == []
    assert sorted(path.name for path in sound.iterdir()) == before


def test_the_corpus_is_large_and_of_every_kind(sound: Path) -> None:
    counts = Counter(case.kind for case in cases(sound))
    assert set(counts) == set(KINDS)
    assert counts["safetensors"] >= 80
    assert sum(counts.values()) - counts["safetensors"] >= 120
    names = [(case.kind, case.name) for case in cases(sound)]
    assert len(set(names)) == len(names)


def test_the_control_is_taken(sound: Path, commands: Limited, tmp_path: Path) -> None:
    for verb in (
        ["inspect", str(sound)],
        ["plan", str(sound)],
        ["gguf", str(sound), str(tmp_path / "out"), "--types", "F16", "--dry-run"],
        ["convert", str(sound), str(tmp_path / "out"), "--recipe", "text", "--dry-run"],
    ):
        ended = commands.run(verb, tmp_path)
        assert (ended.code, ended.said) == (0, "")
        assert ended.nbytes < NBYTES


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "{sound}", "--recipe", "{pipe}.toml"],
        ["gguf", "{sound}", "out", "--dry-run", "--tensor-type-file", "{pipe}.toml"],
        ["gguf", "{sound}", "out", "--dry-run", "--imatrix", "{pipe}.toml"],
        ["convert", "{sound}", "out", "--recipe", "fp8", "--activation-stats", "{pipe}.toml"],
        ["verify", "{pipe}.toml"],
    ],
)
def test_a_pipe_in_place_of_a_file_does_not_hang(
    command: list[str], sound: Path, commands: Limited, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    names = {"sound": str(sound), "pipe": str(tmp_path / "pipe")}
    ended = commands.run([part.format(**names) for part in command], tmp_path)
    assert ended.code == 2
    assert ended.said.startswith("error: ")
    assert ended.seconds < SECONDS


def test_a_chat_template_is_rendered_in_a_sandbox(tmp_path: Path) -> None:
    """Planning and converting only parse templates; whoever asks a model renders them sandboxed."""
    from jinja2.exceptions import SecurityError
    from transformers import AutoTokenizer

    from checkpoints import ASSET

    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    mark = tmp_path / "escaped"
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=ATTACK % mark, tokenize=False
        )
    assert not mark.exists()
