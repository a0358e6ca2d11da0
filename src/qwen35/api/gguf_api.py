"""Write GGUF files for llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.code_options import refinement_of
from qwen35.api.given_values import listed, refuse_given, size_given
from qwen35.api.text_hessians import text_hessians
from qwen35.api.worker_choice import check_workers
from qwen35.api.write_result import WriteOptions, WriteResult, carry_out, fitting_threads
from qwen35.checkpoint.open import folder_of
from qwen35.checkpoint.source import Checkpoint, is_published
from qwen35.errors import UsageError, unknown_name
from qwen35.planning.merged_source import opened_adapters, opened_source
from qwen35.planning.mtp_choice import mtp_choice
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.refinement import NEAREST, Refinement
from qwen35.planning.rules import Recipe
from qwen35.progress import Progress

__all__ = ["DEFAULT_TYPES", "gguf", "gguf_plan", "gguf_recipe", "types_of"]

DEFAULT_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
ADAPTER_TYPES = ("F32",)
"""The type of an adapter's own file: that of llama.cpp's converter of adapters."""


@plain_arguments
def gguf(
    model: str | Path,
    out: str | Path,
    *,
    types: str | Sequence[str] | None = None,
    recipe: str | Path = "mix",
    adapter: str | Path | Sequence[str | Path] = (),
    onto: str | None = None,
    adapter_only: bool = False,
    imatrix: str | Path | None = None,
    codes: str | None = None,
    hessian: str | Path | None = None,
    calibration: str | Path | Sequence[str | Path] = (),
    tensor_type: str | Sequence[str] = (),
    tensor_type_file: str | Path | Sequence[str | Path] = (),
    upstream_counters: bool = False,
    mmproj: bool | str = False,
    mtp: str | None = None,
    mtp_type: str | None = None,
    drop_mtp: bool = False,
    mtp_from: str | Path | None = None,
    split_max_size: int | str | None = None,
    export: str | Path | None = None,
    device: str = "auto",
    encoder: str = "auto",
    workers: int | None = None,
    ray_address: str | None = None,
    slice: tuple[int, int] | None = None,  # noqa: A002 - the flag's name
    threads: int | None = None,
    memory: int | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> WriteResult:
    """Write GGUF files in one pass over the checkpoint; the folder appears complete or not at all.

    Args:
        model: folder, GGUF file, Hub id (``owner/name[@revision]``) or ``hf:owner/name/path``.
        out: folder to write.
        types: file types, as names or as a comma-separated string; `DEFAULT_TYPES` if None, or F32
            for an adapter alone.
        recipe: ``mix``, ``q8-gates``, ``q8-gates-plus`` or a TOML file.
        adapter: LoRA adapters of peft to merge: folders, as ``DIR`` or ``DIR=WEIGHT``.
        onto: merge them into the weights as this format holds them, such as ``nf4``.
        adapter_only: write the one adapter itself, for llama.cpp's ``--lora``, not the model.
        imatrix: importance matrix: a file, the folder of `calibrate`, or ``hf:owner/name/path``.
        codes: ``plain`` (if None), or ``refined``: chosen by what they do to a layer's outputs, at
            the same size; or ``refined+scales``, which also searches NF4's scales; a recipe's rules
            may say it too.
        hessian: for refined codes, the folder of `calibrate` with Hessians.
        calibration: plain text files: make Hessians from them first, for this output alone.
        tensor_type: ``PATTERN=TYPE``, for tensors whose name matches the pattern.
        tensor_type_file: files of such lines, as llama-quantize reads them.
        upstream_counters: let named tensors shift the mix of the others, as llama-quantize does.
        mmproj: also write the vision tower, as F16, or as F32, BF16 or Q8_0 if it says so.
        mtp: ``keep`` (if None), ``drop``, or ``separate``: in a file of its own, ``mtp-*.gguf``.
        mtp_type: type of that file: F32, F16, BF16, Q8_0 (if None) or Q4_0.
        drop_mtp: short for ``mtp="drop"``.
        mtp_from: take the MTP layer of this checkpoint, the original of a model saved without it.
        split_max_size: split models with more bytes of tensors into several files, as
            llama-gguf-split does.
        export: only write the types of the one quantized file to this path.
        device: where refined codes are chosen, as for `convert`; the CPU encodes.
        encoder: ``auto``, or ``ggml`` to let llama-cpp-python encode every type, with equal bytes.
        workers: number of processes, each with `threads` threads.
        ray_address: use this Ray cluster: ``auto`` or ``HOST:PORT``.
        slice: write one part, ``(i, N)``; then run `finalize`.
        threads: number of threads; all processors if None.
        memory: use fewer threads to stay below this many bytes, or ``4GB``.
        overwrite: replace an output of qwen35.
        dry_run: write nothing; the result holds the plan.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives bytes read.

    Raises:
        UsageError: an argument is unknown or does not fit the others, or a type needs
            llama-cpp-python, which is not installed.
        InputError: the model or the matrix cannot be read, or a weight holds NaN or infinity.
        OutputError: the output exists or overlaps the source, or the disk is full.
        WorkerError: a task's workers died at every attempt.
        HubError: the Hub refused a request or could not be reached.

    >>> planned = gguf("assets/qwen3.5-tiny", "out", types="Q8_0,Q4_K_M", dry_run=True)
    >>> [file.name for file in planned.plan.files]
    ['qwen3.5-tiny-Q8_0.gguf', 'qwen3.5-tiny-Q4_K_M.gguf']
    """
    from qwen35.codecs.ggml.quantizers import ENCODERS
    from qwen35.writing.write import check_before

    if encoder not in ENCODERS:
        raise unknown_name("--encoder", encoder, ENCODERS)
    if device.startswith("cuda") and not (hessian or calibration):
        hint = (
            "leave it out: on GPUs only refined codes are chosen, with --hessian or --calibration"
        )
        raise UsageError(f"--device {device}", "plain codes are encoded by the CPU", hint=hint)
    memory = size_given("--memory", memory)
    split_max_size = size_given("--split-max-size", split_max_size)
    check_workers(workers, ray_address, slice, memory)
    out = Path(out)
    types = (ADAPTER_TYPES if adapter_only else DEFAULT_TYPES) if types is None else types
    if adapter_only:
        given = {
            "--onto": onto is not None,
            "--tensor-type": tensor_type,
            "--tensor-type-file": tensor_type_file,
            "--imatrix": imatrix is not None,
            "--codes": codes is not None,
            "--hessian": hessian is not None,
            "--calibration": calibration,
            "--upstream-counters": upstream_counters,
            "--mmproj": mmproj,
            "--mtp": mtp is not None,
            "--mtp-type": mtp_type is not None,
            "--drop-mtp": drop_mtp,
            "--mtp-from": mtp_from is not None,
            "--split-max-size": split_max_size is not None,
            "--export": export is not None,
        }
        check_adapter_only(given, types_of(types), str(recipe))
    rules = gguf_recipe(types, recipe, listed(tensor_type), listed(tensor_type_file))
    donor = folder_of(mtp_from)
    source = folder_of(str(model))
    files = [imatrix, hessian, *listed(calibration)]
    local_device = "cpu" if ray_address else device  # the cluster's nodes have their own GPUs
    check_before(
        out, overwrite=overwrite, device=local_device, source=source, donor=donor, files=files
    )
    unread = adapter_only and not is_published(str(model))  # of the base, only headers are
    checkpoint = opened_source(
        model,
        opened_adapters(listed(adapter), onto),
        mtp_from,
        headers=dry_run or export is not None or unread,
        token=hf_token,
        extra=rules.container.extra,
    )
    text = text_hessians(
        calibration if export is None else (),
        checkpoint,
        rules,
        out,
        codes,
        memory,
        instead=hessian is not None,
        alone=workers is not None or slice is not None or ray_address is not None,
    )
    planned = partial(
        gguf_plan,
        checkpoint,
        rules,
        types,
        adapter_only=adapter_only,
        imatrix=imatrix,
        upstream_counters=upstream_counters,
        mmproj=mmproj,
        mtp=mtp,
        mtp_type=mtp_type,
        drop_mtp=drop_mtp,
        split_max_size=split_max_size if export is None else None,  # types do not depend on it
        encoder=encoder,
        token=hf_token,
    )
    plan = planned(refinement=refinement_of(codes, hessian, text))
    held = text.held_bytes if text else 0
    options = WriteOptions(
        device, workers, ray_address, slice, threads, memory, overwrite, held=held
    )
    if export is not None:
        path = Path(export)
        return WriteResult(
            out, plan, fitting_threads(plan, options), 0, exported=(path, _export(plan, path))
        )
    if dry_run:
        threads = fitting_threads(plan, options)
        before = text.notes(plan, threads) if text else ()
        return WriteResult(out, plan, threads, plan.total_bytes, before=before)
    passing = text.run_for(lambda made: planned(refinement=made), threads, device) if text else None
    return carry_out(plan, out, options, progress, passing)


def gguf_recipe(
    types: str | Sequence[str],
    recipe: str | Path,
    tensor_type: Sequence[str],
    tensor_type_file: Sequence[str | Path],
) -> Recipe:
    """Return the recipe, preceded by the rules of `tensor_type`; arguments as for `gguf`."""
    from qwen35.planning.gguf_files.type_patterns import pattern_rules

    types_of(types)
    patterns = pattern_rules(tensor_type, [Path(file) for file in tensor_type_file])
    return load_recipe(str(recipe), "gguf").preceded(patterns)


def check_adapter_only(given: Mapping[str, object], types: Sequence[str], recipe: str) -> None:
    """Refuse what has no effect on the file of an adapter.

    Args:
        given: other options, by flag; false if not set.
        types: the file types.
        recipe: as the user gave it.

    Raises:
        UsageError: something is set.
    """
    from qwen35.planning.gguf_files.mixes import converted_type

    refuse_given({**given, "--recipe": recipe != "mix"}, "has no effect with --adapter-only")
    for name in types:
        converted_type(name, "--types, with --adapter-only")


def gguf_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    types: str | Sequence[str],
    *,
    adapter_only: bool = False,
    imatrix: str | Path | None,
    refinement: Refinement = NEAREST,
    upstream_counters: bool,
    mmproj: bool | str,
    mtp: str | None,
    mtp_type: str | None,
    drop_mtp: bool,
    split_max_size: int | None,
    encoder: str = "auto",
    token: str | None,
) -> Plan:
    """Plan GGUF files; arguments and errors as for `gguf`."""
    from qwen35.planning.gguf_files.gguf_options import mtp_type_of, projector_type
    from qwen35.planning.gguf_files.imatrix import open_imatrix

    choice = mtp_choice(mtp, drop=drop_mtp)
    if split_max_size is not None and split_max_size < 1:
        raise UsageError("--split-max-size", str(split_max_size), expected="a size such as 2G")
    return make_plan(
        checkpoint,
        recipe,
        types=types_of(types),
        imatrix=None if imatrix is None else open_imatrix(str(imatrix), token),
        refinement=refinement,
        projector=projector_type(mmproj),
        drop_mtp=choice == "drop",
        mtp_file=mtp_type_of(choice, mtp_type),
        upstream_counters=upstream_counters,
        split_max_size=split_max_size,
        adapter_only=adapter_only,
        encoder=encoder,
    )


def types_of(types: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of file types.

    Raises:
        UsageError: one is unknown, or there is none.
    """
    from qwen35.planning.gguf_files.mixes import FILE_TYPES, type_names

    names = type_names(types)
    unknown = [name for name in names if name not in FILE_TYPES]
    if not names:
        raise UsageError("--types", "empty", expected=", ".join(FILE_TYPES))
    if unknown:
        raise unknown_name("--types", unknown[0], FILE_TYPES)
    return names


def _export(plan: Plan, path: Path) -> Mapping[str, str]:
    """Write the types of the one quantized file in the format of stock llama-quantize."""
    from qwen35.planning.gguf_files.gguf_plan import files_of
    from qwen35.planning.gguf_files.mixes import quantizable
    from qwen35.planning.gguf_files.type_patterns import exported
    from qwen35.sinks.files import replace_file
    from qwen35.sinks.staging import os_errors

    files = [file for file in files_of(plan) if file.quantized]
    if len(files) != 1:
        raise UsageError("--export", f"{len(files)} quantized types", expected="--types with one")
    tensors = files[0].tensors
    kinds = {t.name: files[0].kinds[t.name] for t in tensors if quantizable(t.name, t.shape)}
    text = "".join(f"{line}\n" for line in exported(kinds))
    with os_errors(path):
        replace_file(path, text.encode())
    return kinds
