"""Which weights of an output get refined codes, and the record of it in manifests."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.codecs.registry import CODECS
from qwen35.errors import InputError, UsageError, unknown_name
from qwen35.planning.hessians import Hessians, InputHessian, open_hessians

if TYPE_CHECKING:
    from qwen35.checkpoint.inventory import InventoryItem
    from qwen35.checkpoint.source import Checkpoint
    from qwen35.planning.output_plan import Plan
    from qwen35.planning.rows import Rows
    from qwen35.planning.rules import Recipe, Rule
    from qwen35.planning.step import Step, StepTarget

__all__ = [
    "CODES",
    "KEPT",
    "NEAREST",
    "PLAIN",
    "SEARCHED",
    "Refinement",
    "curvature_memory",
    "files_read",
    "foreign_hessians",
    "hessian_of",
    "is_refined_record",
    "opened_refinement",
    "refined_codes",
    "refined_on",
    "refined_record",
    "refined_targets",
    "refined_text",
    "refined_weights",
    "refining_lines",
    "refining_memory",
    "refining_seconds",
]

PLAIN, _REFINED, SEARCHED = "plain", "refined", "refined+scales"

CODES = (PLAIN, _REFINED, SEARCHED)
"""The ways of choosing codes: the nearest; by what they do to a layer's outputs; with scales that
are searched too, where plain encoding takes them as they come. A digit in manifests for each."""

KEPT = 4
"""Curvatures that stay in memory although no thread uses them: weights that read the same input
follow each other."""

_READY, _PREPARED = 12, 12
"""Bytes a number of a Hessian: ready for use, and more while it is prepared."""

_REFINING = 10_000_000
"""Temporaries of a thread that refines a piece."""

_WEIGHT, _WEIGHT_COLUMN, _FACTOR = 60e-9, 0.18e-9, 1.1e-10
"""Seconds of one thread: a weight, a weight for each column of its row, a cube of columns of a
factor; measured on an x86-64 server with AVX-512 (`benchmarks/codes.py`)."""

_ORIGIN = ("repo", "revision", "folder", "file", "adapters")
"""What manifests record of a source that says which model it is."""

_LONG = 100
"""Minutes that are shown as hours."""

_GIVE = "give them: --hessian DIR, from `qwen35 calibrate --hessian`"


@dataclass(frozen=True)
class Refinement:
    """How codes are chosen; the same options in every container.

    Args:
        codes: one of `CODES`, for weights whose rule does not say.
        hessians: of the inputs of weights.
        described: whether the output is only described: Hessians may be missing.
    """

    codes: str = PLAIN
    hessians: Hessians | None = None
    described: bool = False

    def codes_of(self, rule: Rule | None, codec: str, rows: Rows) -> str:
        """Return how the codes of a weight are chosen: one of `CODES`."""
        asked = rule.codes if rule is not None and rule.codes else self.codes
        if asked == PLAIN or self.hessians is None or not CODECS[codec].refines:
            return PLAIN
        if not any(hessian_of(self.hessians, rows, i) for i in range(len(rows.slabs))):
            return PLAIN
        # the scales of a weight are written together, so one verdict must decide
        searches = len(rows.slabs) == 1 and CODECS[codec].searches(rows.row)
        return asked if searches else _REFINED

    def check(self, checkpoint: Checkpoint, items: Sequence[InventoryItem], recipe: Recipe) -> None:
        """Check that there are Hessians of this model where they are needed, and only there.

        Args:
            checkpoint: the source.
            items: its weights.
            recipe: its rules.

        Raises:
            UsageError: they are missing, or nothing uses them.
            InputError: they are of another model.
        """
        asking = next((rule for rule in recipe.rules if rule.codes not in ("", PLAIN)), None)
        refines = self.codes != PLAIN or asking is not None
        if self.hessians is None:
            if refines and not self.described:
                rule = "" if asking is None else f", rule for {asking.match!r}"
                subject = (
                    f"--codes {self.codes}" if asking is None else f"recipe {recipe.name}{rule}"
                )
                raise UsageError(subject, "needs Hessians of the model's inputs", hint=_GIVE)
            return
        if not refines:
            found, hint = "has no effect on plain codes", "add --codes refined, or leave it out"
            raise UsageError("--hessian", found, hint=hint)
        self.hessians.check(checkpoint.config.geometry, items)

    def digest_of(self, steps: Iterable[Step]) -> dict[str, Any]:
        """Return what of it decides the bytes of steps; empty for plain codes."""
        if self.hessians is None:
            return {}
        rows = [
            [target.outputs[0].name, target.codes, *target.files]
            for step in steps
            for target in step.targets
            if target.codes != PLAIN
        ]
        return {"codes": [self.hessians.sha256, sorted(rows)]}

    def to_json(self) -> dict[str, Any]:
        """Return it as manifests record it; empty for plain codes."""
        if self.hessians is None:
            return {}
        name = self.hessians.folder.resolve()
        row = {"name": name.parent.name, "sha256": self.hessians.sha256}
        return {"codes": self.codes, "hessians": row | _calibrated_on(self.hessians.provenance)}

    @classmethod
    def from_json(cls, recipe: Mapping[str, Any], folder: Path | None) -> Refinement:
        """Return what `to_json` put into the recipe of a manifest.

        Raises:
            InputError: it is malformed, or the Hessians in `folder` are others.
            UsageError: they are missing, or were not used.
        """
        row = recipe.get("hessians")
        if row is None:
            if folder is not None:
                raise UsageError("--hessian", "was not used for it", hint="leave it out")
            return cls()
        codes = recipe.get("codes")
        if not isinstance(row, dict) or codes not in CODES:
            raise InputError(MANIFEST_NAME, "malformed hessians", expected="name and sha256")
        if folder is None:
            found = f"made with {_named(row)}"
            kept = "" if not _of_text(row) else ", from `qwen35 calibrate --hessian` on this text"
            raise UsageError(MANIFEST_NAME, found, hint=f"give them: --hessian{kept}")
        hessians = open_hessians(folder)
        if hessians.sha256 != row.get("sha256"):
            raise InputError(str(folder), "not the Hessians that the manifest names")
        return cls(codes, hessians)

    def notes(self, steps: Iterable[Step], source: Mapping[str, Any]) -> Iterator[str]:
        """Yield what is refined, and whether the Hessians are of a model with another name.

        Args:
            steps: of the plan.
            source: the origin of the checkpoint, as manifests record it.
        """
        if self.hessians is None:
            return
        encoded = [(step, t) for step in steps for t in step.targets if not t.copied]
        able = [pair for pair in encoded if CODECS[pair[1].codec].refines]
        refined = sum(target.codes != PLAIN for _, target in able)
        tried = f"{refined} of {len(able)} quantized weights"
        yield f"refined codes: tried for {tried}, by {_named(self.to_json()['hessians'])}"
        yield from foreign_hessians(self.hessians, source)


def _named(row: Mapping[str, Any]) -> str:
    """Return what to call Hessians, by their record in a manifest, which may be any JSON."""
    if text := _of_text(row):
        return f"the Hessians of {text}"
    return f"the Hessians in {str(row.get('name'))[:80]}"


def _of_text(row: Mapping[str, Any]) -> str:
    """Return the text of Hessians that were in a hidden folder, until ``--calibration`` was done.

    Empty for Hessians in a folder that somebody chose, or whose text is not recorded.
    """
    found = _calibrated_on(row)
    if not found or not str(row.get("name")).startswith("."):
        return ""
    first, *others = (file["name"][:80] for file in found["text"])
    more = f" and {len(others)} more" if others else ""
    return f"{first}{more}, {found['tokens']:,} tokens"


def _calibrated_on(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text and its tokens, as far as Hessians tell, whose origin may be any JSON."""
    text, tokens = provenance.get("text"), provenance.get("tokens")
    if not isinstance(text, list) or not all(map(_is_text, text)) or type(tokens) is not int:
        return {}
    return {"text": [{key: file[key] for key in _TEXT} for file in text], "tokens": tokens}


