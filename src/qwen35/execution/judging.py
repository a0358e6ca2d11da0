"""A written weight held against its original: what every check of numbers comes down to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from math import isfinite
from typing import Any

from qwen35.checkpoint.source import FolderReader
from qwen35.codecs import pieces
from qwen35.codecs.codec import stacked
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.pieces import Readable, not_finite, stored
from qwen35.codecs.plain.codec import judge_values
from qwen35.codecs.registry import codec_of
from qwen35.errors import InputError
from qwen35.planning.output_plan import PlannedFile
from qwen35.planning.rows import Rows
from qwen35.planning.step import Step
from qwen35.tensors import StoredTensor, TensorSpec, Weight

__all__ = ["compare_steps", "judge"]


def judge(
    weight: Weight,
    spec: TensorSpec,
    reader: Readable,
    original: Rows | None,
    source: Readable | None,
    subject: str = "",
) -> WeightComparison:
    """Decode a stored weight; with an original, compare them.

    Args:
        weight: of the artifact.
        spec: the weight, decoded.
        reader: of the artifact.
        original: where its values come from.
        source: what reads them.
        subject: what findings call it; the weight's name if empty.

    Returns:
        What was found; what cannot be read or decoded is a finding too.
    """
    result = WeightComparison(subject or weight.name)
    try:
        if original is None or source is None:
            _decode(weight, spec, reader)
        elif _alike(weight, original):
            _same(weight, spec, reader, original, source, result)
        else:
            _judge(weight, spec, reader, original, source, result)
        result.judged = True
    except InputError as error:
        result.found("decode", error.message, error.subject)
    return result


def _decode(weight: Weight, spec: TensorSpec, reader: Readable) -> None:
    from qwen35.codecs.floats import all_finite, empty

    codec = codec_of(weight)
    if weight.main.spec.dtype == spec.dtype:
        for _ in stored(reader, weight.main):
            pass
        return
    values = codec.open(reader, weight, spec)
    rows, row = stacked(spec)
    size = max(1, pieces.PIECE // max(1, row))
    for first in range(0, rows, size):
        out = empty(spec.dtype, min(size, rows - first) * row)
        values.read_into(first * row, out)
        if not all_finite(out, spec.dtype):
            raise not_finite(weight.name)


def _alike(weight: Weight, original: Rows) -> bool:
    """Whether the original is stored in the same way, so that bytes must be equal."""
    if original.transforms or len(original.slabs) > 1:
        return False
    there = original.item.weight
    return weight.storage == there.storage and [
        (part.spec.dtype, part.spec.shape) for part in weight.parts
    ] == [(part.spec.dtype, part.spec.shape) for part in there.parts]


def _same(
    weight: Weight,
    spec: TensorSpec,
    reader: Readable,
    original: Rows,
    source: Readable,
    result: WeightComparison,
) -> None:
    import numpy as np

    for here, there in zip(weight.parts, original.item.weight.parts, strict=True):
        both = stored(reader, here), stored(source, there, check=False)
        wrong = sum(
            int(np.count_nonzero(a.view(np.uint8) != b.view(np.uint8)))
            for a, b in zip(*both, strict=True)
        )
        if wrong:
            result.found("bytes", f"{wrong} bytes differ from the source", here.spec.name)
    result.identical = not result.findings
    if result.findings:
        codec = codec_of(weight)
        opened = original.open(source, check=False)
        values = codec.open(reader, weight, spec)
        shown = opened.pieces(original.chunks(codec.grain(spec)))
        judge_values(values, spec, shown, result, report=False)


def _judge(
    weight: Weight,
    spec: TensorSpec,
    reader: Readable,
    original: Rows,
    source: Readable,
    result: WeightComparison,
) -> None:
    codec = codec_of(weight)
    opened = original.open(source, check=not codec.checks)
    codec.judge(reader, weight, spec, opened.pieces(original.chunks(codec.grain(spec))), result)
    if not isfinite(result.squared):  # no comparison with a NaN is ever true
        raise not_finite(weight.name)


def compare_steps(
    steps: Sequence[Step],
    files: Mapping[str, PlannedFile],
    written: FolderReader,
    source: FolderReader,
    pool: Executor,
) -> dict[str, Any]:
    """Read back what steps wrote and compare it with the source.

    Args:
        steps: that were carried out.
        files: of the plan, by name.
        written: reads the output.
        source: reads the source.
        pool: for a weight each.

    Returns:
        Name of the weight in the output to what was found, as plain values (`WeightComparison`).
    """

    def compare(step: Step) -> tuple[str, Any]:
        target = step.targets[0]
        file, name = files[target.files[0]], target.outputs[0].name
        parts = tuple(StoredTensor(o, file.name, file.offsets[o.name]) for o in target.outputs)
        weight = Weight(name, target.codec, parts)
        spec = TensorSpec(name, step.spec.dtype, step.rows.shape)
        return name, judge(weight, spec, written, step.rows, source).to_json()

    return dict(pool.map(compare, steps))
