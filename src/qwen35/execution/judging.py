"""Compare a stored weight with its original: the core of every numbers check."""

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
from qwen35.codecs.refined_bounds import OutputErrors
from qwen35.codecs.registry import codec_of
from qwen35.errors import InputError
from qwen35.planning.output_plan import PlannedFile
from qwen35.planning.refinement import PLAIN, SEARCHED
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
    *,
    refined: bool = False,
    searched: bool = False,
    outputs: OutputErrors | None = None,
) -> WeightComparison:
    """Decode a stored weight; if there is an original, compare the two.

    Args:
        weight: as the artifact stores it.
        spec: its shape and dtype when decoded.
        reader: reads the artifact.
        original: the rows of the source that it was made from.
        source: reads the source.
        subject: name of the weight in findings; its own if empty.
        refined: whether it may have refined codes.
        searched: whether its scales may have been searched too.
        outputs: receives its errors in outputs, if they are to be judged too.

    Returns:
        The comparison; a weight that cannot be read or decoded is a finding.
    """
    result = WeightComparison(
        subject or weight.name, refined=refined, searched=searched, outputs=outputs
    )
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
    """Return whether both are stored in the same way, so that their bytes must be equal."""
    if original.transforms or len(original.slabs) > 1 or original.item.changes:
        return False
    source_weight = original.item.weight
    return codec_of(weight) is codec_of(source_weight) and [
        (part.spec.dtype, part.spec.shape) for part in weight.parts
    ] == [(part.spec.dtype, part.spec.shape) for part in source_weight.parts]


def _same(
    weight: Weight,
    spec: TensorSpec,
    reader: Readable,
    original: Rows,
    source: Readable,
    result: WeightComparison,
) -> None:
    import numpy as np

    for part, source_part in zip(weight.parts, original.item.weight.parts, strict=True):
        both = stored(reader, part), stored(source, source_part, check=False)
        differing = sum(
            int(np.count_nonzero(a.view(np.uint8) != b.view(np.uint8)))
            for a, b in zip(*both, strict=True)
        )
        if differing:
            result.found("bytes", f"{differing} bytes differ from the source", part.spec.name)
    result.identical = not result.findings
    if result.findings:  # add the size of the error; the difference itself is reported already
        codec = codec_of(weight)
        opened = original.open(source, check=False)
        values = codec.open(reader, weight, spec)
        expected = opened.pieces(original.chunks(codec.grain(spec)))
        judge_values(values, spec, expected, result, report=False)


def _judge(
    weight: Weight,
    spec: TensorSpec,
    reader: Readable,
    original: Rows,
    source: Readable,
    result: WeightComparison,
) -> None:
    codec = codec_of(weight)
    opened = original.open(source, check=not codec.checks)  # such codecs refuse NaN themselves
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
        steps: completed steps.
        files: the plan's files by name.
        written: reads the output.
        source: reads the source.
        pool: compares one weight per call.

    Returns:
        Name of the weight in the output to its comparison as plain values (`WeightComparison`).
    """

    def compare(step: Step) -> tuple[str, Any]:
        target = step.targets[0]
        file, name = files[target.files[0]], target.name
        parts = tuple(StoredTensor(o, file.name, file.offsets[o.name]) for o in target.outputs)
        weight = Weight(name, target.codec, parts)
        spec = TensorSpec(name, step.spec.dtype, step.rows.shape)
        codes = target.codes
        result = judge(
            weight,
            spec,
            written,
            step.rows,
            source,
            refined=codes != PLAIN,
            searched=codes == SEARCHED,
        )
        return name, result.to_json()

    return dict(pool.map(compare, steps))
