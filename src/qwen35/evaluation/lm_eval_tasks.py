"""Tasks of lm-eval (the extra of that name), asked of served models by a model class of ours.

lm-eval renders the prompts, few-shot examples included, and judges the answers; requests have the
bounds of all others, and the key goes to the endpoint alone. Tasks that compare log probabilities
of given answers are refused: a chat tells none.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen35.display import cut, printable
from qwen35.errors import InputError, Qwen35Error, UsageError, extra_hint
from qwen35.evaluation.served_tasks import task_replies
from qwen35.evaluation.task_accuracy import ANSWER_TOKENS, TaskReply
from qwen35.progress import Progress, Silent
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.served_model import ServedModel, identify
from qwen35.serving.server_client import ServerClient
from qwen35.table import table_lines

__all__ = ["LmEvalFigure", "LmEvalModel", "LmEvalReport", "run_lm_eval"]


@dataclass(frozen=True)
class LmEvalFigure:
    """A figure of lm-eval.

    Args:
        task: the task, or group of tasks.
        metric: with the filter of answers: ``exact_match,none``.
        value: the figure.
        error: its standard error, if lm-eval computes one.
    """

    task: str
    metric: str
    value: float
    error: float | None


@dataclass(frozen=True)
class LmEvalModel:
    """One model's figures.

    Args:
        name: of the model, and its server.
        server: the server's name and version, if told.
        figures: in lm-eval's order.
        failed: number of questions without an answer, which lm-eval judged as empty ones.
    """

    name: str
    server: str | None
    figures: tuple[LmEvalFigure, ...]
    failed: int


@dataclass(frozen=True)
class LmEvalReport:
    """Figures of lm-eval.

    Args:
        lm_eval: its version.
        models: those that were asked.
    """

    lm_eval: str
    models: tuple[LmEvalModel, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def text(self, width: int | None = None) -> str:
        """Return it as text, for a terminal of `width` columns if given."""
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for model in self.models:
            for one in model.figures:
                error = "" if one.error is None else f" ± {one.error:.4f}"
                row = cells.setdefault((one.task, one.metric), {})
                row[model.name] = f"{one.value:.4f}{error}"
        names = [model.name for model in self.models]
        rows = [
            [f"{task} {metric}", *(row.get(name, "-") for name in names)]
            for (task, metric), row in cells.items()
        ]
        lines = [f"lm-eval {self.lm_eval}", ""]
        lines += table_lines(["task", *names], rows, width)
        lines += [
            f"note: {model.name}: {model.failed} questions without an answer count as empty ones"
            for model in self.models
            if model.failed
        ]
        return "\n".join(lines)


def run_lm_eval(
    names: Sequence[str],
    endpoints: Sequence[tuple[Endpoint, str | None]],
    folder: Path | None = None,
    progress: Progress | None = None,
) -> LmEvalReport:
    """Run tasks of lm-eval on served models.

    Args:
        names: of the tasks.
        endpoints: servers, each with its name of the model, if given.
        folder: more tasks, as YAML files.
        progress: receives questions.

    Raises:
        UsageError: lm-eval is not installed, a task needs log probabilities, or a server does not
            serve that model, or several.
        InputError: lm-eval does not know a task, or cannot get its data.
        EndpointError: a server was not reached, or answers nothing.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import lm_eval.api.model as _  # noqa: F401 - to tell that it is missing
    except ImportError as error:
        found = f"{str(error.name).partition('.')[0]} is not installed"
        raise UsageError("--lm-eval", found, hint=extra_hint("lm-eval")) from error
    progress = progress or Silent()
    models = tuple(_evaluated(names, folder, *one, progress) for one in endpoints)
    return LmEvalReport(version("lm-eval"), models)


def _evaluated(
    names: Sequence[str],
    folder: Path | None,
    endpoint: Endpoint,
    name: str | None,
    progress: Progress,
) -> LmEvalModel:
    with ServerClient(endpoint) as client:
        served = identify(client, name)
        answering = _Answering(client, served, progress)
        try:
            results = _simple_evaluate(names, folder, answering)
        except Qwen35Error:
            raise
        except Exception as error:
            why = cut(printable(" ".join(str(error).split())), 200)
            found = f"lm-eval cannot run {', '.join(names)} ({type(error).__name__}: {why})"
            raise InputError("--lm-eval", found) from error
        finally:
            progress.end()
    place = endpoint.url.partition("://")[2]
    figures = tuple(_figures(results))
    return LmEvalModel(f"{served.title} at {place}", served.server, figures, answering.failed)


def _simple_evaluate(
    names: Sequence[str], folder: Path | None, answering: _Answering
) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with redirect_stdout(sys.stderr):  # stdout is for results
        manager = TaskManager(include_path=None if folder is None else str(folder))
        results = lm_eval.simple_evaluate(
            model=_model(answering),
            tasks=list(names),
            task_manager=manager,
            apply_chat_template=True,
            log_samples=False,
            bootstrap_iters=1000,
        )
    found: Mapping[str, Any] = (results or {}).get("results", {})
    return found


def _figures(results: Mapping[str, Any]) -> Iterator[LmEvalFigure]:
    for task, row in results.items():
        for key, value in row.items():
            metric, _, kept = key.partition(",")
            if metric.endswith("_stderr") or not kept or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{kept}")
            error = float(error) if isinstance(error, int | float) else None
            yield LmEvalFigure(task, key, float(value), error)


class _Answering:
    """Answers the requests of lm-eval.

    Attributes:
        failed: how many got no answer.
    """

    def __init__(self, client: ServerClient, served: ServedModel, progress: Progress) -> None:
        self._client, self._served, self._progress = client, served, progress
        self.failed = 0

    def answers(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Return the answers to prompts, each with lm-eval's options for it."""
        self._progress.begin("asking lm-eval's questions", len(requests))
        asked = [self._request(*one) for one in requests]
        found = []
        for number, reply in enumerate(task_replies(self._client, asked, _reply), 1):
            self.failed += reply.answer is None
            found.append(reply.answer or "")
            self._progress.advance(1, f"question {number}")
        return found

    def _request(self, context: str, options: Mapping[str, Any]) -> dict[str, Any]:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        return {
            "model": self._served.name,
            "messages": json.loads(context),
            "max_tokens": options.get("max_gen_toks") or ANSWER_TOKENS,
            "temperature": options.get("temperature", 0.0),
            **({"stop": stops[:_MOST_STOPS]} if stops else {}),
        }


_MOST_STOPS = 4
"""Of the OpenAI API."""


def _reply(turn: str, *, ended: bool) -> TaskReply:
    """Return what lm-eval judges: also an answer that a limit has cut, as with its own models."""
    del ended
    return TaskReply.of_turn(turn, ended=True)


def _model(answering: _Answering) -> Any:
    """Return the model as lm-eval wants it."""
    from lm_eval.api.model import LM

    class ServedLM(LM):  # type: ignore[misc]
        """A served model, for lm-eval."""

        tokenizer_name = "served"

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Return the answers."""
            del disable_tqdm
            return answering.answers([request.args for request in requests])

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """Return a conversation as it is: the server has the template."""
            del add_generation_prompt
            return json.dumps(chat_history)

        def chat_template(self, chat_template: bool | str = False) -> str:
            """Return no template."""
            del chat_template
            return ""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            """Refuse: a chat tells no log probabilities."""
            del disable_tqdm
            task = cut(printable(str(requests[0].task_name)), 80)
            found = f"{task} compares log probabilities of answers, which a chat does not tell"
            raise UsageError("--lm-eval", found, hint="take a task that generates answers")

        loglikelihood_rolling = loglikelihood

    return ServedLM()
