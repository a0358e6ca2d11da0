"""The work order: what a worker on another machine needs to make the same plan, as plain JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.source import Checkpoint, open_folder
from qwen35.errors import InputError
from qwen35.planning.container import ContainerInputs
from qwen35.planning.containers import container_told
from qwen35.planning.manifest import work_key
from qwen35.planning.output_plan import Plan, make_plan

__all__ = ["ORDER_NAME", "order_bytes", "order_of", "other_names", "plan_again", "plan_from"]

ORDER_NAME = "order"
"""Its file, in the work folder."""

SHARED = "workers need the source and the output on a file system that all of them see"


def order_of(plan: Plan, task_bytes: int, **more: Any) -> dict[str, Any]:
    """Return the work order of a plan: what was asked for, as manifests have it.

    Args:
        plan: to be executed.
        task_bytes: the size of its tasks (`qwen35.planning.tasks`).
        more: further plain values.

    Raises:
        InputError: the source has no weights at hand, or an input comes from no file.
    """
    checkpoint = plan.checkpoint
    order = {
        "root": str(checkpoint.folder().absolute()),
        "repo": checkpoint.repo,
        "revision": checkpoint.revision,
        **plan.container.asked_json(plan, whole=True),
        "inputs": plan.options.inputs.to_json(),
        "task_bytes": task_bytes,
        "key": work_key(plan),
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
    checkpoint = open_folder(root, repo=order["repo"] or "", revision=order["revision"] or "")
    plan = plan_again(checkpoint, order, ContainerInputs.of(order["inputs"]))
    key = json.loads(json.dumps(work_key(plan)))
    if key != order["key"]:
        raise InputError(
            str(root),
            f"{platform.node()} finds another {' and another '.join(other_names(order, key))}",
            expected="what the run was begun with",
            hint="use the same files and the same versions everywhere",
        )
    return plan


def plan_again(checkpoint: Checkpoint, asked: Mapping[str, Any], inputs: ContainerInputs) -> Plan:
    """Plan an output once more, from what a manifest or a work order says of it.

    Args:
        checkpoint: the source.
        asked: the manifest or the order.
        inputs: the files that it was made with, beside the source.

    Raises:
        InputError: it is malformed, or these are other files or another source.
        UsageError: a file is not given, or there was none.
    """
    return make_plan(checkpoint, *container_told(asked).asked_again(asked, inputs))


def other_names(order: Mapping[str, Any], key: Mapping[str, Any]) -> list[str]:
    """Return what of a run's key differs from that in an order: plan, source, tool version.

    Of the tools it says which, and both versions.
    """
    names = [name for name in key if order["key"].get(name) != key[name]]
    then, now = order["key"].get("tool version", {}), key.get("tool version", {})
    tools = [f"{n} ({then.get(n)}, here {now.get(n)})" for n in now if then.get(n) != now[n]]
    return [name for name in names if name != "tool version"] + tools
