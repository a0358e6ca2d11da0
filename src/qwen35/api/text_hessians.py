"""Hessians for one output alone, from a text that passes while it is written: ``--calibration``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.given_values import listed, refuse_given
from qwen35.checkpoint.source import Checkpoint
from qwen35.display import size
from qwen35.errors import UsageError
from qwen35.planning.hessians import HESSIANS, Hessians
from qwen35.planning.memory import peak_memory
from qwen35.planning.output_plan import Plan
from qwen35.planning.refinement import PLAIN, Refinement
from qwen35.planning.rules import Recipe
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.calibration.calibration_plan import CalibrationPlan
    from qwen35.calibration.streamed_hessians import StreamedHessians

__all__ = ["TextHessians", "TextRun", "text_hessians"]


@dataclass(frozen=True)
class TextHessians:
    """The Hessians that an output needs, and where they are while it is written.

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
        # what decides their values stands for their hash, until it is known
        return Refinement(
            self.codes,
            replace(hessians, folder=self.folder / HESSIANS, sha256=self.plan.digest),
        )

    @property
    def held_bytes(self) -> int:
        """Bytes in memory while weights are encoded: the layer that the text has just passed."""
        return self.plan.layer_bytes

    def peak_bytes(self, plan: Plan, threads: int) -> int:
        """Return the peak memory of passing the text and encoding, on top of the libraries.

        Args:
            plan: of the output.
            threads: that encode.
        """
        encoding = self.held_bytes + peak_memory(plan, threads) - plan.container.base_memory
        return max(self.plan.peak_bytes, encoding)

    def notes(self, plan: Plan, threads: int) -> tuple[str, ...]:
        """Return what a dry run says of them; arguments are those of `peak_bytes`."""
        text = self.plan.text
        return (
            f"passes {len(text.windows)} chunks of {text.context} tokens, and encodes each layer "
            f"when they have passed it: {size(self.peak_bytes(plan, threads))} of memory on top of "
            f"Python and its libraries, and at most {size(self.plan.streamed_disk_bytes)} of disk "
            "space beside the output",
        )

    def run_for(
        self, planned: Callable[[Refinement], Plan], threads: int | None, device: str
    ) -> TextRun:
        """Return the run of the text that makes them.

        Args:
            planned: plans the output anew.
            threads: of torch.
            device: that the output is encoded on; a GPU computes the layers too.
        """
        from qwen35.calibration.streamed_hessians import StreamedHessians

        layers = device if device.startswith("cuda") else "auto"
        stream = StreamedHessians(self.plan, self.folder, threads=threads, device=layers)
        return TextRun(self, stream, planned)


@dataclass
class TextRun:
    """A text that passes while an output is written (`qwen35.writing.text_pass.TextPass`).

    Args:
        needed: what it makes.
        stream: how.
        planned: plans the output anew.

    Attributes:
        plan: of the output with the hash of all Hessians, when the text has passed.
    """

    needed: TextHessians
    stream: StreamedHessians
    planned: Callable[[Refinement], Plan]
    plan: Plan | None = None

    @property
    def read_bytes(self) -> int:
        """Tensor bytes that it reads."""
        return self.needed.plan.read_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes that it takes on disk, beside what it has there."""
        return self.stream.disk_bytes

    def run(
        self, awaited: Collection[str], encode: Callable[[Hessians], None], progress: Progress
    ) -> Plan:
        """Pass the text; arguments and errors are those of `TextPass`."""
        hessians = self.stream.run(awaited, encode, progress)
        self.plan = self.planned(Refinement(self.needed.codes, hessians))
        return self.plan


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
        alone: whether other processes write parts of the output.

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
        raise UsageError("--calibration", "is not for workers, slices and clusters", hint=hint)
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
