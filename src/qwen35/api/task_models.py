"""Artifacts that are asked tasks: verification's engines, as evaluation wants models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from qwen35.evaluation.task_accuracy import ANSWER_TOKENS, OpenRespondent, Respondent, TaskReply
from qwen35.evaluation.task_file import ServedTask
from qwen35.verification.asking_prompts import PromptedArtifact, PromptedModel, turns
from qwen35.verification.opening import open_artifact

__all__ = ["artifact_respondents"]


def artifact_respondents(name: str, threads: int | None, token: str | None) -> list[OpenRespondent]:
    """Return how to load the models of an artifact; none is loaded yet.

    Raises:
        InputError: there is no artifact, or none that can be asked.
        HubError: the Hub refused, or was not reached.
    """
    subject = open_artifact(name, "behaviour", token=token)
    return [partial(_loaded, one) for one in subject.prompted(threads)]


@contextmanager
def _loaded(artifact: PromptedArtifact) -> Iterator[Respondent]:
    with artifact.loaded() as model:
        yield _ArtifactRespondent(artifact, model)


class _ArtifactRespondent:
    """A model in this process that is asked tasks."""

    def __init__(self, artifact: PromptedArtifact, model: PromptedModel) -> None:
        self.name, self.server, self._model = artifact.name, artifact.engine, model

    def replies(self, tasks: Sequence[ServedTask]) -> Iterator[TaskReply]:
        """Yield the replies.

        Raises:
            InputError: its chat template refuses a task, or the engine cannot answer it.
        """
        for turn in turns(self._model, [task.prompt for task in tasks], ANSWER_TOKENS):
            yield TaskReply.of_turn(turn.text, ended=turn.ended)
