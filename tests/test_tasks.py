"""Tasks are balanced, cover every step once, and the dispatcher keeps all workers busy."""

from __future__ import annotations

import heapq
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen35.checkpoint.header import file_layout
from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.source import open_folder
from qwen35.errors import TensorError, WorkerError
from qwen35.execution.dispatch import TRIES, JobOutcome, WorkerJob, WorkerPool, dispatch
from qwen35.execution.failures import failure_json
from qwen35.execution.fleet import fill
from qwen35.execution.step_runner import StepRunner
from qwen35.model.model_config import parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors, role_of
from qwen35.model.sizes import published_config
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rows import rows_of
from qwen35.planning.step import Step, StepTarget
from qwen35.planning.tasks import Task, make_tasks, scheduled, share, task_bytes
from qwen35.progress import Silent
from qwen35.sinks.journal import Journal
from qwen35.sinks.tensor_writer import TensorWriter
from qwen35.tensors import StoredTensor, TensorSpec, Weight
from qwen35.writing.open_output import OpenOutput

EMBEDDING = role_of("model.language_model.embed_tokens.weight")


def step_of(name: str, nbytes: int, file: str = "f") -> Step:
    spec = TensorSpec(name, "U8", (nbytes,))
    weight = Weight(name, "plain", (StoredTensor(spec, "in", 0),))
    target = StepTarget("plain", (spec,), (file,), copied=True)
    return Step(rows_of(InventoryItem(weight, EMBEDDING, spec)), EMBEDDING, "", (target,))


def steps_of(name: str, sizes: list[int]) -> list[Step]:
    """Return the steps that fill a file."""
    return [step_of(f"{name}.{i}", size, name) for i, size in enumerate(sizes)]


def steps_of_all(sizes: list[list[int]]) -> list[Step]:
    """Return the steps that fill the files ``f0``, ``f1``, ..."""
    return [step for i, row in enumerate(sizes) for step in steps_of(f"f{i}", row)]


FILES = st.lists(st.lists(st.integers(1, 1000), min_size=1, max_size=30), min_size=1, max_size=8)


@given(sizes=FILES, nbytes=st.integers(1, 3000))
def test_tasks_cover_every_step_once_in_order_and_none_is_too_large(
    sizes: list[list[int]], nbytes: int
) -> None:
    tasks = make_tasks(steps_of_all(sizes), nbytes)
    before = 0
    for number, row in enumerate(sizes):
        own = [task for task in tasks if task.files == (f"f{number}",)]
        assert [step for task in own for step in task.steps] == steps_of(f"f{number}", row)
        assert [task.begin for task in own] == [
            before + sum(len(t.steps) for t in own[:i]) for i in range(len(own))
        ]
        before += len(row)
        for first, second in itertools.pairwise(own):
            assert first.nbytes + second.nbytes > nbytes  # not more tasks than needed
    for task in tasks:
        assert task.steps
        assert task.nbytes <= nbytes or len(task.steps) == 1


@given(sizes=FILES, nbytes=st.integers(1, 3000), count=st.integers(1, 20))
def test_shares_are_balanced_by_bytes_and_complete(
    sizes: list[list[int]], nbytes: int, count: int
) -> None:
    tasks = make_tasks(steps_of_all(sizes), nbytes)
    shares = share(tasks, count)
    assert len(shares) == count
    assert [task for part in shares for task in part] == list(tasks)
    largest = max(task.nbytes for task in tasks)
    even = sum(task.nbytes for task in tasks) / count
    for part in shares:
        assert even - largest <= sum(task.nbytes for task in part) <= even + largest


def sizes_of(tasks: Sequence[Task]) -> list[int]:
    return [task.nbytes for task in tasks]


@pytest.mark.parametrize(
    ("sizes", "nbytes", "tasks"),
    [
        ([4, 6, 5], 10, [10, 5]),  # exactly as much as a task may read
        ([10, 1, 9], 10, [10, 10]),
        ([11, 1], 10, [11, 1]),
        ([5, 5, 5, 5], 10, [10, 10]),
        ([1], 10, [1]),
    ],
)
def test_a_task_reads_as_much_as_it_may(sizes: list[int], nbytes: int, tasks: list[int]) -> None:
    assert sizes_of(make_tasks(steps_of("f", sizes), nbytes)) == tasks


