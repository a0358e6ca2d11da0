"""Hessians: which errors in a weight's columns cancel, and which add up, in its outputs.

An error E of a weight changes the outputs by E x for each input x, in square sum by
trace(E H E^T) with H = sum of x x^T. `qwen35 calibrate --hessian` writes H of every distinct input,
summed over the tokens that codes are fitted to, and over held-out tokens, which judge them.

The folder ``hessians`` holds a safetensors file for each decoder layer (`layer_file`), for the head
and for each layer of multi-token prediction. For each input a file has two tensors, ``NAME.fit``
and ``NAME.held_out``: float32 [K (K + 1) / 2], the upper triangle row by row. The metadata of its
header, JSON in strings:

- ``qwen35.hessians``: version of this format.
- ``calibration``: how the files were made, with the model's ``geometry`` and the names of all
  ``files``; the same in each file.
- ``inputs``: for each input ``tokens``, ``held_out_tokens``, ``sha256`` of both tensors, and the
  ``weights`` that read it: names of checkpoint tensors, or [name, expert] of a stack.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.header import SafetensorsHeader, read_header, strict_json
from qwen35.checkpoint.inventory import InventoryItem, stacked_leaves
from qwen35.checkpoint.locations import LocalFolder, open_file
from qwen35.errors import InputError, TensorError
from qwen35.model.roles import role_of
from qwen35.planning.activations import Key, other_geometry

if TYPE_CHECKING:
    from qwen35.array_types import F32

__all__ = [
    "HEAD_FILE",
    "HESSIANS",
    "Hessians",
    "InputHessian",
    "MeasuredInput",
    "ReadingWeight",
    "hessian_head",
    "layer_file",
    "mtp_file",
    "open_files",
    "open_hessians",
    "triangle_bytes",
    "triangle_rows",
    "weight_keys",
]

HESSIANS, HEAD_FILE = "hessians", "head.safetensors"
_VERSION, _CALIBRATION, _INPUTS = "qwen35.hessians", "calibration", "inputs"
_CURRENT = "1"
_ENDINGS = (".fit", ".held_out")
_FILE_NAME = re.compile(r"(layer-|mtp-)\d{4}\.safetensors|head\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MOST_TOKENS = 2**53
_MADE = "a folder written by qwen35 calibrate --hessian"
_AGAIN = "the file is damaged: run qwen35 calibrate --hessian again"
_ANOTHER = "these are Hessians of another model: calibrate this one"
_MOST = 1e37
"""Bound on sums of squares, far above any real ones: float32 holds their sums."""

_ROUNDED, _VANISHED = 1.01, 1e-30
"""Bound on |sum of x y| over the root of the sums of x^2 and of y^2, by Cauchy and Schwarz 1, but
the sums are rounded; and what these may have lost, as the squares were too small for float32."""

_MIRRORED = 512  # rows that are mirrored at a time

ReadingWeight = str | tuple[str, int]
"""The name of a tensor, or that of a stack of experts with the number of one."""


def layer_file(number: int) -> str:
    """Return the name of a decoder layer's file."""
    return f"layer-{number:04}.safetensors"


def mtp_file(number: int) -> str:
    """Return the name of a layer's file of multi-token prediction; the first has ``mtp.fc`` too."""
    return f"mtp-{number:04}.safetensors"


@dataclass(frozen=True)
class InputHessian:
    """The Hessians of one input, read from their file whenever they are asked for.

    Args:
        folder: of the file.
        file: its name.
        name: of the input; with `file`, what weights that read the same input have in common.
        columns: its width K.
        tokens: how many x `fit` sums up.
        held_out_tokens: how many `held_out` sums up.
        begins: of both tensors, in the file.
        sha256: of both tensors.
    """

    folder: Path
    file: str
    name: str
    columns: int
    tokens: int
    held_out_tokens: int
    begins: tuple[int, int]
    sha256: tuple[str, str]

    @property
    def fit(self) -> F32:
        """[K, K] float32: sum of x x^T over the tokens that codes are fitted to.

        Raises:
            InputError: the file is damaged.
        """
        return self._matrix(0)

    @property
    def held_out(self) -> F32:
        """[K, K] float32: the sum over the other tokens; errors as for `fit`."""
        return self._matrix(1)

    def _matrix(self, part: int) -> F32:
        import numpy as np  # late: a plan needs none

        subject = f"{self.file}, {self.name}{_ENDINGS[part]}"
        matrix = np.zeros((self.columns, self.columns), np.float32)
        digest = hashlib.sha256()
        try:
            with os.fdopen(open_file(self.folder / self.file), "rb") as file:
                file.seek(self.begins[part])
                finite = True
                for row in triangle_rows(matrix):
                    if file.readinto(row.data.cast("B")) != row.nbytes:
                        raise InputError(subject, "truncated", hint=_AGAIN)
                    digest.update(row.data)
                    finite = finite and bool(np.isfinite(row).all())
        except OSError as error:
            raise InputError(str(self.folder / self.file), f"cannot be read ({error})") from error
        if digest.hexdigest() != self.sha256[part]:
            raise InputError(subject, "not what its header says it holds (SHA-256)", hint=_AGAIN)
        if not finite:
            raise InputError(subject, "holds NaN or infinity", hint=_AGAIN)
        _check_sums(subject, matrix)
        _mirror(matrix)
        return matrix


