"""The safetensors header: what is refused, and that it agrees with the safetensors library."""

from __future__ import annotations

import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hostile import HOSTILE, file_bytes, valid_file
from qwen35.checkpoint.header import (
    MAX_HEADER_BYTES,
    SafetensorsHeader,
    file_layout,
    header_length,
    json_bytes,
    parse_header,
    read_header,
    strict_json,
)
from qwen35.checkpoint.locations import LocalFolder
from qwen35.errors import HeaderError, InputError
from qwen35.tensors import DTYPE_BITS, TensorSpec

TORCH_TO_HEADER = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}


def parse(raw: bytes, subject: str = "x.safetensors") -> SafetensorsHeader:
    """Parse a whole file held in memory, as `read_header` does on disk."""
    length = header_length(raw[:8], len(raw), subject)
    return parse_header(raw[8 : 8 + length], len(raw), subject)


def library_reads(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return what the safetensors library makes of a whole file."""
    read: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    return read


names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
specs_lists = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), shapes), max_size=8
).map(lambda table: [TensorSpec(name, *value) for name, value in table.items()])


def test_the_control_parses() -> None:
    raw = valid_file()
    start = len(raw) - 16
    assert parse(raw) == SafetensorsHeader(
        {
            "a": (TensorSpec("a", "BF16", (2, 3)), start, start + 12),
            "b": (TensorSpec("b", "F32", ()), start + 12, start + 16),
        },
        {"format": "pt"},
    )


def test_there_are_enough_abuses() -> None:
    assert len(HOSTILE) >= 80
    assert len(set(HOSTILE.values())) == len(HOSTILE)


@pytest.mark.parametrize("abuse", HOSTILE)
def test_malformed_file_is_refused_with_its_name(abuse: str, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(HOSTILE[abuse])
    began = time.process_time()
    with pytest.raises(HeaderError) as caught:
        read_header(LocalFolder(tmp_path), "bad.safetensors")
    assert time.process_time() - began < 1
    sentence = str(caught.value)
    assert sentence.startswith("bad.safetensors")
    assert "\n" not in sentence
    assert len(sentence) < 2000


@pytest.mark.parametrize(
    ("abuse", "words"),
    [
        ("empty file", "0 bytes long, expected a safetensors file"),
        ("seven bytes", "7 bytes long"),
        ("length of 2^63", "a header of 9223372036854775808 bytes, expected at most 100000000"),
        ("length beyond the file", "10 bytes long, expected a header of 3 bytes in it"),
        ("leading space", "a header that is not a JSON object"),
        ("NaN constant", "not valid JSON (NaN is not JSON)"),
        ("duplicate name", "key 'a' appears twice"),
        ("duplicate after 120,000 names", "key 'k119999' appears twice"),
        ("extra field", "malformed entry, expected dtype, shape and data_offsets"),
        ("lower-case dtype", "tensor 'a': unknown dtype 'bf16'"),
        ("negative size", "tensor 'a': malformed shape [-8]"),
        ("offsets reversed", "-8 bytes, expected 8 for U8 [8]"),
        ("tensors overlap", "tensor 'b': overlaps the tensor before it"),
        ("gap between tensors", "tensor 'b': leaves a gap before it"),
        ("data one byte short", "7 bytes of data, expected 8 by its header"),
        ("trailing byte", "17 bytes of data, expected 16"),
        ("metadata holds a number", "malformed __metadata__, expected an object of strings"),
    ],
)
def test_sentence_says_what_is_wrong(abuse: str, words: str) -> None:
    with pytest.raises(HeaderError) as caught:
        parse(HOSTILE[abuse])
    assert words in str(caught.value)


def test_header_of_exactly_the_limit_is_not_too_long() -> None:
    prefix = struct.pack("<Q", MAX_HEADER_BYTES)
    assert header_length(prefix, 8 + MAX_HEADER_BYTES, "x") == MAX_HEADER_BYTES
    with pytest.raises(HeaderError, match="100000007 bytes long"):
        header_length(prefix, 7 + MAX_HEADER_BYTES, "x")


def test_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    place = LocalFolder(tmp_path)
    with pytest.raises(InputError, match=r"gone\.safetensors: cannot be read"):
        place.read("gone.safetensors", 0, 8)


def test_read_past_the_end_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(InputError, match="a: ends after 5 bytes, expected more"):
        LocalFolder(tmp_path).read("a", 2, 4)
    assert LocalFolder(tmp_path).read("a", 2, 3) == b"345"


def test_tensors_come_in_file_order_whatever_the_json_order() -> None:
    table = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i, name in [(2, "a"), (0, "c"), (1, "b")]
    }
    assert list(parse(file_bytes(table, bytes(3))).tensors) == ["c", "b", "a"]


def test_empty_tensors_share_an_offset() -> None:
    table = {
        "x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "z": {"dtype": "F32", "shape": [3, 0], "data_offsets": [4, 4]},
    }
    assert list(parse(file_bytes(table, bytes(4))).tensors) == ["x", "y", "z"]


@given(specs_lists, st.randoms(use_true_random=False))
def test_layout_parses_back_and_the_library_agrees(specs: list[TensorSpec], random: Any) -> None:
    head, offsets = file_layout(specs)
    data = random.randbytes(sum(spec.nbytes for spec in specs))
    raw = head + data
    header = parse(raw)
    assert {name: spec for name, (spec, _, _) in header.tensors.items()} == {
        spec.name: spec for spec in specs
    }
    assert {name: begin for name, (_, begin, _) in header.tensors.items()} == offsets
    assert header.metadata == {"format": "pt"}
    theirs = dict(library_reads(raw))
    assert theirs.keys() == header.tensors.keys()
    for name, (spec, begin, end) in header.tensors.items():
        assert theirs[name]["dtype"] == spec.dtype
        assert theirs[name]["shape"] == list(spec.shape)
        assert bytes(theirs[name]["data"]) == raw[begin:end]


@given(specs_lists)
def test_layout_aligns_the_data_and_every_tensor(specs: list[TensorSpec]) -> None:
    head, offsets = file_layout(specs)
    assert len(head) % 8 == 0
    for spec in specs:
        assert offsets[spec.name] % spec.itemsize == 0


def test_layout_does_not_depend_on_the_order_given() -> None:
    specs = [TensorSpec(name, "BF16", (2,)) for name in "cab"] + [TensorSpec("d", "F32", (1,))]
    assert file_layout(specs) == file_layout(reversed(specs))
    assert list(file_layout(specs)[1]) == ["d", "a", "b", "c"]


def test_layout_is_that_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "w.b": torch.zeros(3, 5, dtype=torch.bfloat16),
        "w.a": torch.zeros(2, dtype=torch.bfloat16),
        "scale": torch.zeros((), dtype=torch.float32),
        "codes": torch.zeros(7, dtype=torch.uint8),
        "half": torch.zeros(1, dtype=torch.float16),
        "f8": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "long": torch.zeros(1, dtype=torch.int64),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    specs = [TensorSpec(n, TORCH_TO_HEADER[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    head, _ = file_layout(specs)
    assert path.read_bytes()[: len(head)] == head


@given(
    st.dictionaries(
        names, st.tuples(st.sampled_from(list(TORCH_TO_HEADER)), shapes), min_size=1, max_size=6
    )
)
def test_file_of_the_library_parses_the_same(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    folder = tmp_path_factory.mktemp("library")
    tensors = {
        name: torch.full(shape, i, dtype=dtype)
        for i, (name, (dtype, shape)) in enumerate(table.items())
    }
    save_file(tensors, folder / "x.safetensors", metadata={"format": "pt"})
    header = read_header(LocalFolder(folder), "x.safetensors")
    raw = (folder / "x.safetensors").read_bytes()
    with safe_open(folder / "x.safetensors", framework="pt") as file:
        assert set(file.keys()) == header.tensors.keys()
    for name, tensor in tensors.items():
        spec, begin, end = header.tensors[name]
        assert spec == TensorSpec(name, TORCH_TO_HEADER[tensor.dtype], tuple(tensor.shape))
        assert raw[begin:end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4))
def test_flipped_bytes_raise_nothing_but_header_errors(flips: list[tuple[int, int]]) -> None:
    raw = bytearray(valid_file())
    for position, value in flips:
        raw[position % len(raw)] = value
    try:
        header = parse(bytes(raw))
    except HeaderError:
        return
    covered = sum(end - begin for _, begin, end in header.tensors.values())
    assert 8 + struct.unpack("<Q", raw[:8])[0] + covered == len(raw)


@given(st.integers(0, len(valid_file()) - 1))
@example(8)
def test_every_truncation_is_a_header_error(size: int) -> None:
    with pytest.raises(HeaderError):
        parse(valid_file()[:size])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values})
    | json_values
)
def test_entry_of_any_json_raises_nothing_but_header_errors(entry: Any) -> None:
    raw = file_bytes({"a": entry})
    try:
        header = parse(raw)
    except HeaderError:
        return
    assert header.tensors["a"][0].nbytes == 0


@given(json_values)
def test_strict_json_reads_what_the_standard_library_writes(value: Any) -> None:
    raw = json.dumps(value).encode()
    if b"NaN" in raw or b"Infinity" in raw:
        return
    assert strict_json(raw, "x") == value


def test_strict_json_names_the_file_in_one_line() -> None:
    with pytest.raises(HeaderError, match=r"^config\.json: not valid JSON \(Expecting") as caught:
        strict_json(b"{\n\n!", "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_one_the_library_reads(dtype: str) -> None:
    spec = TensorSpec("a", dtype, (3,))
    head, _ = file_layout([spec])
    [(name, info)] = library_reads(head + bytes(spec.nbytes))
    assert (name, info["dtype"], len(info["data"])) == ("a", dtype, 3 * DTYPE_BITS[dtype] // 8)


def test_spec_refuses_an_unknown_dtype_and_a_negative_size() -> None:
    with pytest.raises(HeaderError, match=r"w: dtype 'int4', expected one of BOOL, U8"):
        TensorSpec("w", "int4", (1,))
    with pytest.raises(HeaderError, match=r"w: negative size in shape \[2, -1\]"):
        TensorSpec("w", "U8", (2, -1))


def test_spec_counts_bytes() -> None:
    spec = TensorSpec("w", "F32", (2, 3))
    assert (spec.numel, spec.itemsize, spec.nbytes) == (6, 4, 24)
    assert TensorSpec("s", "F64", ()).nbytes == 8
    assert TensorSpec("e", "F64", (0, 5)).nbytes == 0


@pytest.mark.parametrize("number", ["1e400", "-1e999", "9" * 400, "[0.5, 1E309]"])
def test_numbers_that_no_double_can_hold(number: str) -> None:
    """Python reads 1e400 as infinity, and wrote Infinity, which is not JSON."""
    with pytest.raises(HeaderError, match="not valid JSON"):
        strict_json(f'{{"a": {number}}}'.encode(), "config.json")
    assert strict_json(b'{"a": 1000000000000000019884624838656, "b": 1e300}', "x")["b"] == 1e300


def test_numbers_that_are_not_finite_are_rendered_as_null() -> None:
    value = {"a": [math.nan, 1.5], "b": {"c": -math.inf}}
    assert json.loads(json_bytes(value)) == {"a": [None, 1.5], "b": {"c": None}}