def test_single_large_weights_are_begun_first() -> None:
    sizes = [3, 20, 10, 19, 50, 9]
    tasks = make_tasks(steps_of_all([[size] for size in sizes]), 10)
    assert sizes_of(scheduled(tasks, 10)) == [50, 20, 3, 10, 19, 9]


@pytest.mark.parametrize(
    ("sizes", "count", "shares"),
    [
        ([5, 5], 2, [[5], [5]]),
        ([2, 2], 2, [[2], [2]]),
        ([1, 8, 1], 2, [[1], [8, 1]]),  # the middle of the second is that of all
        ([4, 4, 4], 2, [[4], [4, 4]]),
        ([7], 3, [[], [7], []]),
        ([0, 0], 2, [[0, 0], []]),
        ([0, 5, 0], 1, [[0, 5, 0]]),
        ([5, 0], 2, [[], [5, 0]]),  # what ends where all ends is in the last
    ],
)
def test_a_task_is_in_the_share_of_its_middle(
    sizes: list[int], count: int, shares: list[list[int]]
) -> None:
    tasks = make_tasks(steps_of_all([[size] for size in sizes]), 1)
    assert [sizes_of(part) for part in share(tasks, count)] == shares


@pytest.mark.parametrize(
    ("nbytes", "workers", "expected"),
    [(1, 1, 1), (15, 1, 1), (16, 1, 2), (32, 2, 2), (47, 2, 2), (10**12, 2, 10**9)],
)
def test_a_worker_has_eight_tasks_of_at_most_a_gigabyte(
    nbytes: int, workers: int, expected: int, dense: Path
) -> None:
    plan = replace(
        make_plan(open_folder(dense), load_recipe("text")), steps=(step_of("w", nbytes),)
    )
    found = task_bytes(plan, workers)
    assert found == expected
    assert isinstance(found, int)


# --- the scheduler, at the size of large models, on a clock of its own


class Simulated(WorkerPool):
    """A pool in which a job takes as long as its bytes say; a byte read or hashed is a second."""

    def __init__(self, plan: Plan, slots: int) -> None:
        self._slots = slots
        self.clock = 0
        self.begun: list[Mapping[str, Any]] = []
        self.idle_from: int | None = None
        self.work = 0
        self._steps = plan.written
        self._files = {file.name: file for file in plan.files}
        self._running: list[tuple[int, int, Any]] = []

    def close(self) -> None:
        pass

    @property
    def slots(self) -> int:
        return self._slots

    def begin(self, number: int, order: Mapping[str, Any]) -> None:
        steps = [self._steps[i] for i in order.get("steps", ())]
        answer: Any = "0" * 64
        if steps:
            takes = sum(step.read_bytes for step in steps)
            tensors: dict[str, dict[str, str]] = {}
            for step in steps:
                for target in step.targets:
                    for file in target.files:
                        tensors.setdefault(file, {})[target.outputs[0].name] = "00000001"
            answer = {"tensors": tensors, "compared": {}}
        else:
            takes = self._files[order["hash"]].nbytes
        heapq.heappush(self._running, (self.clock + takes, number, answer))
        self.begun.append(order)
        self.work += takes

    def wait(self) -> Iterator[JobOutcome]:
        if len(self._running) < self._slots and self.idle_from is None:
            self.idle_from = len(self.begun)
        self.clock, number, answer = heapq.heappop(self._running)
        yield JobOutcome(number, {"done": answer})


