"""Ask served models tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from qwen35.errors import EndpointError
from qwen35.evaluation.task_accuracy import ANSWER_TOKENS, OpenRespondent, Respondent, TaskReply
from qwen35.evaluation.task_file import ServedTask
from qwen35.serving.chat_replies import chat
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.served_model import ServedModel, identify
from qwen35.serving.server_client import ServerClient
from qwen35.threads import detached_map

__all__ = ["served_respondent", "task_replies"]

_AT_ONCE = 8
_PATIENCE = 8
"""Tasks in a row that may fail before the others are not asked."""


def served_respondent(endpoint: Endpoint, name: str | None) -> OpenRespondent:
    """Return how to reach a served model; `name` may be left out if there is one only."""
    return partial(_reached, endpoint, name)


@contextmanager
def _reached(endpoint: Endpoint, name: str | None) -> Iterator[Respondent]:
    with ServerClient(endpoint) as client:
        yield _ServedRespondent(client, identify(client, name))


class _ServedRespondent:
    """A served model that is asked tasks, several at a time."""

    def __init__(self, client: ServerClient, served: ServedModel) -> None:
        self._client, self._served = client, served
        place = client.endpoint.url.partition("://")[2]
        self.name, self.server = f"{served.title} at {place}", served.server

    def replies(self, tasks: Sequence[ServedTask]) -> Iterator[TaskReply]:
        """Yield the replies; errors as for `task_replies`."""
        requests = [
            {
                "model": self._served.name,
                "messages": [{"role": "user", "content": task.prompt}],
                "max_tokens": ANSWER_TOKENS,
                "temperature": 0.0,
            }
            for task in tasks
        ]
        return task_replies(self._client, requests)


def task_replies(
    client: ServerClient,
    requests: Sequence[Mapping[str, Any]],
    reply_of: Callable[..., TaskReply] = TaskReply.of_turn,
) -> Iterator[TaskReply]:
    """Yield the replies to requests for a turn, in their order; several are asked at a time.

    Args:
        client: talks to the server.
        requests: for turns.
        reply_of: the reply in a turn; arguments as for `TaskReply.of_turn`.

    Raises:
        EndpointError: the server fails at several in a row, or at all.
    """

    def reply(request: Mapping[str, Any]) -> TaskReply | EndpointError:
        try:
            found = chat(client, request)
        except EndpointError as error:
            return error
        return reply_of(found.content, ended=found.finish != "length")

    lost = 0
    with closing(detached_map(reply, requests, _AT_ONCE)) as replies:
        for number, one in enumerate(replies, 1):
            if not isinstance(one, EndpointError):
                lost = 0
                yield one
                continue
            lost += 1
            if lost == min(_PATIENCE, len(requests)):
                many = "no task" if lost == number else f"{lost} tasks in a row with none"
                raise EndpointError(client.endpoint.url, f"answers {many} ({one.message})")
            yield TaskReply(None, one.message)
