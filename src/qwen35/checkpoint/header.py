"""Parse, validate and render safetensors headers.

Format: the header length N (8 bytes, little-endian), N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}``, then the
data, which the offsets must cover without overlap or gap.
Source: https://github.com/huggingface/safetensors/blob/v0.8.0/README.md#format
Duplicate keys, spaces before the JSON and unknown fields are refused here, although the safetensors
library accepts them.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qwen35.checkpoint.locations import FileLocation
from qwen35.checkpoint.mistaken import LONGEST_HEAD, stand_in
from qwen35.errors import HeaderError, InputError
from qwen35.tensors import DTYPE_BITS, TensorSpec

__all__ = [
    "MAX_HEADER_BYTES",
    "SafetensorsHeader",
    "file_layout",
    "header_length",
    "json_bytes",
    "json_size",
    "json_text",
    "parse_header",
    "read_header",
    "strict_json",
]

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's limit on headers (``MAX_HEADER_SIZE``)."""

_FIELDS = {"dtype", "shape", "data_offsets"}
_DTYPES = {dtype: dtype for dtype in DTYPE_BITS}
"""One string for each dtype, instead of one for each tensor."""
_MAX_SIZE = 2**63 - 1
_MAX_DIGITS = 308
_BATCH = 4096  # entries of a table rendered at once
_MAX_RANK = 64  # NumPy's limit


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A validated header.

    Args:
        tensors: description and byte range of each tensor, in file order; the ranges are absolute
            file offsets and cover the file from the end of the header to the last byte.
        metadata: the ``__metadata__`` strings.
    """

    tensors: dict[str, tuple[TensorSpec, int, int]]
    metadata: dict[str, str]


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python keeps the last of two equal keys, other parsers may keep the first.
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice[:200]!r} appears twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    # Python reads 1e400 as infinity, which JSON does not have, and which would be written as such.
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:80]} is too large a number")
    return number


def _bounded(text: str) -> int:
    # tokenizer_config.json has 10**30 for "no limit"; nothing has more than a double can hold.
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def strict_json(raw: bytes, subject: str, error: type[InputError] = HeaderError) -> Any:
    """Parse JSON, refusing duplicate keys, NaN, numbers beyond a double and excessive nesting.

    Raises:
        InputError: `raw` is not valid; an instance of `error` about the file `subject`.
    """
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except (ValueError, RecursionError) as cause:
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise error(subject, f"not valid JSON ({reason})") from cause


def json_bytes(value: Any) -> bytes:
    """Render JSON in the style of checkpoint files: indented UTF-8 with a final newline."""
    return b"".join(_encoded(value))


def json_size(value: Any) -> int:
    """Return the number of `json_bytes`, without holding them."""
    return sum(map(len, _encoded(value)))


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """Render indented JSON; null stands for numbers that are not finite, which JSON lacks."""
    return "".join(_indented(value, "\n", ascii_only=ascii_only))


def _encoded(value: Any) -> Iterator[bytes]:
    # UTF-8 cannot encode lone surrogates, which JSON strings may contain.
    for text in _indented(value, "\n"):
        yield text.encode(errors="backslashreplace")
    yield b"\n"


def _indented(value: Any, newline: str, *, ascii_only: bool = False) -> Iterator[str]:
    """Yield what ``json.dumps(value, indent=2)`` returns; `newline` comes with a margin.

    The standard library indents in Python. Here its encoder in C renders tables of plain values,
    such as names and files of 200,000 tensors.
    """
    if not isinstance(value, dict | list | tuple) or not value:
        yield _compact(value, ascii_only)
        return
    inner, is_table = f"{newline}  ", isinstance(value, dict)
    before = f"{'{' if is_table else '['}{inner}"
    if not any(isinstance(item, dict | list | tuple) for item in _items(value)):
        entries: Iterator[Any] = iter(value.items() if isinstance(value, dict) else value)
        while batch := list(islice(entries, _BATCH)):
            plain = dict(batch) if is_table else batch
            yield f"{before}{_compact(plain, ascii_only, f',{inner}')[1:-1]}"
            before = f",{inner}"
    else:
        for name, item in zip(value, _items(value), strict=True):
            # as a key, a number becomes a string
            yield f"{before}{_compact({name: 0}, ascii_only)[1:-2] if is_table else ''}"
            yield from _indented(item, inner, ascii_only=ascii_only)
            before = f",{inner}"
    yield f"{newline}{'}' if is_table else ']'}"


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _compact(value: Any, ascii_only: bool, separator: str = ", ") -> str:
    separators = (separator, ": ")
    try:
        return json.dumps(value, ensure_ascii=ascii_only, allow_nan=False, separators=separators)
    except ValueError:
        finite = _without_nan(value)
        return json.dumps(finite, ensure_ascii=ascii_only, separators=separators)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _are_sizes(values: object) -> bool:
    if not isinstance(values, list):
        return False
    # a list of the faults: `all` takes twice as long on short lists, of which there are 400,000
    return not [value for value in values if type(value) is not int or not 0 <= value <= _MAX_SIZE]


def _entry(subject: str, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    """Validate one header entry; its offsets are relative to the data section."""
    fault = _fault(entry)
    if fault is None:
        spec = TensorSpec(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin == spec.nbytes:
            return spec, begin, end
        shape = str(entry["shape"])[:80]
        fault = f"{end - begin} bytes", f"{spec.nbytes} for {spec.dtype} {shape}"
    # At most 200 characters of a name: it may be megabytes long.
    raise HeaderError(f"{subject}, tensor {name[:200]!r}", fault[0], expected=fault[1])


def _fault(entry: object) -> tuple[str, str] | None:
    """Return what is wrong with the parts of an entry, and what is expected."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        return "malformed entry", "dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"unknown dtype {str(dtype)[:80]!r}", ""
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        return f"malformed shape {str(shape)[:80]}", ""
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"malformed data_offsets {str(offsets)[:80]}", ""
    return None