def hollow_plan(folder: Path, size: str, recipe: str, shards: int) -> Plan:
    """Plan a checkpoint of a published size, in so many files, without data."""
    config = published_config(size)
    parsed = parse_config(config)
    specs = list(expected_tensors(parsed, CheckpointNaming.published(parsed)))
    per_file = -(-len(specs) // shards)
    weight_map: dict[str, str] = {}
    folder.mkdir()
    for i in range(shards):
        part = specs[i * per_file : (i + 1) * per_file]
        name = f"model.safetensors-{i + 1:05d}-of-{shards:05d}.safetensors"
        head, offsets = file_layout(part)
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(spec.nbytes for spec in part))
        weight_map |= dict.fromkeys(offsets, name)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    total = sum(spec.nbytes for spec in specs)
    plan = make_plan(open_folder(folder), load_recipe(recipe), shard_bytes=total // 100)
    assert len(plan.files) >= 50
    return plan


@pytest.mark.parametrize(
    ("size", "recipe"), [("Qwen3.5-397B-A17B", "nf4"), ("Qwen3.5-27B", "text-fp8")]
)
@pytest.mark.parametrize("slots", [1, 8, 64])
def test_a_hundred_shards_keep_all_workers_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, recipe: str, slots: int
) -> None:
    # files of this size are to take no place on the disk
    monkeypatch.setattr(os, "posix_fallocate", lambda file, _, nbytes: os.ftruncate(file, nbytes))
    plan = hollow_plan(tmp_path / "source", size, recipe, shards=100)
    folder = tmp_path / "work" / "files"
    folder.mkdir(parents=True)
    pool = Simulated(plan, slots)
    with Journal(tmp_path / "journal", {}) as journal, TensorWriter(folder, journal) as written:
        carrier = StepRunner(plan, ())
        output = OpenOutput(tmp_path / "out", plan, folder, written, carrier, Silent())
        fill(output, plan.files, pool)
    assert output.hashes.keys() == {file.name for file in plan.files}

    done = Counter(i for o in pool.begun if "steps" in o for i in o["steps"])
    assert done == Counter(range(len(plan.written)))
    # a worker was without work only when all tasks were begun
    if pool.idle_from is not None:
        assert all("hash" in order for order in pool.begun[pool.idle_from :])
    # Graham's bound for a schedule in which none idles while a job is ready (1969): the work, and
    # the longest chain of jobs that wait for each other: a task and the hashing of its file
    size_of = {file.name: file.nbytes for file in plan.files}
    tasks = make_tasks(plan.written, task_bytes(plan, slots))
    chain = max(task.nbytes + size_of[file] for task in tasks for file in task.files)
    assert pool.work == plan.read_bytes + sum(size_of.values())
    assert pool.clock <= pool.work / slots + (1 - 1 / slots) * chain
    assert pool.clock <= max(pool.work / slots, chain) * 1.6


# --- jobs whose workers die


class Dying(WorkerPool):
    """A pool of one worker that dies at the job called ``bad``, so many times."""

    _slots = 1

    def __init__(self, deaths: int, failure: BaseException | None = None) -> None:
        self.deaths, self.failure = deaths, failure
        self.begun: list[str] = []

    def close(self) -> None:
        pass

    @property
    def slots(self) -> int:
        return self._slots

    def begin(self, number: int, order: Mapping[str, Any]) -> None:
        self.begun.append(order["name"])
        self.number = number

    def wait(self) -> list[JobOutcome]:
        name = self.begun[-1]
        if name == "bad" and self.failure:
            return [JobOutcome(self.number, {"failure": failure_json(self.failure)})]
        if name == "bad" and self.begun.count("bad") <= self.deaths:
            return [JobOutcome(self.number, None, "signal SIGKILL")]
        return [JobOutcome(self.number, {"done": name})]


def jobs(done: list[str]) -> list[WorkerJob]:
    def note(name: str) -> list[WorkerJob]:
        done.append(name)
        return []

    return [WorkerJob(name, {"name": name}, note) for name in ("first", "bad", "last")]


def test_a_job_is_begun_again_when_its_worker_dies_and_no_other_is() -> None:
    done: list[str] = []
    pool = Dying(TRIES - 1)
    dispatch(pool, jobs(done))
    assert pool.begun == ["first", *["bad"] * TRIES, "last"]
    assert done == ["first", "bad", "last"]


def test_a_job_whose_worker_always_dies_is_named() -> None:
    with pytest.raises(WorkerError, match=r"bad: its worker died 3 times \(signal SIGKILL\)"):
        dispatch(Dying(TRIES), jobs([]))


def test_what_goes_wrong_in_a_worker_is_raised_once_and_never_tried_again() -> None:
    error = TensorError("w", "is odd", expected="even", hint="mend it")
    pool = Dying(0, error)
    with pytest.raises(TensorError) as caught:
        dispatch(pool, jobs([]))
    assert str(caught.value) == str(error)
    assert pool.begun == ["first", "bad"]