def _is_text(file: object) -> bool:
    return isinstance(file, dict) and all(isinstance(file.get(key), str) for key in _TEXT)


_TEXT = ("name", "sha256")
"""What is recorded of a file of text."""


def refined_on(recipe: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the texts that Hessians of an artifact were made from, and their tokens, if recorded.

    Args:
        recipe: of its manifest, which may be any JSON.
    """
    row = recipe.get("hessians")
    found = _calibrated_on(row) if isinstance(row, dict) else {}
    return [file["name"] for file in found.get("text", ())], found.get("tokens", 0)


def _model_name(source: Mapping[str, Any]) -> str:
    """Return the name of an origin, which may be any JSON."""
    name = source.get("repo") or source.get("file") or source.get("folder")
    revision = f"@{source['revision']}" if source.get("revision") else ""
    added = source.get("adapters")
    merged = " with adapters" if added else ""
    return f"{name}{revision}"[:120] + merged


def foreign_hessians(hessians: Hessians, source: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note if Hessians are of a model with another name, or with other adapters.

    Args:
        hessians: of inputs.
        source: the origin of the checkpoint, as manifests record it.
    """
    theirs = hessians.provenance.get("source")
    if isinstance(theirs, dict) and any(theirs.get(k) != source.get(k) for k in _ORIGIN):
        ours, other = _model_name(source), _model_name(theirs)
        of = f"{other}, and this is {ours}" if other != ours else f"{ours} with other adapters"
        yield f"these are Hessians of {of}: calibrate it, unless its weights are the same"


NEAREST = Refinement()
"""Plain codes."""


def opened_refinement(codes: str | None, hessian: str | Path | None) -> Refinement:
    """Return how codes are chosen, from ``--codes`` and ``--hessian``.

    Args:
        codes: one of `CODES`; None for what the rules of the recipe say, else plain.
        hessian: the folder of `calibrate` with Hessians.

    Raises:
        UsageError: there are no such codes.
        InputError: the folder holds no Hessians, or damaged ones.
    """
    if codes is not None and codes not in CODES:
        raise unknown_name("--codes", codes, CODES)
    hessians = None if hessian is None else open_hessians(Path(hessian))
    return Refinement(codes or PLAIN, hessians)


def hessian_of(hessians: Hessians, rows: Rows, slab: int) -> InputHessian | None:
    """Return the Hessian of what a slab of rows reads; None if there is none for it."""
    piece = rows.by_weight.slabs[slab]
    item = piece.item
    expert = None
    if item.role.expert is None and len(item.spec.shape) == 3:
        expert = piece.row // item.spec.shape[1]
    found = hessians.of(item.spec.name, expert)
    return found if found is not None and found.columns == rows.row else None


def files_read(hessians: Hessians, step: Step) -> set[str]:
    """Return the names of the files of Hessians that the refined codes of a step depend on."""
    if all(target.codes == PLAIN for target in step.targets):
        return set()
    found = (hessian_of(hessians, step.rows, slab) for slab in range(len(step.rows.slabs)))
    return {hessian.file for hessian in found if hessian is not None}


def refining_memory(plan: Plan, threads: int) -> int:
    """Return the bytes that refining takes at most: what waits for its verdict, and Hessians."""
    held = columns = 0
    for step, target in refined_targets(plan):
        codec = CODECS[target.codec]
        waiting = target.nbytes // len(step.rows.slabs) + codec.refining_memory(step.spec)
        held = max(held, waiting)
        columns = max(columns, step.rows.row)
    if not columns:
        return 0
    return threads * (held + _REFINING) + curvature_memory(columns, threads)


def curvature_memory(columns: int, threads: int) -> int:
    """Return the bytes that Hessians of so many columns take at most, beside threads that refine.

    A thread prepares one while others are used and a few are kept.
    """
    return columns * columns * (threads * _PREPARED + (threads + KEPT) * _READY)


def refining_seconds(plan: Plan) -> float:
    """Return about how long refining takes one thread: codes, and a factor for each input."""
    seconds, widths = 0.0, dict[tuple[str, str], int]()
    hessians = plan.options.refinement.hessians
    for step, target in refined_targets(plan):
        columns, times = step.rows.row, 2 if target.codes == SEARCHED else 1
        seconds += times * prod(step.rows.shape) * (_WEIGHT + _WEIGHT_COLUMN * columns)
        for slab in range(len(step.rows.slabs)):
            found = hessian_of(hessians, step.rows, slab) if hessians else None
            if found is not None:
                widths[found.file, found.name] = columns
    return seconds + sum(_FACTOR * columns**3 for columns in widths.values())


def refining_lines(plan: Plan) -> Iterator[str]:
    """Yield what refining takes, for people; nothing for plain codes."""
    count = sum(1 for _ in refined_targets(plan))
    if count:
        minutes = refining_seconds(plan) / 60
        about = f"{max(minutes, 0.1):,.1f} minutes"
        if minutes >= _LONG:
            about = f"{minutes / 60:,.1f} hours"
        yield f"refines the codes of {count} weights: about {about} of one processor"


def refined_record(plan: Plan, kept: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """Return the entry of a manifest that says which weights have refined codes.

    Of each file, it maps the weight's first tensor to a digit for each matrix of it: 1 for refined
    codes, 2 for those with searched scales, 0 for those that stayed plain since the others were
    worse on held-out tokens.

    Args:
        plan: the plan.
        kept: file and first tensor to these digits; zeros where they are not known yet.
    """
    files: dict[str, dict[str, str]] = {}
    for step, target in refined_targets(plan):
        first = target.outputs[0].name
        for file in target.files:
            digits = kept.get((file, first), "0" * len(step.rows.slabs))
            files.setdefault(file, {})[first] = digits
    return {"refined": files} if files else {}


def refined_text(plan: Plan, kept: Mapping[tuple[str, str], str]) -> str:
    """Return which weights got refined codes, by role and layer; empty if none could.

    Arguments are those of `refined_record`.
    """
    searched, counts = 0, dict[str, list[int]]()
    plain: dict[str, list[str]] = {}
    for step, target in refined_targets(plan):
        for file in target.files:
            digits = kept.get((file, target.outputs[0].name), "")
            row = counts.setdefault(step.role.name, [0, 0])
            row[0] += len(digits) - digits.count("0")
            row[1] += len(digits)
            searched += digits.count("2")
            if "0" in digits:
                layer = "-" if step.role.layer is None else str(step.role.layer)
                plain.setdefault(step.role.name, []).append(layer)
    if not counts:
        return ""
    lines = [f"{'role':<36} refined  plain in layers"]
    for name, (better, all_) in sorted(counts.items()):
        layers = ", ".join(dict.fromkeys(plain.get(name, ())))
        lines.append(f"{name:<36} {f'{better}/{all_}':>7}  {layers}".rstrip())
    if searched:
        lines.append(f"searched scales: {searched} of them")
    return "\n".join(lines)


def is_refined_record(entry: object) -> bool:
    """Return whether a value of a manifest is as `refined_record` makes it."""
    tables = list(entry.values()) if isinstance(entry, dict) else [None]
    return all(
        isinstance(table, dict)
        and all(isinstance(digits, str) and set(digits) <= set("012") for digits in table.values())
        for table in tables
    )


def refined_weights(manifest: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the digits of the weights that have refined codes, by file and first tensor."""
    tables: Mapping[str, Mapping[str, str]] = manifest.get("refined", {})
    return {
        (file, name): digits
        for file, table in tables.items()
        for name, digits in table.items()
        if set(digits) - {"0"}
    }


def refined_codes(manifest: Mapping[str, Any] | None, files: Collection[str] | None = None) -> str:
    """Return how codes of an artifact were chosen: one of `CODES`; empty if all are plain.

    Args:
        manifest: its manifest, if it has one.
        files: of the model in question; None for all of the artifact.
    """
    found = {
        digit
        for (file, _), digits in refined_weights(manifest or {}).items()
        if files is None or file in files
        for digit in digits
    }
    return SEARCHED if "2" in found else _REFINED if "1" in found else ""


def refined_targets(plan: Plan) -> Iterator[tuple[Step, StepTarget]]:
    """Yield the targets of a plan with refined codes."""
    for step in plan.steps:
        for target in step.targets:
            if target.codes != PLAIN:
                yield step, target
