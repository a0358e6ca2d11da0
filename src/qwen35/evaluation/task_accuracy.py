"""Accuracy of models on tasks, served or in this process, and the paired comparison of two.

Intervals of 95 %: Wilson's of a share (Wilson 1927), and the normal one of a difference of paired
shares; the probability is that of McNemar's exact test, both-sided (McNemar 1947).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from qwen35.display import cut, printable
from qwen35.evaluation.task_file import ServedTask
from qwen35.progress import Progress, Silent
from qwen35.table import table_lines

__all__ = [
    "ANSWER_TOKENS",
    "Accuracy",
    "OpenRespondent",
    "PairedAccuracy",
    "Respondent",
    "TaskReply",
    "TaskReport",
    "run_tasks",
]

ANSWER_TOKENS = 4096
"""Most tokens of an answer with its reasoning."""

_NORMAL = 1.959963984540054
"""Standard deviations of an interval of 95 %."""


@dataclass(frozen=True)
class Accuracy:
    """One model's answers.

    Args:
        name: of the model, and its server.
        server: name and version of what runs it, if known.
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
    """Accuracy of models on a file of tasks.

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


@dataclass(frozen=True)
class TaskReply:
    """A model's reply to a task.

    Args:
        answer: without its reasoning; None if there is none that can be judged.
        why: there is none.
    """

    answer: str | None
    why: str = ""

    @classmethod
    def of_turn(cls, turn: str, *, ended: bool) -> TaskReply:
        """Return the reply in a model's turn.

        Args:
            turn: with the reasoning, if the turn shows it.
            ended: whether the model ended it, rather than a limit.
        """
        if not ended:
            return cls(None, f"does not end within {ANSWER_TOKENS} tokens")
        if turn.rfind("<think>") > turn.rfind("</think>"):
            return cls(None, "the reasoning does not end")
        return cls(turn.rpartition("</think>")[2])


class Respondent(Protocol):
    """A model that is asked tasks."""

    @property
    def name(self) -> str:
        """Its name, for people."""
        ...

    @property
    def server(self) -> str | None:
        """The name and version of what runs it, if known."""
        ...

    def replies(self, tasks: Sequence[ServedTask]) -> Iterator[TaskReply]:
        """Yield the replies to tasks, in their order, greedily."""
        ...


OpenRespondent = Callable[[], AbstractContextManager[Respondent]]
"""Loads or reaches a model, until the end of a ``with`` block."""


def run_tasks(
    tasks: Sequence[ServedTask],
    models: Sequence[OpenRespondent],
    file: str,
    progress: Progress | None = None,
) -> TaskReport:
    """Ask models all tasks, one model after the other.

    Args:
        tasks: the tasks.
        models: open the models; the first is the one that others are compared with.
        file: name of the file of the tasks.
        progress: receives tasks.

    Raises:
        EndpointError: a server was not reached, or answers nothing.
        InputError: a model cannot be loaded, or its chat template refuses questions.
        UsageError: a server does not serve that model, or several; an engine is not installed.
    """
    progress = progress or Silent()
    progress.begin("asking tasks", len(tasks) * len(models))
    try:
        accuracies = tuple(_accuracy(tasks, one, progress) for one in models)
    finally:
        progress.end()
    names = tuple(cut(printable(task.name), 200) for task in tasks)
    return TaskReport(cut(printable(file), 200), names, accuracies)


def _accuracy(tasks: Sequence[ServedTask], opened: OpenRespondent, progress: Progress) -> Accuracy:
    replies: list[TaskReply] = []
    with opened() as model:
        for reply in model.replies(tasks):
            replies.append(reply)
            progress.advance(1, f"task {len(replies)}")
        name, server = model.name, model.server
    pairs = list(zip(tasks, replies, strict=True))
    failed = {printable(t.name): printable(r.why) for t, r in pairs if r.answer is None}
    right = tuple(r.answer is not None and task.is_right(r.answer) for task, r in pairs)
    return Accuracy(name, server, right, failed)
