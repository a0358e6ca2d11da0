"""The report on an FP8 conversion: every tensor compared with its original and judged by bands."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.fp8.error_sums import ErrorSums
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.codecs.registry import codec_of, quantized_weights
from qwen35.errors import Finding
from qwen35.model.fused import FUSED, fused_group
from qwen35.model.roles import Role, role_of
from qwen35.progress import Progress
from qwen35.verification.bands import BANDS, Band, BandMetric, judge, worse
from qwen35.verification.memo import ReadOnlyMemo
from qwen35.verification.numbers_check import check_numbers
from qwen35.verification.safetensors_subject import CheckpointSubject
from qwen35.verification.structure_check import check_structure
from qwen35.verification.subject import HeldWeight

__all__ = ["BandsName", "Fp8Report", "check_fp8"]

BandsName = Literal["derived", "documented"]
_SEED = 0


@dataclass(frozen=True)
class Fp8Report:
    """The result of a check of an FP8 conversion.

    Args:
        scale_choice: how the scales were chosen.
        bands: a key of `BANDS`.
        shards: number of files.
        packed: number of FP8 weights.
        passthrough: number of other weights.
        identical: number of other weights with the bytes of the source.
        errors: FP8 weight to its errors, for those that were compared.
        findings: findings apart from the bands.
        quantized: format to the number of weights that the source holds in it; they are compared
            as they decode.
    """

    scale_choice: ScaleChoice
    bands: BandsName
    shards: int
    packed: int
    passthrough: int
    identical: int
    errors: Mapping[str, ErrorSums]
    findings: Sequence[Finding]
    quantized: Mapping[str, int] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[BandMetric, ...]:
        """The metrics of the bands."""
        return BANDS[self.bands]

    @property
    def judged(self) -> Counter[Band]:
        """Number of compared weights in each band."""
        return Counter(judge(errors, self.metrics) for errors in self.errors.values())

    @property
    def verdict(self) -> Band:
        """FAIL if there are findings, else the band of the worst weight."""
        return "FAIL" if self.findings else worse(*self.judged)

    def verdict_by(self, bands: BandsName) -> Band:
        """The verdict that other bands would give."""
        return replace(self, bands=bands).verdict

    @property
    def unchecked(self) -> int:
        """Number of FP8 weights that were not compared."""
        return self.packed - len(self.errors)

    def value(self, metric: BandMetric) -> float:
        """Return the mean or the largest value of a metric over all compared weights."""
        values = [metric.value(errors) for errors in self.errors.values()]
        return max(values) if metric.largest else sum(values) / len(values)

    def recommendations(self) -> Iterator[str]:
        """Yield advice on the metrics that are not GOOD."""
        if any(errors.misplaced for errors in self.errors.values()):
            yield (
                "Codes and scales do not match each other or this source: convert again from the "
                "original."
            )
            return
        off = {n: e for n, e in self.errors.items() if judge(e, self.metrics) != "GOOD"}
        if not off:
            return
        clipped = sum(errors.clipped for errors in off.values())
        if clipped and self.scale_choice.mode == "rms":
            yield (
                f"{clipped} weights saturate: raise --rms-factor (now "
                f"{self.scale_choice.rms_factor:g}) until none does."
            )
        if clipped and self.scale_choice.mode == "percentile":
            yield (
                f"{clipped} weights saturate: raise --calib-percentile (now "
                f"{self.scale_choice.percentile:g}; 100 saturates none)."
            )
        if self.scale_choice.mode != "search":
            yield "Switch to --calib-mode search: it never saturates and has the least error."
        else:
            name, _ = max(off.items(), key=lambda pair: _badness(pair[1], self.metrics))
            keep = " ".join(f"--keep {role}" for role in _loaded_together(role_of(name)))
            yield f"Leave the worst, {name}, in bf16: {keep}"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "calibration": str(self.scale_choice),
            "bands": self.bands,
            "verdict": self.verdict,
            "shards": self.shards,
            "fp8": self.packed,
            "passthrough": self.passthrough,
            "passthrough_identical": self.identical,
            "source_quantized": dict(self.quantized),
            "checked": {band: self.judged[band] for band in ("GOOD", "WARN", "FAIL")},
            "metrics": {m.name: self.value(m) for m in self.metrics} if self.errors else {},
            "tensors": {
                name: {
                    "cosine": errors.cosine,
                    "mae": errors.mae,
                    "max_ae": errors.worst,
                    "relative_rmse": errors.relative_rmse,
                    "clipped": errors.clipped,
                    "misplaced": errors.misplaced,
                    "band": judge(errors, self.metrics),
                }
                for name, errors in self.errors.items()
            },
            "findings": [finding.to_json() for finding in self.findings],
            "recommendations": list(self.recommendations()),
        }


def _loaded_together(role: Role) -> tuple[str, ...]:
    """Return the roles that must be kept together with `role`, as --keep takes them."""
    group = fused_group(role)
    if group is None:
        return (role.name,)
    prefix = "mtp.layers." if role.scope == "mtp" else ""
    parts = ("mlp.experts",) if group[2] == "mlp.experts" else FUSED[group[2]]
    return tuple(prefix + part for part in parts)


def _badness(errors: ErrorSums, metrics: tuple[BandMetric, ...]) -> tuple[bool, float]:
    return judge(errors, metrics) == "FAIL", errors.relative_rmse


def check_fp8(
    artifact: Checkpoint,
    source: Checkpoint,
    scale_choice: ScaleChoice,
    *,
    bands: BandsName = "derived",
    samples: int | None = None,
    seed: int = _SEED,
    threads: int | None = None,
    progress: Progress | None = None,
    seen: Mapping[str, Any] | None = None,
) -> Fp8Report:
    """Compare an FP8 conversion with its source.

    Args:
        artifact: opened leniently.
        source: the checkpoint that it was made from.
        scale_choice: how its scales were chosen.
        bands: a key of `BANDS`.
        samples: FP8 weights to compare per file, chosen at random; all by default. Weights that are
            not FP8 are always compared.
        seed: seed of the random choice.
        threads: number of weights compared at a time.
        progress: receives bytes read.
        seen: results of weights that workers compared when they wrote them, as plain values
            (`qwen35.execution.judging.compare_steps`); these weights are not read again.

    Raises:
        UsageError: the artifact is only a description, without files.
    """
    subject = CheckpointSubject(artifact)
    structure = check_structure(subject)
    weights = [held for part in subject.parts for held in part.weights]
    packed = [held for held in weights if _is_judged(held)]
    chosen = {held.subject for held in _sample(packed, samples, seed)}
    numbers = check_numbers(
        subject,
        source,
        only=lambda held: not _is_judged(held) or held.subject in chosen,
        memo=ReadOnlyMemo({name: one for name, one in (seen or {}).items() if _is_complete(one)}),
        manifest=structure.manifest,
        threads=threads,
        progress=progress,
    )
    errors = {
        held.subject: ErrorSums(**one.errors)  # type: ignore[arg-type]  # counts are whole numbers
        for held, one in numbers.compared
        if _is_judged(held) and one.errors is not None
    }
    # their "codes" findings are left out: misplaced codes fail the bands already
    misplaced = {name for name, one in errors.items() if one.misplaced}
    return Fp8Report(
        scale_choice=scale_choice,
        bands=bands,
        shards=len(subject.files),
        packed=len(packed),
        passthrough=len(weights) - len(packed),
        identical=sum(one.identical for held, one in numbers.compared if not _is_judged(held)),
        errors=errors,
        findings=[
            *structure.findings,
            *(f for f in numbers.findings if f.check != "codes" or f.subject not in misplaced),
        ],
        quantized=quantized_weights(source.weights),
    )


def _is_complete(result: Mapping[str, Any]) -> bool:
    """Return whether an earlier result, perhaps of another version, has all of today's values."""
    errors = result.get("errors")
    return errors is None or errors.keys() == {field.name for field in fields(ErrorSums)}


def _is_judged(held: HeldWeight) -> bool:
    """Return whether bands apply."""
    return codec_of(held.weight).banded


def _sample(weights: Sequence[HeldWeight], count: int | None, seed: int) -> Iterator[HeldWeight]:
    files: dict[str, list[HeldWeight]] = {}
    for held in weights:
        files.setdefault(held.weight.main.file, []).append(held)
    generator = random.Random(seed)
    for _, members in sorted(files.items()):  # the same sample in whatever order files are read
        yield from members if count is None else generator.sample(members, min(count, len(members)))
