"""What a conversion would write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen35.checkpoint.open import describe
from qwen35.checkpoint.source import Checkpoint
from qwen35.codecs.fp8 import Calibration
from qwen35.plan.activations import Activations
from qwen35.plan.plan import Plan, make_plan
from qwen35.plan.recipe import load_recipe

__all__ = ["plan", "plan_of"]


def plan(
    model: str | Path,
    *,
    recipe: str | Path = "nf4",
    keep: Sequence[str] = (),
    drop_mtp: bool = False,
    keep_prefix: bool = False,
    hf_token: str | None = None,
) -> Plan:
    """Describe what `convert` would write, to the byte, from headers alone.

    Args:
        model: folder, Hub id (``owner/name[@revision]``) or a published size.
        recipe: a built-in recipe or a TOML file.
        keep: roles, or groups of them, that stay unquantized as well.
        drop_mtp: drop the MTP layer.
        keep_prefix: text-only: leave tensors under ``model.language_model.``.
        hf_token: for the Hub; by default HF_TOKEN.

    Raises:
        UsageError: no such recipe or role, or one that does not fit.
        InputError: the model is not a readable Qwen3.5 checkpoint.
        HubError: the Hub refused, or was not reached.

    >>> described = plan("Qwen3.5-0.8B", recipe="text-nf4", keep=["self_attn"])
    >>> described.recipe.format, len(described.files)
    ('nf4', 1)
    >>> next(step.reason for step in described.steps if step.role.name == "self_attn.q_proj")
    'asked for by --keep'
    """
    checkpoint = describe(str(model), token=hf_token)
    return plan_of(checkpoint, recipe, keep, drop_mtp=drop_mtp, keep_prefix=keep_prefix)


def plan_of(
    checkpoint: Checkpoint,
    recipe: str | Path,
    keep: Sequence[str],
    *,
    drop_mtp: bool,
    keep_prefix: bool,
    calibration: Calibration | None = None,
    activations: Activations | None = None,
) -> Plan:
    """Plan a checkpoint by a recipe and what adjusts it; arguments and errors as for `plan`."""
    chosen = load_recipe(str(recipe)).keeping(tuple(keep))
    return make_plan(
        checkpoint,
        chosen.dropping_mtp() if drop_mtp else chosen,
        keep_prefix=keep_prefix,
        calibration=calibration,
        activations=activations,
    )
