"""Accuracy on tasks where a model is served, and the paired comparison of two of them.

Intervals of 95 %: Wilson's of a share (Wilson 1927), and the normal one of a difference of paired
shares; the probability is that of McNemar's exact test, both-sided (McNemar 1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

from qwen35.errors import EndpointError
from qwen35.evaluation.task_file import ServedTask
from qwen35.progress import Progress, Silent
from qwen35.serving.chat_replies import chat
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.served_model import identify
from qwen35.serving.server_client import ServerClient
from qwen35.table import table_lines

__all__ = ["Accuracy", "PairedAccuracy", "TaskReport", "run_tasks"]

_AT_ONCE = 8
_TOKENS = 4096
"""Most tokens of an answer with its reasoning."""

_NORMAL = 1.959963984540054
"""Standard deviations of an interval of 95 %."""


@dataclass(frozen=True)
class Accuracy:
    """One model's answers.

    Args:
        name: of the model, and its server.
        server: the server's name and version, if told.
        right: which tasks are right.
        failed: tasks without an answer, which count as wrong, with the reason.
    """

    name: str
    server: str | None
    right: tuple[bool, ...]
    failed: dict[str, str]

    @property
    def share(self) -> float:
        """The share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the share.

        >>> low, high = Accuracy("a", None, (True,) * 8 + (False,) * 2, {}).interval
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)
        """
        n, p, z = len(self.right), self.share, _NORMAL
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class PairedAccuracy:
    """Two models on the same tasks.

    Args:
        first: a model's name.
        second: another's.
        only_first: tasks that only the first does.
        only_second: tasks that only the second does.
        count: of all tasks.
    """

    first: str
    second: str
    only_first: int
    only_second: int
    count: int

    @property
    def difference(self) -> float:
        """The second's share minus the first's."""
        return (self.only_second - self.only_first) / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the difference."""
        both, net = self.only_first + self.only_second, self.only_second - self.only_first
        half = _NORMAL * math.sqrt(both - net * net / self.count) / self.count
        return self.difference - half, self.difference + half

    @property
    def probability(self) -> float:
        """The probability of such a difference between equal models.

        >>> PairedAccuracy("a", "b", 1, 9, 100).probability
        0.021484375
        """
        both, least = self.only_first + self.only_second, min(self.only_first, self.only_second)
        tail = sum(math.comb(both, k) for k in range(least + 1))
        return float(min(1.0, 2 * tail / 2**both))


@dataclass(frozen=True)
class TaskReport:
    """Accuracy of served models on a file of tasks.

    Args:
        tasks: name of the file.
        names: of the tasks.
        models: the models' answers.
    """

    tasks: str
    names: tuple[str, ...]
    models: tuple[Accuracy, ...]

    @property
    def pairs(self) -> list[PairedAccuracy]:
        """Each other model beside the first."""
        first, *others = self.models
        return [_paired(first, other) for other in others]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "tasks": self.tasks,
            "names": list(self.names),
            "models": [
                {**asdict(m), "share": m.share, "interval": list(m.interval)} for m in self.models
            ],
            "pairs": [
                {
                    **asdict(pair),
                    "difference": pair.difference,
                    "interval": list(pair.interval),
                    "probability": pair.probability,
                }
                for pair in self.pairs
            ],
        }

    def text(self, width: int | None = None) -> str:
        """Return it as text, for a terminal of `width` columns if given."""
        rows = [
            [m.name, f"{sum(m.right)} of {len(m.right)}", f"{m.share:.1%}", _range(m.interval)]
            for m in self.models
        ]
        lines = [f"{self.tasks}: {len(self.names)} tasks", ""]
        lines += table_lines(["model", "right", "share", "95 % interval"], rows, width)
        lines += [
            f"{pair.second} against {pair.first}: {pair.difference:+.1%} "
            f"({_range(pair.interval)}), {pair.only_second} tasks gained, {pair.only_first} lost, "
            f"p = {pair.probability:.3g}"
            for pair in self.pairs
        ]
        lines += [
            f"note: {m.name}: {len(m.failed)} tasks without an answer count as wrong; the first: "
            f"{next(iter(m.failed.values()))}"
            for m in self.models
            if m.failed
        ]
        return "\n".join(lines)


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _paired(first: Accuracy, second: Accuracy) -> PairedAccuracy:
    pairs = list(zip(first.right, second.right, strict=True))
    return PairedAccuracy(
        first.name,
        second.name,
        sum(a and not b for a, b in pairs),
        sum(b and not a for a, b in pairs),
        len(pairs),
    )


def run_tasks(
    tasks: Sequence[ServedTask],
    endpoints: Sequence[tuple[Endpoint, str | None]],
    file: str,
    progress: Progress | None = None,
) -> TaskReport:
    """Ask served models all tasks, greedily.

    Args:
        tasks: the tasks.
        endpoints: servers, each with its name of the model, if given.
        file: name of the file of the tasks.
        progress: receives tasks.

    Raises:
        EndpointError: a server was not reached, or answers nothing.
        UsageError: it does not serve that model, or several.
    """
    progress = progress or Silent()
    progress.begin("asking tasks", len(tasks) * len(endpoints))
    try:
        models = tuple(_accuracy(tasks, *one, progress) for one in endpoints)
    finally:
        progress.end()
    return TaskReport(file, tuple(task.name for task in tasks), models)


def _accuracy(
    tasks: Sequence[ServedTask], endpoint: Endpoint, name: str | None, progress: Progress
) -> Accuracy:
    with ServerClient(endpoint) as client:
        served = identify(client, name)
        answers: list[str | EndpointError] = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for answer in pool.map(_answer, repeat(client), repeat(served.name), tasks):
                answers.append(answer)
                progress.advance(1, f"task {len(answers)}")
    failed = {
        task.name: answer.message
        for task, answer in zip(tasks, answers, strict=True)
        if isinstance(answer, EndpointError)
    }
    if len(failed) == len(tasks):
        raise EndpointError(endpoint.url, f"answers no task ({next(iter(failed.values()))})")
    right = tuple(
        isinstance(answer, str) and task.is_right(answer)
        for task, answer in zip(tasks, answers, strict=True)
    )
    place = endpoint.url.partition("://")[2]
    return Accuracy(f"{served.name} at {place}", served.server, right, failed)


def _answer(client: ServerClient, model: str, task: ServedTask) -> str | EndpointError:
    request = {
        "model": model,
        "messages": [{"role": "user", "content": task.prompt}],
        "max_tokens": _TOKENS,
        "temperature": 0.0,
    }
    try:
        return chat(client, request).content.rpartition("</think>")[2]
    except EndpointError as error:
        return error
