"""Whether the unquantized model computes in one engine what it computes in the other.

The file of the noise floor has the same writer as the files under test, so an error of the writer
is in both. It cannot hide from the logits of the source in the other engine: there, only rounding
may show.

Rounding to 11 bits, as F16 does, is 1/43 of what Q8_0 does to a weight: half a step of a 127th of
the largest of 32 normal values, 0.6 % of the typical one. Divergence grows with the square, so F16
must cost about 1/1800 of Q8_0. Measured on the embedded checkpoint: 1.6e-7 nats against 3.5e-4, in
BF16, which rounds activations to 8 bits, 4e-6. Layers add up their errors, to an eighth of that
distance at 64 of them. So a divergence as large as Q8_0's is not rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwen35.errors import Finding
from qwen35.evaluation.measured import ModelMeasurement
from qwen35.evaluation.models import EvaluatedModel

__all__ = ["LEAST_SAME", "MOST_NOISE", "is_abnormal", "noise_findings"]

MOST_NOISE = 3e-4
"""Mean divergence that rounding may cost, in nats: about that of Q8_0 on the smallest models."""

LEAST_SAME = 0.99
"""Share of equal most likely tokens below which it is no rounding: Q8_0 keeps 99 % and more."""

_ERRORS = 3
"""Standard errors by which the share must be below its bound."""


def is_abnormal(row: ModelMeasurement) -> bool:
    """Return whether an unquantized model is further from the base than rounding explains."""
    same = row.comparison.same_top
    error = max(same.error, same.block_error or 0.0)
    return row.comparison.kld.value > MOST_NOISE or same.value + _ERRORS * error < LEAST_SAME


def noise_findings(
    base: EvaluatedModel, floors: Sequence[ModelMeasurement], candidates: Sequence[ModelMeasurement]
) -> Iterator[Finding]:
    """Yield a finding for each unquantized model that differs between engines by more than noise.

    Args:
        base: the unquantized model.
        floors: the same in the other engine.
        candidates: others; those stored unquantized stand for the base too.
    """
    others = [row for row in candidates if row.model.exact and row.model.engine != base.engine]
    for row in (*floors, *others):
        if not is_abnormal(row):
            continue
        figures = row.comparison
        message = (
            f"abnormal: unquantized ({row.model.stored}), but {figures.kld.value:.3g} nats from "
            f"{base.name} ({row.model.engine} against {base.engine}), with "
            f"{figures.same_top.value:.3%} same top p; rounding costs at most {MOST_NOISE:g} nats "
            f"and keeps {LEAST_SAME:.0%}, so weights or settings must differ, also in quantized "
            f"files made the same way: compare with `qwen35 verify FILE --source {base.name}`"
        )
        yield Finding("noise-floor", row.model.name, message)
