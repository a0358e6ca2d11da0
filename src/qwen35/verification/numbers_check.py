"""Numbers: decode every weight and, if there is a source, compare it with its original."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Checkpoint, FolderReader, Reader
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.refined_bounds import OutputErrors
from qwen35.codecs.registry import codec_of
from qwen35.errors import Finding, InputError
from qwen35.execution.judging import judge
from qwen35.execution.refiners import Curvatures
from qwen35.model.fused import scale_group
from qwen35.model.roles import role_of
from qwen35.planning.hessians import Hessians
from qwen35.planning.refinement import refined_weights
from qwen35.planning.rows import Rows
from qwen35.progress import Progress, Silent
from qwen35.threads import default_threads
from qwen35.verification.memo import ReadOnlyMemo, ResultMemo
from qwen35.verification.role_errors import RoleError, by_role
from qwen35.verification.subject import HeldWeight, SourceWeights, Subject, SubjectPart

__all__ = ["NumbersResult", "check_numbers", "check_shapes"]


@dataclass(frozen=True)
class NumbersResult:
    """The result of `check_numbers`.

    Args:
        roles: errors per role, of the weights that were compared completely.
        compared: every checked weight and its comparison.
        findings: the findings.
    """

    roles: Sequence[RoleError]
    compared: Sequence[tuple[HeldWeight, WeightComparison]]
    findings: Sequence[Finding]

    def too_far(self) -> Iterator[Finding]:
        """Yield the weights whose error is beyond their codec's limit."""
        for held, one in self.compared:
            if one.errors is not None and (why := codec_of(held.weight).too_far(one.errors)):
                yield Finding("error", held.subject, why)


def check_shapes(subject: Subject, source: Checkpoint) -> Iterator[Finding]:
    """Compare names and shapes of the weights with the source's, from headers alone.

    Raises:
        InputError: the source's headers do not fit its config.
    """
    _, items = take(source, tower=False)
    for part in subject.parts:
        yield from subject.originals(part, source, items).findings


def check_numbers(
    subject: Subject,
    source: Checkpoint | None,
    *,
    only: Callable[[HeldWeight], bool] | None = None,
    memo: ResultMemo | None = None,
    manifest: Mapping[str, Any] | None = None,
    hessians: Hessians | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> NumbersResult:
    """Decode every weight; if there is a source, compare each with its original.

    Args:
        subject: the artifact, opened with its weights.
        source: the checkpoint that it was made from.
        only: selects the weights to check; all by default.
        memo: earlier results; receives the new ones.
        manifest: the artifact's, which says which weights have refined codes.
        hessians: by which errors of refined codes in outputs are judged too.
        threads: number of weights checked at a time.
        progress: receives bytes read.

    Raises:
        InputError: the source cannot be read.
    """
    if not subject.parts:
        return NumbersResult((), (), ())
    roles: list[RoleError] = []
    compared: list[tuple[HeldWeight, WeightComparison]] = []
    findings: list[Finding] = []
    items = take(source, tower=False)[1] if source else ()
    curvatures = None if hessians is None else Curvatures(hessians)
    with (
        subject.reader() as reader,
        Reader(source) if source else nullcontext() as source_reader,
    ):
        for part in subject.parts:
            originals = subject.originals(part, source, items) if source else SourceWeights({})
            findings += originals.findings
            if not originals.comparable:
                continue
            check = _Check(
                reader,
                source_reader,
                originals,
                memo or ReadOnlyMemo({}),
                progress or Silent(),
                refined_weights(manifest or {}),
                curvatures,
            )
            checked = check.part(part, only, threads or default_threads())
            compared += checked
            findings += [finding for _, one in checked for finding in one.findings]
            roles += _roles(part, originals, checked)
            findings += [*_untied(part, reader), *_unusable_inputs(part, reader)]
        findings += subject.beside(reader, source)
    return NumbersResult(roles, compared, findings)


def _untied(part: SubjectPart, reader: FolderReader) -> Iterator[Finding]:
    """Yield weights whose scale of the whole is not that of those that engines fuse with them."""
    first: dict[object, tuple[str, float]] = {}
    for held in part.weights:
        with suppress(InputError):  # the check of the weight itself found it
            scale = codec_of(held.weight).whole_scale(reader, held.weight)
            if scale is None or (key := scale_group(role_of(held.weight.name))) is None:
                continue
            name, other = first.setdefault(key, (held.weight.name, scale))
            if scale != other:
                message = f"its scale of the whole is {scale:g}, that of {name} {other:g}"
                yield Finding("scales", held.subject, f"{message}: engines take one for both")


def _unusable_inputs(part: SubjectPart, reader: FolderReader) -> Iterator[Finding]:
    """Yield stored scales of inputs by which no engine can quantize them."""
    for held in part.weights:
        codec = codec_of(held.weight)
        if codec.quantized_inputs:
            try:
                codec.input_quantizer(reader, held.weight)
            except InputError as error:
                yield Finding("scales", error.subject, error.message)


def _roles(
    part: SubjectPart,
    originals: SourceWeights,
    checked: Sequence[tuple[HeldWeight, WeightComparison]],
) -> list[RoleError]:
    """Add up the errors of weights that were compared completely."""
    rows = originals.rows
    judged = [(held, one) for held, one in checked if one.judged and held.subject in rows]
    if part.by_name:
        judged.sort(key=lambda pair: pair[0].weight.name)
    return by_role((rows[held.subject].item.role.name, held.storage, one) for held, one in judged)


@dataclass(frozen=True)
class _Check:
    reader: FolderReader
    source: Reader | None
    originals: SourceWeights
    memo: ResultMemo
    progress: Progress
    refined: Mapping[tuple[str, str], str]
    curvatures: Curvatures | None

    def part(
        self, part: SubjectPart, only: Callable[[HeldWeight], bool] | None, threads: int
    ) -> list[tuple[HeldWeight, WeightComparison]]:
        """Check the selected weights of a part."""
        chosen = [held for held in part.weights if only is None or only(held)]
        skipped = sum(h.weight.nbytes for h in part.weights if only and not only(h))
        self.progress.begin(f"checking {part.name}", part.nbytes - skipped)
        try:
            with ThreadPoolExecutor(threads) as pool:
                return list(zip(chosen, pool.map(self._weight, chosen), strict=True))
        finally:
            self.progress.end()

    def _weight(self, held: HeldWeight) -> WeightComparison:
        """Check one weight, unless the memo has its result."""
        earlier = self.memo.get(held.subject)
        result = WeightComparison.from_json(earlier) if earlier else self._judged(held)
        self.memo.add(held.subject, result.to_json())
        self.progress.advance(held.weight.nbytes, held.weight.name)
        return result

    def _judged(self, held: HeldWeight) -> WeightComparison:
        """Check one weight; a weight that cannot be read or decoded becomes a finding."""
        original = self.originals.rows.get(held.subject)
        main = held.weight.main
        digits = self.refined.get((main.file, main.spec.name), "")
        return judge(
            held.weight,
            held.spec,
            self.reader,
            original,
            self.source,
            held.subject,
            refined=bool(digits),
            searched="2" in digits,
            outputs=None if original is None else self._outputs(original, digits),
        )

    def _outputs(self, original: Rows, digits: str) -> OutputErrors | None:
        """Return what judges refined codes by errors in outputs, if there are Hessians."""
        curvatures = self.curvatures
        if curvatures is None or not digits:
            return None
        plain = {i for i, digit in enumerate(digits) if digit == "0"}
        return OutputErrors(
            lambda number: None if number in plain else curvatures.of(original, number),
            original.count,
        )