def _check_sums(subject: str, matrix: F32) -> None:
    """Refuse an upper triangle, of finite numbers, that is no sum of x x^T.

    Raises:
        InputError: some are not.
    """
    import numpy as np

    diagonal = matrix.diagonal()
    if (diagonal < 0).any():
        raise InputError(subject, "a sum of squares is negative", hint=_AGAIN)
    if diagonal.max(initial=0) > _MOST:
        raise InputError(subject, f"a sum of squares is above {_MOST:g}", hint=_AGAIN)
    lengths = np.sqrt(diagonal + np.float32(_VANISHED))
    for i, row in enumerate(triangle_rows(matrix)):
        if (np.abs(row) > _ROUNDED * lengths[i] * lengths[i:]).any():
            raise InputError(subject, "sums of products that no inputs have", hint=_AGAIN)


def _mirror(matrix: F32) -> None:
    """Fill the lower triangle, which is zero, from the upper one."""
    import numpy as np

    for begin in range(0, len(matrix), _MIRRORED):
        end = begin + _MIRRORED
        matrix[begin:end, :begin] = matrix[:begin, begin:end].T
        corner = matrix[begin:end, begin:end]
        corner += np.triu(corner, 1).T


@dataclass(frozen=True)
class Hessians:
    """The Hessians of a model's inputs.

    Args:
        folder: that holds the files.
        provenance: how they were made.
        sha256: hash of all headers, which hold hashes of all values.
        by_weight: what each weight reads.
    """

    folder: Path
    provenance: Mapping[str, Any]
    sha256: str
    by_weight: Mapping[Key, InputHessian]

    @property
    def files(self) -> set[str]:
        """The names of the files that weights have Hessians in."""
        return {hessian.file for hessian in self.by_weight.values()}

    def check(self, geometry: Mapping[str, int], items: Sequence[InventoryItem] = ()) -> None:
        """Check that they belong to a model.

        Args:
            geometry: `ModelConfig.geometry`.
            items: its weights, whose columns are compared too.

        Raises:
            InputError: they belong to another one.
        """
        different = other_geometry(self.provenance, geometry)
        if different is not None:
            raise InputError(str(self.folder), different[0], expected=different[1], hint=_ANOTHER)
        widths = {_keys(item.spec.name, 0)[0][:2]: item.spec for item in items}
        for (name, layer, _), hessian in self.by_weight.items():
            spec = widths.get((name, layer))
            if spec is not None and spec.shape[-1] != hessian.columns:
                found, expected = f"{hessian.columns} columns for {spec.name}", str(spec.shape[-1])
                raise InputError(hessian.file, found, expected=expected, hint=_ANOTHER)

    def of(self, name: str, expert: int | None = None) -> InputHessian | None:
        """Return the Hessian of what a weight reads; None if it was not measured.

        Args:
            name: of the weight, with any of its prefixes.
            expert: its number, if `name` is that of a stack.

        Raises:
            TensorError: no weight of the family has this name.
        """
        return self.by_weight.get(_keys(name, expert)[0])


def _keys(name: str, expert: int | None) -> list[Key]:
    """Return the roles of a weight, or of an expert's matrices in a stack."""
    role = role_of(name)
    if expert is None or role.info.place != "fused":
        return [(role.name, role.layer, role.expert)]
    stem, _, leaf = role.name.rpartition(".")
    return [(f"{stem}.{part}", role.layer, expert) for part in stacked_leaves(leaf)]


def weight_keys(weight: ReadingWeight) -> list[Key]:
    """Return the roles of a weight that reads an input."""
    return _keys(weight, None) if isinstance(weight, str) else _keys(*weight)


