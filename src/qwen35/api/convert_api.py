"""Write a quantized or text-only checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.code_options import refinement_of
from qwen35.api.fp8_options import (
    DEFAULTS,
    Bands,
    KvCache,
    activations_of,
    check_fp8_output,
    check_unused,
    scale_choice_of,
)
from qwen35.api.given_values import listed, size_given
from qwen35.api.text_hessians import text_hessians
from qwen35.api.worker_choice import check_workers
from qwen35.api.write_result import WriteOptions, WriteResult, carry_out, fitting_threads
from qwen35.checkpoint.open import folder_of
from qwen35.codecs.fp8.layout import ScaleMode
from qwen35.errors import UsageError
from qwen35.planning.merged_source import opened_adapters, opened_source
from qwen35.planning.mtp_choice import drops_mtp
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import adjusted_recipe
from qwen35.progress import Progress

__all__ = ["convert"]


@plain_arguments
def convert(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "nf4",
    adapter: str | Path | Sequence[str | Path] = (),
    onto: str | None = None,
    keep: str | Sequence[str] = (),
    mtp: str | None = None,
    drop_mtp: bool = False,
    mtp_from: str | Path | None = None,
    keep_prefix: bool = False,
    keep_shards: bool = False,
    layout: str | None = None,
    activations: bool = False,
    kv_cache: KvCache | None = None,
    calib_mode: ScaleMode | None = None,
    rms_factor: float = DEFAULTS.rms_factor,
    calib_percentile: float = DEFAULTS.percentile,
    mse_grid_size: int = DEFAULTS.grid_size,
    activation_stats: str | Path | None = None,
    codes: str | None = None,
    hessian: str | Path | None = None,
    calibration: str | Path | Sequence[str | Path] = (),
    verify_samples: int | None = None,
    verify_seed: int = 0,
    skip_verify: bool = False,
    bands: Bands | None = None,
    device: str = "auto",
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
    """Write the output that `plan` describes; the folder appears complete or not at all.

    Args:
        model: folder, GGUF file, Hub id (``owner/name[@revision]``) or ``hf:owner/name/path``.
        out: folder to write.
        recipe: a built-in recipe or a TOML file.
        adapter: LoRA adapters of peft to merge: folders, as ``DIR`` or ``DIR=WEIGHT``.
        onto: merge them into the weights as this format holds them, such as ``nf4``.
        keep: additional roles, or groups of them, to leave unquantized.
        mtp: ``keep`` (if None) or ``drop``, the MTP layer.
        drop_mtp: short for ``mtp="drop"``.
        mtp_from: take the MTP layer of this checkpoint, the original of a model saved without it.
        keep_prefix: text-only: leave tensors under ``model.language_model.``.
        keep_shards: write the source's files, by name, instead of files of 5 GB.
        layout: the tool whose tensors and config.json to write: ``compressed-tensors``,
            ``modelopt`` (NVFP4, FP8) or ``gptq`` (INT4); the recipe's own if None.
        activations: NVFP4: quantize the inputs of layers too (W4A4), with scales from
            `activation_stats`.
        kv_cache: ``fp8``: also write scales for a KV cache in FP8, from the largest keys and
            values in `activation_stats`; the layouts of GPTQ and block FP8 have no place for them.
        calib_mode: how to choose a scale. Block FP8: ``max``, ``rms``, ``percentile``, ``mse`` or
            ``search`` (if None), by the formulas of `qwen35.codecs.fp8.layout.ScaleChoice`. NVFP4
            and INT4: ``max`` or ``search``. FP8 per channel has no choice.
        rms_factor: block FP8, mode ``rms``: peak-to-RMS factor.
        calib_percentile: block FP8, mode ``percentile``: larger magnitudes saturate.
        mse_grid_size: block FP8, mode ``mse``: number of scales to try.
        activation_stats: JSON of statistics of inputs, from `calibrate`. They weigh the columns of
            weights in the modes ``rms``, ``mse`` and ``search``, and are required for
            `activations`, `kv_cache` and ModelOpt's FP8.
        codes: ``plain`` (if None), or ``refined``: chosen by what they do to a layer's outputs, at
            the same size; or ``refined+scales``, which also searches NF4's scales; a recipe's rules
            may say it too.
        hessian: for refined codes, the folder of `calibrate` with Hessians.
        calibration: plain text files: make Hessians from them first, for this output alone.
        verify_samples: block FP8: number of weights to check in each file; all if None.
        verify_seed: seed of the sample.
        skip_verify: block FP8: do not check the output.
        bands: block FP8: limits of the check: ``derived`` from the format (if None), or
            ``documented`` absolute ones.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or a list of GPUs; ``auto`` is the CPU.
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
        UsageError: an argument is unknown or does not fit the others.
        InputError: the model cannot be read, or a weight holds NaN or infinity.
        OutputError: the output exists or overlaps the source, or the disk is full.
        WorkerError: a task's workers died at every attempt.
        HubError: the Hub refused a request or could not be reached.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     result = convert("assets/qwen3.5-tiny", f"{folder}/out", recipe="text-nf4", threads=1)
    ...     sorted(path.name for path in result.out.iterdir())[:3]
    ['chat_template.jinja', 'config.json', 'generation_config.json']
    >>> result.passed, len(result.hashes["config.json"])
    (True, 64)
    """
    from qwen35.writing.write import check_before

    out = Path(out)
    memory = size_given("--memory", memory)
    check_workers(workers, ray_address, slice, memory)
    local_device = "cpu" if ray_address else device  # the cluster's nodes have their own GPUs
    scale_choice = scale_choice_of(calib_mode, rms_factor, calib_percentile, mse_grid_size)
    rules = adjusted_recipe(
        str(recipe),
        keep=listed(keep),
        layout=layout,
        quantized_inputs=activations,
        drop_mtp=drops_mtp(mtp, drop=drop_mtp),
    )
    check_before(
        out,
        overwrite=overwrite,
        device=local_device,
        source=folder_of(str(model)),
        donor=folder_of(mtp_from),
        files=[activation_stats, hessian, *listed(calibration)],
    )
    needed = rules.quantizes_inputs or kv_cache is not None
    statistics = activations_of(activation_stats, scale_choice, needed=needed)
    adapters = opened_adapters(listed(adapter), onto)
    checkpoint = opened_source(
        model,
        adapters,
        mtp_from,
        headers=dry_run,
        token=hf_token,
        extra=rules.container.extra,
    )
    text = text_hessians(
        calibration,
        checkpoint,
        rules,
        out,
        codes,
        memory,
        instead=hessian is not None,
        alone=workers is not None or slice is not None or ray_address is not None,
    )
    planned = partial(
        make_plan,
        checkpoint,
        rules,
        keep_prefix=keep_prefix,
        keep_shards=keep_shards,
        kv_cache=kv_cache,
        scale_choice=scale_choice,
        activations=statistics,
    )
    plan = planned(refinement=refinement_of(codes, hessian, text))
    check_unused(plan, bands=bands, samples=verify_samples, seed=verify_seed, skip=skip_verify)
    if slice is not None and verify_samples is not None:
        found = "slices check everything they write"
        raise UsageError("--verify-samples", found, hint="leave it out, or give --skip-verify")
    checked = plan.banded and not skip_verify
    options = WriteOptions(
        device,
        workers,
        ray_address,
        slice,
        threads,
        memory,
        overwrite,
        check=checked and verify_samples is None,
        held=text.held_bytes if text else 0,
    )
    if dry_run:
        threads = fitting_threads(plan, options)
        before = text.notes(plan, threads) if text else ()
        return WriteResult(out, plan, threads, plan.total_bytes, before=before)
    passing = text.run_for(lambda made: planned(refinement=made), threads, device) if text else None
    result = carry_out(plan, out, options, progress, passing)
    if not checked or slice is not None:
        return result
    report = check_fp8_output(
        result, bands=bands, samples=verify_samples, seed=verify_seed, progress=progress
    )
    return replace(result, report=report)
