"""Plan an output without writing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import listed, refuse_given, size_given
from qwen35.planning.merged_source import opened_adapters, opened_source
from qwen35.planning.mtp_choice import drops_mtp
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import adjusted_recipe
from qwen35.planning.refinement import Refinement
from qwen35.planning.sources import describe_source

if TYPE_CHECKING:
    from qwen35.planning.gguf_files.memory_fit import MemoryFit

__all__ = ["DEFAULT_CONTEXT", "plan", "types_that_fit"]

DEFAULT_CONTEXT = 32768
"""Tokens for which `types_that_fit` counts memory."""


_DESCRIBED = Refinement(described=True)
"""A plan says what rules ask for, with or without Hessians."""


@plain_arguments
def plan(
    model: str | Path,
    *,
    recipe: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    onto: str | None = None,
    mtp_from: str | Path | None = None,
    keep: str | Sequence[str] = (),
    mtp: str | None = None,
    drop_mtp: bool = False,
    keep_prefix: bool = False,
    keep_shards: bool = False,
    layout: str | None = None,
    activations: bool = False,
    types: str | Sequence[str] | None = None,
    imatrix: str | Path | None = None,
    tensor_type: str | Sequence[str] = (),
    tensor_type_file: str | Path | Sequence[str | Path] = (),
    upstream_counters: bool = False,
    mmproj: bool | str = False,
    mtp_type: str | None = None,
    split_max_size: int | str | None = None,
    hf_token: str | None = None,
) -> Plan:
    """Describe what `convert` or, with types, `gguf` would write, to the byte, from headers alone.

    Args:
        model: folder, GGUF file, Hub id (``owner/name[@revision]``) or a published size.
        recipe: a built-in recipe or a TOML file; ``nf4``, or ``mix`` with types, if None.
        adapter: LoRA adapters of peft to merge: folders, as ``DIR`` or ``DIR=WEIGHT``.
        onto: merge them into the weights as this format holds them, such as ``nf4``.
        mtp_from: as for `convert`.
        keep: additional roles, or groups of them, to leave unquantized.
        mtp: ``keep`` (if None), ``drop`` or, for GGUF, ``separate``.
        drop_mtp: short for ``mtp="drop"``.
        keep_prefix: text-only: leave tensors under ``model.language_model.``.
        keep_shards: write the source's files, by name, instead of files of 5 GB.
        layout: as for `convert`.
        activations: as for `convert`; the plan needs no statistics.
        types: GGUF: file types, as names or as a comma-separated string.
        imatrix: GGUF: importance matrix, as for `gguf`.
        tensor_type: GGUF: ``PATTERN=TYPE``, for tensors whose name matches the pattern.
        tensor_type_file: GGUF: files of such lines.
        upstream_counters: GGUF: let named tensors shift the mix, as llama-quantize does.
        mmproj: GGUF: include the vision tower, as for `gguf`.
        mtp_type: GGUF: as for `gguf`.
        split_max_size: GGUF: split models with more bytes of tensors into several files.
        hf_token: for the Hub; by default HF_TOKEN.

    Raises:
        UsageError: a recipe or role does not exist or does not fit.
        InputError: the model is not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused a request or could not be reached.

    >>> described = plan("Qwen3.5-0.8B", recipe="text-nf4", keep=["self_attn"])
    >>> described.recipe.format, len(described.files)
    ('nf4', 1)
    >>> next(step.reason for step in described.steps if step.role.name == "self_attn.q_proj")
    'asked for by --keep'
    """
    for_gguf = {
        "--imatrix": imatrix,
        "--tensor-type": tensor_type,
        "--tensor-type-file": tensor_type_file,
        "--upstream-counters": upstream_counters,
        "--mmproj": mmproj,
        "--mtp-type": mtp_type,
        "--split-max-size": split_max_size is not None,
    }
    for_others = {
        "--keep": keep,
        "--keep-prefix": keep_prefix,
        "--keep-shards": keep_shards,
        "--layout": layout,
        "--activations": activations,
    }
    if types is None:
        refuse_given(for_gguf, "has no effect without --types", "add --types, or leave it out")
    else:
        refuse_given(for_others, "has no effect with --types")
    adapters = opened_adapters(listed(adapter), onto)
    checkpoint = opened_source(model, adapters, mtp_from, headers=True, token=hf_token)
    if types is None:
        rules = adjusted_recipe(
            str(recipe or "nf4"),
            keep=listed(keep),
            layout=layout,
            quantized_inputs=activations,
            drop_mtp=drops_mtp(mtp, drop=drop_mtp),
        )
        return make_plan(
            checkpoint,
            rules,
            keep_prefix=keep_prefix,
            keep_shards=keep_shards,
            refinement=_DESCRIBED,
            described=True,
        )
    # imported late: most plans need none of the GGUF modules
    from qwen35.api.gguf_api import gguf_plan, gguf_recipe

    rules = gguf_recipe(types, recipe or "mix", listed(tensor_type), listed(tensor_type_file))
    return gguf_plan(
        checkpoint,
        rules,
        types,
        imatrix=imatrix,
        upstream_counters=upstream_counters,
        mmproj=mmproj,
        mtp=mtp,
        mtp_type=mtp_type,
        drop_mtp=drop_mtp,
        split_max_size=size_given("--split-max-size", split_max_size),
        refinement=_DESCRIBED,
        token=hf_token,
    )


@plain_arguments
def types_that_fit(
    model: str | Path,
    fit: int | str,
    *,
    context: int = DEFAULT_CONTEXT,
    recipe: str | Path | None = None,
    imatrix: str | Path | None = None,
    tensor_type: str | Sequence[str] = (),
    tensor_type_file: str | Path | Sequence[str | Path] = (),
    upstream_counters: bool = False,
    mmproj: bool | str = False,
    mtp: str | None = None,
    drop_mtp: bool = False,
    hf_token: str | None = None,
) -> MemoryFit:
    """Return the GGUF file types that fit `fit` bytes with a context, from headers alone.

    Args:
        model: folder, Hub id (``owner/name[@revision]``) or a published size.
        fit: bytes of memory, or ``6GB``.
        context: tokens, from 1.
        recipe: as for `gguf`, as are the others.
        imatrix: importance matrix.
        tensor_type: types by name.
        tensor_type_file: files of them.
        upstream_counters: count layers as llama-quantize does.
        mmproj: include the vision tower, as for `gguf`.
        mtp: ``keep`` (if None) or ``drop``; a file of its own does not count.
        drop_mtp: short for ``mtp="drop"``.
        hf_token: for the Hub; by default HF_TOKEN.

    Raises:
        UsageError: no type fits, or an argument does not fit the model.
        InputError: the model or the matrix cannot be read.
        HubError: the Hub refused a request or could not be reached.

    >>> found = types_that_fit("Qwen3.5-9B", 6 * 10**9)
    >>> found.types[0].type, found.kv_cache
    ('Q3_K_M', 1073741824)
    """
    from qwen35.api.gguf_api import gguf_plan, gguf_recipe
    from qwen35.planning.gguf_files.memory_fit import MEASURED, memory_fit

    planned = gguf_plan(
        describe_source(str(model), token=hf_token),
        gguf_recipe(MEASURED, recipe or "mix", listed(tensor_type), listed(tensor_type_file)),
        MEASURED,
        imatrix=imatrix,
        upstream_counters=upstream_counters,
        mmproj=mmproj,
        mtp=mtp,
        mtp_type=None,
        drop_mtp=drop_mtp,
        split_max_size=None,
        refinement=_DESCRIBED,
        token=hf_token,
    )
    return memory_fit(planned, size_given("--fit", fit) or 0, context)
