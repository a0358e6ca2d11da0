"""The memory that a plan says it needs, and the threads that fit into it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from plans import published_plan
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.errors import UsageError
from qwen35.model.roles import role_of
from qwen35.planning.memory import peak_memory, threads_within
from qwen35.planning.rows import rows_of
from qwen35.planning.step import Step, StepTarget
from qwen35.tensors import StoredTensor, TensorSpec, Weight
from qwen35.threads import default_threads

pytestmark = pytest.mark.sentences


def test_peak_memory_hardly_grows_with_the_model() -> None:
    small, large = (published_plan(f"Qwen3.5-{n}", "nf4") for n in ("0.8B", "397B-A17B"))
    assert peak_memory(small, 2) < 250_000_000
    assert peak_memory(large, 2) < 400_000_000
    assert peak_memory(small, 2) < peak_memory(small, 8)


def step_of(op: str, storage: str, dtype: str, numel: int) -> Step:
    """Return a step of which memory is asked."""
    spec = TensorSpec("w", dtype, (numel,))
    weight = Weight("w", storage, (StoredTensor(spec, "in", 0),))
    role = role_of("lm_head.weight")
    codec = {"copy": storage, "decode": "plain"}.get(op, op)
    target = StepTarget(codec, (), ("out",), copied=op == "copy")
    return Step(rows_of(InventoryItem(weight, role, spec)), role, "", (target,))


@pytest.mark.parametrize(
    ("steps", "pieces", "kept"),
    [
        ([], 1, 0),
        ([("copy", "plain", "BF16", 999)], 1, 0),
        ([("copy", "nf4", "BF16", 999)], 1, 0),
        ([("copy", "fp8", "F32", 999)], 1, 0),
        ([("decode", "nf4", "BF16", 999)], 3, 999 // 64 * 16),
        ([("nf4", "fp8", "BF16", 6400)], 3, 3200),
        ([("nf4", "plain", "F32", 6400), ("nf4", "plain", "BF16", 64)], 1, 3200),
        ([("fp8", "plain", "BF16", 999)], 1, 0),
        ([("fp8", "plain", "F32", 999)], 3, 0),
        ([("fp8", "plain", "F16", 999)], 3, 0),
        ([("fp8", "nf4", "F16", 999)], 3, 999 // 64 * 16),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_that_of_pieces_and_of_the_largest_statistics(
    steps: list[tuple[Any, Any, str, int]], pieces: int, kept: int, threads: int
) -> None:
    """What decodes or widens needs three times a piece; scales of NF4 are kept meanwhile."""
    plan = published_plan("Qwen3.5-0.8B", "text")
    heads = sum(len(file.head) for file in plan.files)
    plan = replace(plan, steps=tuple(step_of(*step) for step in steps))
    found = peak_memory(plan, threads)
    assert found == 175_000_000 + threads * (pieces * 20_000_000 + kept) + 8 * heads
    assert isinstance(found, int)


@pytest.mark.parametrize(
    ("threads", "memory", "found"),
    [(8, None, 8), (8, 10**9, 8), (8, 300, 4), (8, 299, 3), (4, 300, 4), (8, 150, 1), (1, 150, 1)],
)
def test_threads_are_as_many_as_memory_allows(threads: int, memory: int | None, found: int) -> None:
    asked: list[int] = []

    def needed(count: int) -> int:
        asked.append(count)
        return 100 + 50 * count

    assert threads_within(needed, threads, memory) == found
    assert all(count >= 1 for count in asked)
    assert threads_within(lambda _: 0) == default_threads()


def test_memory_too_small_for_one_thread_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        threads_within(lambda threads: 1_001 + 500 * threads, 8, 1_480, hint="or not")
    assert str(caught.value) == "--memory 1.48 kB: too little, expected at least 1.51 kB; or not"
    with pytest.raises(UsageError) as caught:
        threads_within(lambda threads: 2_000, 8, 1_480)
    assert str(caught.value) == "--memory 1.48 kB: too little, expected at least 2.00 kB"
