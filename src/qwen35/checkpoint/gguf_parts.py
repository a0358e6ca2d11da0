"""Read a GGUF model in one file or several: one header, and what does not fit, file by file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from qwen35.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf
from qwen35.checkpoint.open import GgufFiles
from qwen35.checkpoint.split_gguf import SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS, SplitName
from qwen35.errors import InputError

__all__ = ["read_model", "read_parts"]

_DAMAGED = "its files were renamed, or are not of one model"


def read_model(files: GgufFiles, names: Sequence[str]) -> GgufHeader:
    """Read the header of one of ``files.models``.

    Raises:
        HubError: the Hub refused a request or could not be reached.
        InputError: a file is missing, damaged, or not of this model.
    """
    header, problems = read_parts(files, names)
    if header is None:
        raise next(iter(problems.values()))
    return header


def read_parts(
    files: GgufFiles, names: Sequence[str]
) -> tuple[GgufHeader | None, dict[str, InputError]]:
    """Read the header of one of ``files.models``.

    Returns:
        It, or None if something is wrong; and what is wrong, by file.

    Raises:
        HubError: the Hub refused a request or could not be reached.
    """
    headers: dict[str, GgufHeader] = {}
    problems: dict[str, InputError] = {}
    for name in names:
        try:
            headers[name] = read_gguf(files, name)
        except InputError as error:
            problems[name] = error
    for problem in (*_misnamed(headers), *_missing(names)):
        problems.setdefault(problem.subject, problem)
    if not problems:
        for problem in _misfits(headers):
            problems.setdefault(problem.subject, problem)
    return (None if problems else _joined(headers)), problems


def _missing(names: Sequence[str]) -> Iterator[InputError]:
    """Yield an error for the first missing file, which counts the others."""
    split = SplitName.parse(names[0])
    if split is None or len(names) == split.count:
        return
    present = set(names)
    absent = (split.file(number) for number in range(1, split.count + 1))
    first = next(name for name in absent if name not in present)
    others = split.count - len(names) - 1
    found = "missing" + f", and {others} more" * bool(others)
    yield InputError(first, found, expected=f"all {split.count} files of the model")


def _misnamed(headers: Mapping[str, GgufHeader]) -> Iterator[InputError]:
    """Yield files whose keys say that they should have other names."""
    for name, header in headers.items():
        split = SplitName.parse(name)
        count = header.keys.get(SPLIT_COUNT)
        if split is None:
            if count is not None and (type(count) is not int or count > 1):
                found = f"{SPLIT_COUNT} is {count!r:.80}"
                yield InputError(name, found, expected="a name like NAME-00001-of-00002.gguf")
            continue
        expected = {SPLIT_NUMBER: split.number - 1, SPLIT_COUNT: split.count}
        for key, value in expected.items():
            optional = split.number > 1 and key == SPLIT_COUNT  # as in llama.cpp
            found_value = header.keys.get(key, value if optional else None)
            if type(found_value) is not int or found_value != value:
                found = f"{key} is {found_value!r:.80}" if key in header.keys else f"no key {key}"
                yield InputError(name, found, expected=f"{value} by its name", hint=_DAMAGED)


def _misfits(headers: Mapping[str, GgufHeader]) -> Iterator[InputError]:
    """Yield files of other models; if none is known to be one, the first file."""
    if len(headers) == 1:
        return
    first, *_ = headers
    count = headers[first].keys.get(SPLIT_TENSORS)
    counts = {name: header.keys.get(SPLIT_TENSORS, count) for name, header in headers.items()}
    holders: dict[str, str] = {}
    for name, header in headers.items():
        if counts[name] != count:
            found = f"{SPLIT_TENSORS} is {counts[name]!r:.80}"
            yield InputError(name, found, expected=f"{count!r:.80}", hint=_DAMAGED)
        for tensor in header.tensors:
            if (other := holders.setdefault(tensor, name)) != name:
                yield InputError(name, f"tensor {tensor!r} is in {other} too", hint=_DAMAGED)
    total = sum(len(header.tensors) for header in headers.values())
    if type(count) is not int or count != total:
        found = f"{SPLIT_TENSORS} is {count!r:.80}"
        yield InputError(first, found, expected=f"{total} as in all files", hint=_DAMAGED)


def _joined(headers: Mapping[str, GgufHeader]) -> GgufHeader:
    """Return the header of a model: all but tensors is in its first file."""
    first, *others = headers
    if not others:
        return headers[first]
    tensors: dict[str, GgufTensor] = {}
    for name, header in headers.items():
        tensors |= {tensor: replace(t, file=name) for tensor, t in header.tensors.items()}
    nbytes = sum(header.nbytes for header in headers.values())
    return replace(headers[first], nbytes=nbytes, tensors=tensors, others=tuple(others))
