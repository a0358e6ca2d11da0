"""The type of each tensor: mixes, rules, fallbacks, and checks of the importance matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwen35.codecs.ggml.codec import codec_name
from qwen35.codecs.ggml.types import GGML_TYPES, NEEDS_IMATRIX, fallback
from qwen35.codecs.registry import CODECS
from qwen35.errors import TensorError, UsageError
from qwen35.planning.gguf_files.imatrix import Imatrix
from qwen35.planning.gguf_files.mixes import MIX, FileType, MixGeometry, quantizable, select_types
from qwen35.planning.gguf_files.tensor_names import UntypedTensor
from qwen35.planning.rules import Recipe, Rule, check_used

__all__ = ["Kinds", "TypeChooser", "converted_kind", "imatrix_notes", "misfit_notes", "pure_kind"]

Kinds = Mapping[str, str]
"""ggml types by tensor name."""


_NO_IMATRIX = ("token_embd.weight", "output.weight")
"""Tensors for which llama-imatrix collects nothing."""


@dataclass(frozen=True)
class TypeChooser:
    """Chooses types for one model.

    Args:
        tensors: the text model's tensors.
        geometry: the model's geometry.
        recipe: the rules; the first that matches applies.
        imatrix: an importance matrix, if any.
        upstream_counters: count layers as llama-quantize does (`select_types`).
    """

    tensors: Sequence[UntypedTensor]
    geometry: MixGeometry
    recipe: Recipe
    imatrix: Imatrix | None
    upstream_counters: bool

    def rules_by_tensor(self) -> dict[str, Rule | None]:
        """Return the rule for each tensor that can be quantized, or None.

        Raises:
            UsageError: a required rule decides no tensor.
        """
        chosen = {
            tensor.name: next((r for r in self._matching(tensor) if _readable(r, tensor)), None)
            for tensor in self.tensors
            if quantizable(tensor.name, tensor.shape)
        }
        used = {id(rule) for rule in chosen.values()}
        for tensor, rule in self._skipped():
            if rule.required and id(rule) not in used:
                found = f"{tensor.name}: {rule.action} needs a scale, which llama.cpp does not read"
                raise UsageError(rule.subject, f"{found} for it", expected="another type")
        check_used(
            self.recipe.rules,
            chosen.values(),
            name=lambda rule: rule.subject,
            found="no tensor that can be quantized is left for it",
            hint="names are those of `qwen35 gguf --dry-run --json`; the first rule decides",
        )
        return chosen

    def _matching(self, tensor: UntypedTensor) -> Iterator[Rule]:
        role = tensor.rows.item.role
        return (rule for rule in self.recipe.rules if rule.matches(role, tensor.name))

    def _skipped(self) -> Iterator[tuple[UntypedTensor, Rule]]:
        """Yield the tensors whose first rule gives them a type that llama.cpp could not read."""
        for tensor in self.tensors:
            rule = next(self._matching(tensor), None)
            if rule and quantizable(tensor.name, tensor.shape) and not _readable(rule, tensor):
                yield tensor, rule

    def kinds(self, file_type: FileType, *, checked: bool = True) -> tuple[Kinds, list[str]]:
        """Return the type of every tensor of a file, and notes.

        Args:
            file_type: the file's type.
            checked: refuse types that lack an importance matrix.

        Raises:
            UsageError: a rule's type does not fit the tensor, or lacks an importance matrix.
        """
        if file_type.quantized:
            return self._quantized(file_type, checked=checked)
        kinds = {tensor.name: converted_kind(tensor, file_type) for tensor in self.tensors}
        note = f"{file_type.name} is not quantized: rules and recipes do not change it"
        return kinds, [note] if self.recipe.rules else []

    def _quantized(self, file_type: FileType, *, checked: bool) -> tuple[Kinds, list[str]]:
        chosen = self.rules_by_tensor()
        named = {name: rule.action for name, rule in chosen.items() if rule and rule.action != MIX}
        picked = select_types(
            file_type,
            [(tensor.name, tensor.shape) for tensor in self.tensors],
            self.geometry,
            named,
            upstream_counters=self.upstream_counters,
        )
        kinds, notes = {}, list(self._skipped_notes())
        for tensor in self.tensors:
            if tensor.name not in picked:  # not quantizable: llama-quantize copies it
                kinds[tensor.name] = "f32"
                continue
            rule = chosen[tensor.name] if tensor.name in named else None
            kind, note = self._fitting(tensor, picked[tensor.name], rule)
            notes += note
            if checked:
                self._check_imatrix(tensor, kind, file_type, rule)
            kinds[tensor.name] = kind
        return kinds, notes

    def _skipped_notes(self) -> Iterator[str]:
        names: dict[str, list[str]] = {}
        for tensor, rule in self._skipped():
            names.setdefault(rule.action, []).append(tensor.name)
        for kind, skipped in names.items():
            yield (
                f"{kind} needs scales, which llama.cpp does not read for {_some(skipped)}: they "
                "get the type that they would have without that rule"
            )

    def _fitting(
        self, tensor: UntypedTensor, kind: str, rule: Rule | None
    ) -> tuple[str, list[str]]:
        """Return a type that fits the tensor's rows, and a note if it differs from `kind`."""
        requested = GGML_TYPES[kind]
        fitting = fallback(requested, tensor.row)
        if fitting is requested:
            return kind, []
        found = f"{tensor.name}: rows of {tensor.row} do not fit {kind}"
        # llama-quantize replaces the type silently; here a rule is followed or refused.
        if rule is not None and not self.upstream_counters:
            expected = f"a multiple of {requested.block}, or the type {fitting.name}"
            raise UsageError(rule.subject, found, expected=expected)
        return fitting.name, [f"{found}, so it gets {fitting.name}"]

    def _check_imatrix(
        self, tensor: UntypedTensor, kind: str, file_type: FileType, rule: Rule | None
    ) -> None:
        if self.imatrix is not None and tensor.name in self.imatrix.entries:
            return
        # As llama-quantize. For the types of `NEEDS_IMATRIX`, ggml would abort the process.
        refused = kind == file_type.needs_imatrix and tensor.name not in _NO_IMATRIX
        if not refused and kind not in NEEDS_IMATRIX:
            return
        if self.imatrix is None and rule is None:
            found = f"{file_type.name} without an importance matrix"
            hint = "give it one by --imatrix, of `qwen35 calibrate` or from the Hub"
            raise UsageError("--types", found, hint=hint)
        mtp = tensor.rows.item.role.scope == "mtp"
        raise UsageError(
            tensor.name,
            f"{kind} without an importance matrix",
            expected="an entry for it in --imatrix",
            hint=f"give it another type by --tensor-type{', or --drop-mtp' * mtp}",
        )


