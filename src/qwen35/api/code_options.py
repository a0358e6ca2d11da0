"""The options of refined codes, for all functions that encode."""

from __future__ import annotations

from pathlib import Path

from qwen35.api.text_hessians import TextHessians
from qwen35.planning.refinement import Refinement, opened_refinement

__all__ = ["refinement_of"]


def refinement_of(
    codes: str | None, hessian: str | Path | None, text: TextHessians | None = None
) -> Refinement:
    """Return how codes are chosen.

    Args:
        codes: one of `CODES`; None for what the rules of the recipe say, else plain.
        hessian: the folder of `calibrate` with Hessians.
        text: Hessians that are yet to be made.

    Raises:
        UsageError: there are no such codes.
        InputError: the folder holds no Hessians, or damaged ones.
    """
    return opened_refinement(codes, hessian) if text is None else text.expected
