"""The report on an FP8 conversion: every tensor beside its original, judged by bands."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.fp8.errors import Errors
from qwen35.codecs.fp8.layout import Calibration
from qwen35.codecs.registry import codec_of
from qwen35.errors import Finding
from qwen35.model.fused import FUSED, fused_group
from qwen35.model.roles import Role, role_of
from qwen35.progress import Progress
from qwen35.verify.bands import BANDS, Band, Metric, judge, worse
from qwen35.verify.memo import Seen
from qwen35.verify.numbers import check_numbers
from qwen35.verify.safetensors import CheckpointSubject
from qwen35.verify.structure import check_structure
from qwen35.verify.subject import Held

__all__ = ["BandsName", "Report", "check_fp8"]

BandsName = Literal["derived", "documented"]
_SEED = 0


@dataclass(frozen=True)
class Report:
    """What a check of an FP8 conversion saw.

    Args:
        calibration: how the scales were chosen.
        bands: a key of `BANDS`.
        shards: files.
        packed: FP8 weights.
        passthrough: weights that are not FP8.
        identical: passthrough weights whose bytes are those of the source.
        errors: for each FP8 weight that was compared, how far it is off.
        findings: what is wrong beside the bands.
    """

    calibration: Calibration
    bands: BandsName
    shards: int
    packed: int
    passthrough: int
    identical: int
    errors: Mapping[str, Errors]
    findings: Sequence[Finding]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The rows of the table."""
        return BANDS[self.bands]

    @property
    def judged(self) -> Counter[Band]:
        """How many of the compared weights are in each band."""
        return Counter(judge(errors, self.metrics) for errors in self.errors.values())

    @property
    def verdict(self) -> Band:
        """FAIL if anything was found or a weight failed, else the worst weight's band."""
        return "FAIL" if self.findings else worse(*self.judged)

    def value(self, metric: Metric) -> float:
        """Return a metric over all compared weights, their mean or their largest."""
        values = [metric.value(errors) for errors in self.errors.values()]
        return max(values) if metric.largest else sum(values) / len(values)

    def recommendations(self) -> Iterator[str]:
        """Yield what would improve a metric that is not good."""
        if any(errors.misplaced for errors in self.errors.values()):
            yield (
                "Codes and scales do not belong together, or not to this source: convert again "
                "from the original."
            )
            return
        off = {n: e for n, e in self.errors.items() if judge(e, self.metrics) != "GOOD"}
        if not off:
            return
        clipped = sum(errors.clipped for errors in off.values())
        if clipped and self.calibration.mode == "rms":
            yield (
                f"{clipped} weights saturate: raise --rms-factor (now "
                f"{self.calibration.rms_factor:g}) until none does."
            )
        if clipped and self.calibration.mode == "percentile":
            yield (
                f"{clipped} weights saturate: raise --calib-percentile (now "
                f"{self.calibration.percentile:g}; 100 saturates none)."
            )
        if self.calibration.mode != "search":
            yield "Switch to --calib-mode search: it never saturates and has the least error."
        else:
            name, _ = max(off.items(), key=lambda pair: _badness(pair[1], self.metrics))
            keep = " ".join(f"--keep {role}" for role in _loaded_together(role_of(name)))
            yield f"Leave the worst, {name}, in bf16: {keep}"

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "calibration": str(self.calibration),
            "bands": self.bands,
            "verdict": self.verdict,
            "shards": self.shards,
            "fp8": self.packed,
            "passthrough": self.passthrough,
            "passthrough_identical": self.identical,
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
    """Return the roles that can only be kept with `role`, as --keep takes them."""
    group = fused_group(role)
    if group is None:
        return (role.name,)
    prefix = "mtp.layers." if role.scope == "mtp" else ""
    parts = ("mlp.experts",) if group[2] == "mlp.experts" else FUSED[group[2]]
    return tuple(prefix + part for part in parts)


def _badness(errors: Errors, metrics: tuple[Metric, ...]) -> tuple[bool, float]:
    return judge(errors, metrics) == "FAIL", errors.relative_rmse


def check_fp8(
    artifact: Checkpoint,
    source: Checkpoint,
    calibration: Calibration,
    *,
    bands: BandsName = "derived",
    samples: int | None = None,
    seed: int = _SEED,
    threads: int | None = None,
    progress: Progress | None = None,
    seen: Mapping[str, Any] | None = None,
) -> Report:
    """Compare an FP8 conversion with its source.

    Args:
        artifact: opened leniently.
        source: what it was made from.
        calibration: how its scales were chosen.
        bands: a key of `BANDS`.
        samples: FP8 weights to compare in each file, chosen by `seed`; all of them when None.
            Everything that is not FP8 is compared in any case.
        seed: of the choice.
        threads: weights compared at a time.
        progress: told of the bytes read.
        seen: weights that were compared as they were written, and what was found, as plain values
            (`qwen35.work.judging.compare_steps`); they are not read again.

    Raises:
        UsageError: the artifact has no files at hand.
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
        memo=Seen({name: one for name, one in (seen or {}).items() if _is_told(one)}),
        threads=threads,
        progress=progress,
    )
    errors = {
        held.subject: Errors(**one.errors)  # type: ignore[arg-type]  # counts are whole numbers
        for held, one in numbers.compared
        if _is_judged(held) and one.errors is not None
    }
    misplaced = {name for name, found in errors.items() if found.misplaced}
    return Report(
        calibration=calibration,
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
    )


def _is_told(found: Mapping[str, Any]) -> bool:
    """Whether what was found earlier tells all that is told today."""
    errors = found.get("errors")
    return errors is None or errors.keys() == {field.name for field in fields(Errors)}


def _is_judged(held: Held) -> bool:
    """Whether bands are for it: its codec chooses scales, well or badly."""
    return codec_of(held.weight).calibrated


def _sample(weights: Sequence[Held], count: int | None, seed: int) -> Iterator[Held]:
    files: dict[str, list[Held]] = {}
    for held in weights:
        files.setdefault(held.weight.main.file, []).append(held)
    generator = random.Random(seed)
    for _, members in sorted(files.items()):
        yield from members if count is None else generator.sample(members, min(count, len(members)))