def _readable(rule: Rule, tensor: UntypedTensor) -> bool:
    """Return whether llama.cpp reads all that the type of a rule needs for a tensor."""
    return rule.action == MIX or CODECS[codec_name(rule.action)].packs(tensor.rows.item.role)


def converted_kind(tensor: UntypedTensor, file_type: FileType) -> str:
    """Return a tensor's type in a file that the converter writes (`mixes.CONVERTED`)."""
    # As the converter: vectors, norms and routers stay F32, whatever the file.
    if tensor.storage == "any":
        return fallback(GGML_TYPES[file_type.base], tensor.row).name
    return "f16" if tensor.storage == "patch" and file_type.base == "f16" else "f32"


def pure_kind(tensor: UntypedTensor, file_type: FileType) -> str:
    """Return a tensor's type in a file of ``llama-quantize --pure``."""
    if not quantizable(tensor.name, tensor.shape):
        return "f32"
    return fallback(GGML_TYPES[file_type.base], tensor.row).name


def misfit_notes(file: str, tensors: Sequence[UntypedTensor], file_type: FileType) -> Iterator[str]:
    """Yield a note on the tensors of a converter's file whose rows do not fit its type."""
    unfit = [
        tensor
        for tensor in tensors
        if tensor.storage == "any" and converted_kind(tensor, file_type) != file_type.base
    ]
    if unfit:
        rows = ", ".join(str(row) for row in sorted({tensor.row for tensor in unfit}))
        yield (
            f"{file}: rows of {rows} do not fit {file_type.base}, so {len(unfit)} tensors get "
            f"{converted_kind(unfit[0], file_type)}"
        )


def imatrix_notes(imatrix: Imatrix, tensors: Sequence[UntypedTensor]) -> Iterator[str]:
    """Yield notes on how an importance matrix and a model differ.

    Raises:
        TensorError: the matrix belongs to another model.
    """
    quantized = {t.name: t for t in tensors if quantizable(t.name, t.shape)}
    covered = [name for name in quantized if name in imatrix.entries]
    for name in covered:
        _check_size(imatrix, quantized[name])
    if not covered:
        raise TensorError(imatrix.name, "no entry for any tensor of this model")
    missing = [name for name in quantized if name not in imatrix.entries]
    if missing:
        yield (
            f"{imatrix.name} has no entry for {len(missing)} of {len(quantized)} tensors, which "
            f"are quantized without one: {_some(missing)}"
        )
    extra = sorted(set(imatrix.entries) - set(quantized))
    if extra:
        yield f"{imatrix.name} has entries for tensors not in this model: {_some(extra)}"
    if filled := imatrix.provenance.get("experts_below_floor"):
        yield (
            f"{imatrix.name} saw fewer than {imatrix.provenance.get('floor')} tokens for {filled} "
            "experts, which were filled up from the average of their layer"
        )
    partial = [name for name in covered if imatrix.entries[name].unseen]
    if partial:
        count = sum(imatrix.entries[name].unseen for name in partial)
        yield (
            f"{imatrix.name} saw no token for {count} experts, whose channels weigh the same: "
            f"{_some(partial)}"
        )


def _check_size(imatrix: Imatrix, tensor: UntypedTensor) -> None:
    found, expected = imatrix.entries[tensor.name].size, tensor.row * len(tensor.rows.slabs)
    if found != expected:
        raise TensorError(
            imatrix.name,
            f"{found} values for {tensor.name}",
            expected=str(expected),
            hint="it was made for another model",
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
