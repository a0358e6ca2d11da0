"""Coverage-guided fuzzing of what reads files that anybody could have written.

    python fuzz/fuzz.py TARGET [libFuzzer's arguments]

A target takes bytes and may do nothing with them but succeed or raise one of our own errors. What
else happens is a finding: libFuzzer writes the bytes to a file, and they become a row of
tests/hostile_corpus.py, tests/hostile.py or tests/hostile_gguf.py. The seeds are those rows.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qwen35", "tomllib"]):
    from qwen35.checkpoint.gguf_header import read_container
    from qwen35.checkpoint.header import header_length, parse_header, strict_json
    from qwen35.checkpoint.source import INDEX_NAME, check_index
    from qwen35.errors import Qwen35Error
    from qwen35.planning.gguf_files.imatrix import read_imatrix
    from qwen35.planning.recipe import load_recipe

TESTS = Path(__file__).parent.parent / "tests"
WORK = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"qwen35-fuzz-{os.getpid()}"


def header(data: bytes) -> None:
    """Read a safetensors header."""
    length = header_length(data[:8], len(data), "fuzz")
    parse_header(data[8 : 8 + length], len(data), "fuzz")


def json_header(data: bytes) -> None:
    """Read a safetensors header whose length is right, for what comes after that."""
    parse_header(data, len(data) + 8, "fuzz")


def index(data: bytes) -> None:
    """Read an index: no name in it may lead out of the folder."""
    for shard in check_index(strict_json(data, INDEX_NAME)).values():
        path = WORK / shard
        assert path.parent == WORK
        assert path.name == shard


def gguf(data: bytes) -> None:
    """Read the head of a GGUF file; its tensors lie within it."""
    path = WORK / "fuzz.gguf"
    path.write_bytes(data)
    for entry in read_container(path).tensors.values():
        assert entry.begin + entry.nbytes <= len(data)


def imatrix(data: bytes) -> None:
    """Read an importance matrix of either form."""
    path = WORK / "fuzz.dat"
    path.write_bytes(data)
    read_imatrix(path)


def recipe(data: bytes) -> None:
    """Read a recipe."""
    path = WORK / "fuzz.toml"
    path.write_bytes(data)
    load_recipe(str(path))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "json_header": json_header,
    "index": index,
    "gguf": gguf,
    "imatrix": imatrix,
    "recipe": recipe,
}


def seeds(target: str) -> Iterator[bytes]:
    """Yield what the tests know already."""
    sys.path.insert(0, str(TESTS))
    import hostile
    import hostile_gguf

    if target in ("header", "json_header"):
        skip = 8 if target == "json_header" else 0
        yield hostile.valid_file()[skip:]
        yield from (data[skip:] for data in hostile.HOSTILE.values())
    elif target in ("gguf", "imatrix"):
        yield hostile_gguf.file_bytes()
        yield from hostile_gguf.HOSTILE.values()
    elif target == "index":
        yield b'{"metadata": {}, "weight_map": {"a": "b.safetensors"}}'
    else:
        folder = TESTS.parent / "src" / "qwen35" / "planning" / "recipes"
        yield from (path.read_bytes() for path in folder.glob("*.toml"))


def main() -> None:
    """Fuzz one target."""
    name, arguments = sys.argv[1], sys.argv[2:]
    target = TARGETS[name]
    for left in WORK.parent.glob("qwen35-fuzz-*"):  # libFuzzer ends without a word
        shutil.rmtree(left, ignore_errors=True)
    corpus = WORK / "corpus"
    corpus.mkdir(parents=True)
    for number, data in enumerate(seeds(name)):
        if len(data) < 2**16:
            (corpus / str(number)).write_bytes(data)

    def one(data: bytes) -> None:
        try:
            target(data)
        except Qwen35Error as error:
            if len(str(error)) > 2000:
                raise

    limits = ["-rss_limit_mb=1000", "-timeout=2", f"-artifact_prefix={os.getcwd()}/{name}-"]
    atheris.Setup([sys.argv[0], *limits, *arguments, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