def open_hessians(path: Path) -> Hessians:
    """Open the output of ``calibrate --hessian``, or the folder in it; reads headers only.

    Raises:
        InputError: there are none in it, or a file is missing, damaged or of another calibration.
    """
    folder = path / HESSIANS if (path / HESSIANS).is_dir() else path
    if not folder.is_dir():
        raise InputError(str(path), "not a folder", expected=_MADE)
    place = LocalFolder(folder)
    sizes = place.sizes()
    if HEAD_FILE not in sizes:
        raise InputError(str(path), f"no {HEAD_FILE} in it", expected=_MADE)
    provenance = _provenance(HEAD_FILE, read_header(place, HEAD_FILE))
    return _opened(folder, _files(provenance), HEAD_FILE)


def open_files(folder: Path, names: Sequence[str]) -> Hessians:
    """Open some of the files of a calibration, one at least; those of others may be missing.

    Raises:
        InputError: one is missing, damaged or of another calibration.
    """
    return _opened(folder, names, names[0])


def _opened(folder: Path, names: Sequence[str], first: str) -> Hessians:
    """Open files of the calibration that the file `first` is of."""
    place = LocalFolder(folder)
    sizes = place.sizes()
    if first not in sizes:
        raise InputError(str(folder), f"no {first} in it", hint=_AGAIN)
    provenance = _provenance(first, read_header(place, first))
    digest, by_weight = hashlib.sha256(), dict[Key, InputHessian]()
    for name in names:
        if name not in sizes:
            raise InputError(str(folder), f"no {name} in it", hint=_AGAIN)
        header = read_header(place, name)
        if _provenance(name, header) != provenance:
            raise InputError(name, f"not of the calibration of {first}", hint=_AGAIN)
        digest.update(f"{name} {header.metadata[_INPUTS]}\n".encode(errors="backslashreplace"))
        for key, hessian in _inputs(folder, name, header):
            if key in by_weight:
                raise InputError(name, f"{hessian.name} names a weight twice", hint=_AGAIN)
            by_weight[key] = hessian
    return Hessians(folder, provenance, digest.hexdigest(), by_weight)


def _provenance(name: str, header: SafetensorsHeader) -> dict[str, Any]:
    version = header.metadata.get(_VERSION)
    if version is None or not {_CALIBRATION, _INPUTS} <= header.metadata.keys():
        raise InputError(name, "no Hessians", expected=_MADE)
    if version != _CURRENT:
        found = f"version {version[:80]!r} of the format of Hessians"
        raise InputError(name, found, expected=_CURRENT, hint="it may need a newer qwen35")
    provenance = strict_json(header.metadata[_CALIBRATION].encode(errors="replace"), name)
    if not isinstance(provenance, dict) or not isinstance(provenance.get("geometry"), dict):
        raise InputError(name, "it does not say of which model", expected="its geometry")
    return provenance


def _files(provenance: Mapping[str, Any]) -> list[str]:
    files = provenance.get("files")
    known = isinstance(files, list) and all(
        isinstance(name, str) and _FILE_NAME.fullmatch(name) for name in files
    )
    if not isinstance(files, list) or not known or len({*files, HEAD_FILE}) != len(files):
        raise InputError(HEAD_FILE, "malformed", expected="the names of all files of Hessians")
    return files


def _inputs(
    folder: Path, name: str, header: SafetensorsHeader
) -> Iterator[tuple[Key, InputHessian]]:
    """Yield the weights that a file has Hessians for."""
    inputs = strict_json(header.metadata[_INPUTS].encode(errors="replace"), name)
    if not isinstance(inputs, dict):
        raise InputError(name, "malformed", expected="a table of inputs")
    expected = {f"{one}{ending}" for one in inputs for ending in _ENDINGS}
    if expected != header.tensors.keys():
        one = min(expected ^ header.tensors.keys())[:200]
        raise InputError(name, f"its table of inputs and its tensors differ by {one!r}")
    for input_name, entry in inputs.items():
        hessian = _hessian(folder, name, header, input_name, entry)
        for key in _readers(name, input_name, entry["weights"]):
            yield key, hessian


_FIELDS = {"tokens", "held_out_tokens", "sha256", "weights"}


