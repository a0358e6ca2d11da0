"""The work order: what a worker on another machine needs to make the same plan, as plain JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35.checkpoint.source import open_folder
from qwen35.errors import InputError
from qwen35.plan.activations import load_activations
from qwen35.plan.documents import json_bytes
from qwen35.plan.manifest import calibration_json, calibration_of, recipe_json, recipe_of, work_key
from qwen35.plan.plan import Plan, make_plan

__all__ = ["ORDER_NAME", "order_bytes", "order_of", "other_names", "plan_from"]

ORDER_NAME = "order"
"""Its file, in the work folder."""

SHARED = "workers need the source and the output on a file system that all of them see"


def order_of(plan: Plan, task_bytes: int, **more: Any) -> dict[str, Any]:
    """Return the work order of a plan: the recipe and calibration as manifests have them.

    Args:
        plan: to be executed.
        task_bytes: the size of its tasks (`qwen35.plan.tasks`).
        more: further plain values.

    Raises:
        InputError: the source has no weights at hand, or the statistics come from no file.
    """
    statistics = plan.activations
    if statistics is not None and statistics.path is None:
        raise InputError(statistics.name, "workers cannot read it", expected="a file")
    checkpoint = plan.checkpoint
    order = {
        "root": str(checkpoint.folder().absolute()),
        "repo": checkpoint.repo,
        "revision": checkpoint.revision,
        "recipe": recipe_json(plan.recipe),
        "calibration": calibration_json(plan),
        "statistics": str(statistics.path.absolute()) if statistics and statistics.path else None,
        "keep_prefix": plan.keep_prefix,
        "shard_bytes": plan.shard_bytes,
        "task_bytes": task_bytes,
        "key": work_key(plan.digest, checkpoint),
        **more,
    }
    plain: dict[str, Any] = json.loads(json.dumps(order))
    return plain


def order_bytes(order: Mapping[str, Any]) -> bytes:
    """Render an order as a file."""
    return json_bytes(order)


def plan_from(order: Mapping[str, Any]) -> Plan:
    """Make the plan of an order anew, from the headers of its source.

    Raises:
        InputError: the source is not seen from here, or the plan, the source or the versions of
            the tools are others here, so that other bytes could come out.
    """
    root = Path(order["root"])
    if not root.is_dir():
        raise InputError(str(root), f"not there on {platform.node()}", hint=SHARED)
    calibration, _ = calibration_of(order)
    statistics = order["statistics"]
    plan = make_plan(
        open_folder(root, repo=order["repo"] or "", revision=order["revision"] or ""),
        recipe_of(order),
        keep_prefix=order["keep_prefix"],
        calibration=calibration,
        activations=load_activations(Path(statistics)) if statistics else None,
        shard_bytes=order["shard_bytes"],
    )
    key = json.loads(json.dumps(work_key(plan.digest, plan.checkpoint)))
    if key != order["key"]:
        raise InputError(
            str(root),
            f"{platform.node()} finds another {' and another '.join(other_names(order, key))}",
            expected="what the run was begun with",
            hint="use the same files and the same versions everywhere",
        )
    return plan


def other_names(order: Mapping[str, Any], key: Mapping[str, Any]) -> list[str]:
    """Return what of a run's key differs from that in an order: plan, source, tool version.

    Of the tools it says which, and both versions.
    """
    names = [name for name in key if order["key"].get(name) != key[name]]
    then, now = order["key"].get("tool version", {}), key.get("tool version", {})
    tools = [f"{n} ({then.get(n)}, here {now.get(n)})" for n in now if then.get(n) != now[n]]
    return [name for name in names if name != "tool version"] + tools
