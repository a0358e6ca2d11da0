"""Write GGUF files for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.open import describe, fetch, folder_of
from qwen35.errors import UsageError
from qwen35.plan.memory import threads_within
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.gguf.plan import GgufPlan

__all__ = ["DEFAULT_TYPES", "GgufMade", "gguf"]

DEFAULT_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")


@dataclass(frozen=True)
class GgufMade:
    """What came of writing GGUF files.

    Args:
        out: the folder.
        plan: what was carried out, or would be.
        threads: how many were used, or would be.
        nbytes: of all files.
        hashes: SHA-256 by name of file, without the manifest; empty if nothing was written.
        exported: the file of an export, and the type of each tensor in it.
    """

    out: Path
    plan: GgufPlan
    threads: int
    nbytes: int
    hashes: Mapping[str, str] = field(default_factory=dict)
    exported: tuple[Path, Mapping[str, str]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        if self.exported is not None:
            return {"file": str(self.exported[0]), "tensors": dict(self.exported[1])}
        return {"out": str(self.out), "bytes": self.nbytes, "sha256": dict(self.hashes)}


def gguf(
    model: str | Path,
    out: str | Path,
    *,
    types: str | Sequence[str] = DEFAULT_TYPES,
    recipe: str | Path = "mix",
    imatrix: str | Path | None = None,
    tensor_type: Sequence[str] = (),
    tensor_type_file: Sequence[str | Path] = (),
    upstream_counters: bool = False,
    mmproj: bool = False,
    drop_mtp: bool = False,
    export: str | Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    memory: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> GgufMade:
    """Write GGUF files, all in one pass over the checkpoint; the folder appears whole.

    Args:
        model: folder or Hub id (``owner/name[@revision]``).
        out: folder to write.
        types: file types, as names or as one text with commas.
        recipe: ``mix``, ``q8-gates``, ``q8-gates-plus`` or a TOML file.
        imatrix: importance matrix: a file, or ``hf:owner/name/path``.
        tensor_type: ``PATTERN=TYPE`` for tensors whose name the pattern matches.
        tensor_type_file: files of such lines, as llama-quantize reads them.
        upstream_counters: let named tensors shift the mix of the others, as llama-quantize does.
        mmproj: write the vision tower too, as F16.
        drop_mtp: drop the MTP layer.
        export: write the types of the one quantized file asked for here, and nothing else.
        device: ``auto`` or ``cpu``, which are the same.
        threads: at most so many; all processors if None.
        memory: use fewer threads to stay below so many bytes.
        overwrite: replace an output of qwen35.
        dry_run: write nothing; the result says what would be.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: told of the bytes read.

    Raises:
        UsageError: something is unknown or does not fit, or llama-cpp-python is not installed.
        InputError: the model or the matrix cannot be read, or a weight holds NaN or infinity.
        OutputError: the output exists or overlaps the source, or the disk is full.
        HubError: the Hub refused, or was not reached.

    >>> planned = gguf("assets/qwen3.5-tiny", "out", types="Q8_0,Q4_K_M", dry_run=True)
    >>> [file.name for file in planned.plan.files]
    ['qwen3.5-tiny-Q8_0.gguf', 'qwen3.5-tiny-Q4_K_M.gguf']
    """
    from qwen35.gguf.imatrix import open_imatrix
    from qwen35.gguf.plan import Asked, make_plan
    from qwen35.gguf.rules import load_recipe, pattern_rules
    from qwen35.gguf.show import peak_memory
    from qwen35.sinks.staging import check_output

    if device not in ("auto", "cpu"):
        raise UsageError(f"--device {device}", "not for GGUF", expected="auto or cpu")
    out = Path(out)
    check_output(out, source=folder_of(str(model)), overwrite=overwrite)
    if dry_run or export is not None:
        checkpoint = describe(str(model), token=hf_token)
    else:
        checkpoint = fetch(str(model), token=hf_token, extra=("README.md",))
    asked = Asked(
        types=_types(types),
        recipe=load_recipe(str(recipe)),
        rules=pattern_rules(tensor_type, [Path(file) for file in tensor_type_file]),
        imatrix=None if imatrix is None else open_imatrix(str(imatrix), hf_token),
        projector="F16" if mmproj else None,
        drop_mtp=drop_mtp,
        upstream_counters=upstream_counters,
    )
    plan = make_plan(checkpoint, asked)
    threads = threads_within(lambda n: peak_memory(plan, n), threads, memory)
    if export is not None:
        path = Path(export)
        return GgufMade(out, plan, threads, 0, exported=(path, _export(plan, path)))
    if dry_run:
        return GgufMade(out, plan, threads, plan.nbytes)
    from qwen35.gguf.write import write

    result = write(plan, out, overwrite=overwrite, threads=threads, progress=progress)
    return GgufMade(result.out, plan, threads, result.nbytes, result.hashes)


def _types(given: str | Sequence[str]) -> tuple[str, ...]:
    from qwen35.gguf.types import FILE_TYPES

    rows = given.split(",") if isinstance(given, str) else given
    names = tuple(dict.fromkeys(name.strip().upper() for name in rows if name.strip()))
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown or not names:
        found = f"{unknown[0]!r} is unknown" if unknown else "empty"
        raise UsageError("--types", found, expected=", ".join(FILE_TYPES))
    return names


def _export(plan: GgufPlan, path: Path) -> Mapping[str, str]:
    """Write the types of the one quantized file as stock llama-quantize reads them."""
    from qwen35.gguf.rules import exported
    from qwen35.gguf.types import quantizable
    from qwen35.sinks.staging import os_errors

    files = [file for file in plan.files if file.file_type.quantized]
    if len(files) != 1:
        raise UsageError("--export", f"{len(files)} quantized types", expected="--types with one")
    tensors = files[0].tensors
    kinds = {t.name: files[0].kinds[t.name] for t in tensors if quantizable(t.name, t.shape)}
    text = "".join(f"{line}\n" for line in exported(kinds))
    with os_errors(path):
        path.write_text(text, "utf-8")
    return kinds
