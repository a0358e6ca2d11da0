"""Hessians for one output alone, from a text: ``--calibration``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.given_values import listed, refuse_given
from qwen35.api.write_result import WriteOptions
from qwen35.checkpoint.locations import read_bounded
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint
from qwen35.display import size
from qwen35.errors import InputError, UsageError
from qwen35.planning.hessians import HESSIANS, open_hessians
from qwen35.planning.refinement import PLAIN, Refinement
from qwen35.planning.rules import Recipe
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.calibration.calibration_plan import CalibrationPlan

__all__ = ["TextHessians", "made_hessians", "notes_of", "text_hessians"]


@dataclass(frozen=True)
class TextHessians:
    """The Hessians that an output needs, and where they are until it is complete.

    Args:
        plan: of their calibration.
        folder: hidden, beside the output.
        codes: how codes are chosen, unless the recipe's rules say.
    """

    plan: CalibrationPlan
    folder: Path
    codes: str

    @property
    def expected(self) -> Refinement:
        """What they will be used for, known before any text has passed."""
        from qwen35.calibration.hessian_plan import expected_hessians

        assert self.plan.hessians is not None
        hessians = expected_hessians(self.plan.hessians, self.plan.provenance)
        return Refinement(self.codes, replace(hessians, folder=self.folder / HESSIANS))

    @property
    def note(self) -> str:
        """What they take, for the user."""
        text = self.plan.text
        return (
            f"calibrates first, on {len(text.windows)} windows of {text.context} tokens: "
            f"{size(self.plan.peak_bytes)} of memory, and at most {size(self.plan.disk_bytes)} of "
            "disk space until the output is complete"
        )

    @property
    def are_made(self) -> bool:
        """Whether an interrupted run has made them already."""
        try:
            made = json.loads(read_bounded(self.folder / MANIFEST_NAME))
        except (InputError, ValueError, RecursionError):
            return False
        return isinstance(made, dict) and made.get("plan") == self.plan.digest


def text_hessians(
    calibration: str | Path | Sequence[str | Path],
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    codes: str | None,
    memory: int | None,
    *,
    instead: bool,
    alone: bool,
) -> TextHessians | None:
    """Plan the Hessians of an output; None without text.

    Args:
        calibration: text files.
        checkpoint: the source.
        recipe: whose rules may ask for refined codes.
        out: the output.
        codes: how codes are chosen, unless a rule says.
        memory: limit in bytes.
        instead: whether Hessians are given.
        alone: whether other machines or calls write parts of the output.

    Raises:
        UsageError: it is too short, has no effect, or other options exclude it.
        InputError: it cannot be read, or the source is quantized.
    """
    texts = listed(calibration)
    if not texts:
        return None
    refuse_given({"--hessian": instead}, "is not needed with --calibration")
    if {codes or PLAIN, *(rule.codes or PLAIN for rule in recipe.rules)} == {PLAIN}:
        hint = "add --codes refined, or leave it out"
        raise UsageError("--calibration", "has no effect on plain codes", hint=hint)
    if alone:
        hint = "run `qwen35 calibrate --hessian` first, and give --hessian to all of them"
        raise UsageError("--calibration", "is not for slices and clusters", hint=hint)
    plan = _planned(checkpoint, [Path(text) for text in texts], memory)
    folder = out.absolute().with_name(f".{out.absolute().name}.hessians")
    return TextHessians(plan, folder, codes or PLAIN)


def _planned(checkpoint: Checkpoint, texts: Sequence[Path], memory: int | None) -> CalibrationPlan:
    from qwen35.calibration.calibration_plan import CalibrationRequest, make_plan
    from qwen35.calibration.text_windows import read_text

    try:
        windows = read_text(checkpoint, texts)
        return make_plan(checkpoint, windows, CalibrationRequest(memory=memory, hessian=True))
    except UsageError as error:
        if error.subject not in ("--text", "--hessian"):
            raise
        raise UsageError(  # as the user gave it
            "--calibration", error.found, expected=error.expected, hint=error.hint
        ) from error


def notes_of(needed: TextHessians | None) -> tuple[str, ...]:
    """Return what a dry run says of them."""
    return () if needed is None else (needed.note,)


@contextmanager
def made_hessians(
    needed: TextHessians | None, options: WriteOptions, progress: Progress | None
) -> Iterator[Refinement | None]:
    """Calibrate, and remove the Hessians once the output is complete; None if none are needed.

    After an interruption they stay, for the next run.

    Raises:
        InputError: a weight cannot be read, or an input holds NaN.
        OutputError: the disk is full.
    """
    if needed is None:
        yield None
        return
    from qwen35.calibration.calibration_run import calibrate

    if not needed.are_made:
        calibrate(
            needed.plan,
            needed.folder,
            overwrite=True,
            threads=options.threads,
            device=options.device if options.device.startswith("cuda") else "auto",
            progress=progress,
        )
    yield Refinement(needed.codes, open_hessians(needed.folder))
    shutil.rmtree(needed.folder)
