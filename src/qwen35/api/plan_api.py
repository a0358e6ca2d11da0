"""Plan an output without writing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen35.checkpoint.open import describe
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.fp8.layout import ScaleChoice
from qwen35.errors import UsageError
from qwen35.planning.activations import Activations
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe

__all__ = ["plan", "plan_of"]


def plan(
    model: str | Path,
    *,
    recipe: str | Path | None = None,
    keep: Sequence[str] = (),
    drop_mtp: bool = False,
    keep_prefix: bool = False,
    keep_shards: bool = False,
    layout: str | None = None,
    types: str | Sequence[str] | None = None,
    imatrix: str | Path | None = None,
    tensor_type: Sequence[str] = (),
    tensor_type_file: Sequence[str | Path] = (),
    upstream_counters: bool = False,
    mmproj: bool = False,
    hf_token: str | None = None,
) -> Plan:
    """Describe what `convert` or, with types, `gguf` would write, to the byte, from headers alone.

    Args:
        model: folder, Hub id (``owner/name[@revision]``) or a published size.
        recipe: a built-in recipe or a TOML file; ``nf4``, or ``mix`` with types, if None.
        keep: additional roles, or groups of them, to leave unquantized.
        drop_mtp: drop the MTP layer.
        keep_prefix: text-only: leave tensors under ``model.language_model.``.
        keep_shards: write the source's files, by name, instead of files of 5 GB.
        layout: as for `convert`.
        types: GGUF: file types, as names or as a comma-separated string.
        imatrix: GGUF: importance matrix, a file or ``hf:owner/name/path``.
        tensor_type: GGUF: ``PATTERN=TYPE``, for tensors whose name matches the pattern.
        tensor_type_file: GGUF: files of such lines.
        upstream_counters: GGUF: let named tensors shift the mix, as llama-quantize does.
        mmproj: GGUF: include the vision tower.
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
    }
    for_others = {
        "--keep": keep,
        "--keep-prefix": keep_prefix,
        "--keep-shards": keep_shards,
        "--layout": layout,
    }
    for flag, value in (for_gguf if types is None else for_others).items():
        if value:
            found = f"has no effect with{'out' if types is None else ''} --types"
            hint = "add --types, or leave it out" if types is None else "leave it out"
            raise UsageError(flag, found, hint=hint)
    if types is None:
        checkpoint = describe(str(model), token=hf_token)
        name = recipe or "nf4"
        return plan_of(
            checkpoint,
            name,
            keep,
            drop_mtp=drop_mtp,
            keep_prefix=keep_prefix,
            keep_shards=keep_shards,
            layout=layout,
        )
    # imported late: most plans need none of the GGUF modules
    from qwen35.api.gguf_api import gguf_plan, gguf_recipe

    rules = gguf_recipe(types, recipe or "mix", tensor_type, tensor_type_file)
    return gguf_plan(
        describe(str(model), token=hf_token),
        rules,
        types,
        imatrix=imatrix,
        upstream_counters=upstream_counters,
        mmproj=mmproj,
        drop_mtp=drop_mtp,
        token=hf_token,
    )


def plan_of(
    checkpoint: Checkpoint,
    recipe: str | Path,
    keep: Sequence[str],
    *,
    drop_mtp: bool,
    keep_prefix: bool,
    keep_shards: bool,
    layout: str | None = None,
    quantized_inputs: bool = False,
    scale_choice: ScaleChoice | None = None,
    activations: Activations | None = None,
) -> Plan:
    """Plan a checkpoint by a recipe and its adjustments; arguments and errors as for `plan`."""
    adjusted = load_recipe(str(recipe)).keeping(tuple(keep)).laid_out(layout)
    if quantized_inputs:
        adjusted = adjusted.quantizing_inputs()
    return make_plan(
        checkpoint,
        adjusted.dropping_mtp() if drop_mtp else adjusted,
        keep_prefix=keep_prefix,
        keep_shards=keep_shards,
        scale_choice=scale_choice,
        activations=activations,
    )