def _hessian(
    folder: Path, file: str, header: SafetensorsHeader, name: str, entry: Any
) -> InputHessian:
    subject = f"{file}, {name[:200]}"
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise InputError(subject, "malformed", expected=", ".join(sorted(_FIELDS)))
    tokens = entry["tokens"], entry["held_out_tokens"]
    if not all(type(count) is int and 0 < count <= _MOST_TOKENS for count in tokens):
        raise InputError(subject, f"{str(tokens)[:80]} tokens", expected="two numbers of 1 or more")
    hashes = entry["sha256"]
    if not _are_hashes(hashes):
        raise InputError(subject, "malformed", expected="the SHA-256 of two tensors")
    columns, begins = [], []
    for ending in _ENDINGS:
        spec, begin, _ = header.tensors[name + ending]
        count = _columns(spec.numel)
        if spec.dtype != "F32" or len(spec.shape) != 1 or count == 0:
            found = f"{spec.dtype} {str(list(spec.shape))[:80]}"
            raise InputError(
                subject, found, expected="a triangle of float32: K (K + 1) / 2 of them"
            )
        columns.append(count)
        begins.append(begin)
    if columns[0] != columns[1]:
        raise InputError(subject, f"{columns[1]} columns held out", expected=str(columns[0]))
    place = begins[0], begins[1]
    return InputHessian(folder, file, name, columns[0], *tokens, place, (hashes[0], hashes[1]))


def _are_hashes(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(one, str) and _SHA256.fullmatch(one) for one in value)
    )


def _columns(numel: int) -> int:
    """Return K of a triangle of `numel` values; 0 if it is none."""
    columns = (math.isqrt(8 * numel + 1) - 1) // 2
    return columns if columns * (columns + 1) // 2 == numel else 0


def _readers(file: str, name: str, weights: Any) -> Iterator[Key]:
    """Yield the weights that read an input."""
    subject = f"{file}, {name[:200]}"
    if not isinstance(weights, list) or not weights:
        raise InputError(subject, "malformed", expected="a list of the weights that read it")
    for weight in weights:
        pair = isinstance(weight, list) and len(weight) == 2 and type(weight[1]) is int
        tensor, expert = (weight[0], weight[1]) if pair else (weight, None)
        if not isinstance(tensor, str) or (expert is not None and expert < 0):
            found = f"{str(weight)[:80]!r} among the weights that read it"
            raise InputError(subject, found, expected="a name, or [name, expert]")
        try:
            keys = _keys(tensor, expert)
        except TensorError as error:
            found = f"names {tensor[:200]!r}"
            raise InputError(subject, found, expected="weights of Qwen3.5") from error
        yield from keys


@dataclass(frozen=True)
class MeasuredInput:
    """What the header of a file says of an input.

    Args:
        columns: its width K.
        tokens: that `fit` sums up.
        held_out_tokens: that `held_out` sums up.
        weights: that read it.
    """

    columns: int
    tokens: int
    held_out_tokens: int
    weights: tuple[ReadingWeight, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of both triangles."""
        return len(_ENDINGS) * triangle_bytes(self.columns)


def triangle_bytes(columns: int) -> int:
    """Return the bytes of the upper triangle of a matrix [columns, columns] of float32."""
    return 2 * columns * (columns + 1)


def triangle_rows(matrix: F32) -> Iterator[F32]:
    """Yield the rows of a matrix's upper triangle: what a file holds."""
    for i in range(len(matrix)):
        yield matrix[i, i:]


def hessian_head(
    inputs: Mapping[str, MeasuredInput],
    hashes: Mapping[str, Sequence[str]],
    provenance: Mapping[str, Any],
) -> bytes:
    """Return the bytes before the data of a file; they are as many whatever the hashes are.

    Args:
        inputs: in the order in which their triangles follow, that of `fit` first.
        hashes: SHA-256 of both triangles of each; zeros if they are not known yet.
        provenance: how the files are made.
    """
    table, entries, position = dict[str, Any](), dict[str, Any](), 0
    for name, one in inputs.items():
        nbytes = triangle_bytes(one.columns)
        for ending in _ENDINGS:
            offsets = [position, position + nbytes]
            table[name + ending] = {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": offsets}
            position = offsets[1]
        entries[name] = {
            "tokens": one.tokens,
            "held_out_tokens": one.held_out_tokens,
            "sha256": list(hashes.get(name, ["0" * 64] * len(_ENDINGS))),
            "weights": one.weights,
        }
    metadata = {
        _VERSION: _CURRENT,
        _CALIBRATION: json.dumps(provenance),
        _INPUTS: json.dumps(entries),
    }
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text
