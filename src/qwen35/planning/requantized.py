"""Notes on weights that are quantized a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from qwen35.codecs.registry import CODECS, codec_of, is_lossy
from qwen35.planning.step import Step

__all__ = ["requantized_notes"]


def requantized_notes(steps: Sequence[Step]) -> Iterator[str]:
    """Yield a note per format of the source that is quantized again.

    The loss of the first quantization stays, and no later comparison with this source shows it.
    """
    again = {step.weight.name: codec_of(step.weight).label for step in steps if _is_again(step)}
    for label, count in Counter(again.values()).items():
        yield (
            f"{count} weights are {label} in the source and are quantized again: errors are "
            f"measured against what {label} decodes to, not against the original weights"
        )


def _is_again(step: Step) -> bool:
    lossy = (CODECS[target.codec].packed for target in step.targets if not target.copied)
    return is_lossy(step.weight) and any(lossy)
