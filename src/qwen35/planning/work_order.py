"""The work order: what a worker on another machine needs to rebuild a plan, as plain JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen35.checkpoint.adapter_files import Adapter, open_adapter
from qwen35.checkpoint.grafted import with_mtp_of
from qwen35.checkpoint.header import json_bytes
from qwen35.checkpoint.source import Checkpoint, open_folder
from qwen35.errors import InputError
from qwen35.model.roles import MTP
from qwen35.planning.container import ContainerInputs
from qwen35.planning.containers import container_from_manifest
from qwen35.planning.key_differences import key_differences
from qwen35.planning.manifest import work_key
from qwen35.planning.merged_source import with_adapters
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.sources import open_source

__all__ = [
    "SHARED",
    "different_here",
    "order_bytes",
    "order_of",
    "plan_again",
    "plan_from",
    "source_from",
    "source_order",
]

SHARED = "workers need the source and the output on a file system that all of them see"


def order_of(plan: Plan, task_bytes: int, **entries: Any) -> dict[str, Any]:
    """Return the work order of a plan: source, recipe and options, as in manifests.

    Args:
        plan: the plan to execute.
        task_bytes: the size of its tasks (`qwen35.planning.tasks`).
        entries: further entries, as plain values.

    Raises:
        InputError: the source has no local weights, or an input was not read from a file.
    """
    order = {
        **source_order(plan.checkpoint),
        **plan.container.request_json(plan, whole=True),
        "inputs": plan.options.inputs.to_json(),
        "task_bytes": task_bytes,
        "key": work_key(plan),
        **entries,
    }
    # Tuples become lists, as they will for the worker that reads the file.
    plain: dict[str, Any] = json.loads(json.dumps(order))
    return plain


def source_order(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `source_from` opens a checkpoint by, as plain values.

    Raises:
        InputError: it has no local weights.
    """
    return {
        "root": str(checkpoint.location().absolute()),
        "repo": checkpoint.repo,
        "revision": checkpoint.revision,
        **_adapters_json(checkpoint),
        **_donor_json(checkpoint.donor),
    }


def source_from(order: Mapping[str, Any]) -> Checkpoint:
    """Open the source of an order.

    Raises:
        InputError: it is not reachable from here.
    """
    base, donor = open_source(_root(order), **_origin(order)), order.get("mtp_from")
    if donor:
        base = with_mtp_of(base, open_folder(_root(donor), only=MTP, **_origin(donor)))
    return with_adapters(base, [_adapter(*row) for row in order.get("adapters", ())])


def _adapters_json(checkpoint: Checkpoint) -> dict[str, Any]:
    rows = [[str(a.root.absolute()), a.factor, a.onto] for a in checkpoint.adapters]
    return {"adapters": rows} if rows else {}


def _donor_json(donor: Checkpoint | None) -> dict[str, Any]:
    if donor is None:
        return {}
    root = str(donor.folder().absolute())
    return {"mtp_from": {"root": root, "repo": donor.repo, "revision": donor.revision}}


def _root(row: Mapping[str, Any]) -> Path:
    """Return where a checkpoint of an order is."""
    root = Path(row["root"])
    if not root.exists():
        raise InputError(str(root), f"not there on {platform.node()}", hint=SHARED)
    return root


def _origin(row: Mapping[str, Any]) -> dict[str, str]:
    return {"repo": row["repo"] or "", "revision": row["revision"] or ""}


def _adapter(root: str, factor: float, onto: str) -> Adapter:
    return replace(open_adapter(root, factor), onto=onto)


def order_bytes(order: Mapping[str, Any]) -> bytes:
    """Render an order as a file."""
    return json_bytes(order)


def plan_from(order: Mapping[str, Any]) -> Plan:
    """Rebuild the plan of an order from the headers of its source.

    Raises:
        InputError: the source is not reachable from here, or plan, source or tool versions differ
            here, so the bytes could differ.
    """
    plan = plan_again(source_from(order), order, ContainerInputs.of(order["inputs"]))
    key = json.loads(json.dumps(work_key(plan)))  # as the order went through JSON too
    if key != order["key"]:
        names = key_differences(order["key"], key)
        raise different_here(order, names)
    return plan


def different_here(order: Mapping[str, Any], names: Sequence[str]) -> InputError:
    """Return the error that this machine does not have what an order was written with.

    Args:
        order: the order.
        names: of what differs; the source, if none of what is named does.
    """
    return InputError(
        str(order["root"]),
        f"{platform.node()} has a different {', '.join(names or ['source'])}",
        expected="what the run started with",
        hint="use the same files and the same versions everywhere",
    )


def plan_again(checkpoint: Checkpoint, record: Mapping[str, Any], inputs: ContainerInputs) -> Plan:
    """Plan an output again, from its manifest or work order.

    Args:
        checkpoint: the source.
        record: the manifest or the order.
        inputs: the files beside the source that it was made from.

    Raises:
        InputError: the record is malformed, or names other files or another source.
        UsageError: an input file is missing, or the output used none.
    """
    container = container_from_manifest(record)
    return make_plan(checkpoint, *container.request_from_manifest(record, inputs))