def _metadata(subject: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise HeaderError(subject, "malformed __metadata__", expected="an object of strings")
    return value


def _check_coverage(
    subject: str, entries: list[tuple[TensorSpec, int, int]], data_bytes: int
) -> None:
    position = 0
    for spec, begin, end in entries:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise HeaderError(f"{subject}, tensor {spec.name[:200]!r}", kind)
        position = end
    if position != data_bytes:
        raise HeaderError(
            subject,
            f"{data_bytes} bytes of data",
            expected=f"{position} by its header",
            hint="the file is truncated or not what was uploaded: download it again",
        )


def header_length(prefix: bytes, file_size: int, subject: str) -> int:
    """Return the header length encoded in the first 8 bytes of a file.

    Raises:
        HeaderError: the length is too large for the format or for `file_size`.
    """
    if len(prefix) < 8:
        raise HeaderError(subject, f"{len(prefix)} bytes long", expected="a safetensors file")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            subject,
            f"a header of {length} bytes",
            expected=f"at most {MAX_HEADER_BYTES}",
            hint="is this a safetensors file?",
        )
    if 8 + length > file_size:
        raise HeaderError(
            subject, f"{file_size} bytes long", expected=f"a header of {length} bytes in it"
        )
    return int(length)


def parse_header(raw: bytes, file_size: int, subject: str) -> SafetensorsHeader:
    """Parse and validate the JSON of a header.

    Args:
        raw: the JSON bytes, without the length prefix.
        file_size: size of the whole file in bytes.
        subject: the file name for error messages.

    Raises:
        HeaderError: the header violates the format.
    """
    if not raw.startswith(b"{"):
        raise HeaderError(subject, "a header that is not a JSON object")
    parsed = strict_json(raw, subject)
    metadata = _metadata(subject, parsed.pop("__metadata__", {}))
    entries = [_entry(subject, name, entry) for name, entry in parsed.items()]
    # By end as well: an empty tensor begins where the next one does, and comes first.
    entries.sort(key=lambda item: (item[1], item[2]))
    start = 8 + len(raw)
    _check_coverage(subject, entries, file_size - start)
    return SafetensorsHeader(
        {spec.name: (spec, start + begin, start + end) for spec, begin, end in entries}, metadata
    )


def read_header(place: FileLocation, name: str) -> SafetensorsHeader:
    """Read and validate the header of the safetensors file called `name`.

    Raises:
        HeaderError: the file is not a well-formed safetensors file.
    """
    size = place.sizes()[name]
    try:
        length = header_length(place.read(name, 0, min(8, size)), size, name)
    except HeaderError as error:
        head = place.read(name, 0, min(LONGEST_HEAD, size))
        raise (stand_in(name, head, HeaderError, weights=True) or error) from error.__cause__
    return parse_header(place.read(name, 8, length), size, name)


# The safetensors library writes tensors by descending dtype; the same order gives the same bytes.
_FILE_ORDER = {dtype: rank for rank, dtype in enumerate(reversed(DTYPE_BITS))}


def file_layout(
    specs: Iterable[TensorSpec], first: Sequence[TensorSpec] = (), form: str = "pt"
) -> tuple[bytes, dict[str, int]]:
    """Lay out tensors in one file like the safetensors library: by dtype, widest first, then name.

    Args:
        specs: the tensors.
        first: tensors that come before them, in this order.
        form: ``format`` in the metadata.

    Returns:
        The bytes before the data (length and header, padded with spaces to a multiple of 8) and
        the absolute offset of each tensor.
    """
    ordered = [*first, *sorted(specs, key=lambda spec: (_FILE_ORDER[spec.dtype], spec.name))]
    table: dict[str, Any] = {"__metadata__": {"format": form}}
    offsets, position = {}, 0
    for spec in ordered:
        end = position + spec.nbytes
        table[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        offsets[spec.name] = position
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    start = 8 + len(text)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: start + offset for name, offset in offsets.items()}
