"""Measure the divergence of quantized models from the unquantized one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import listed, refuse_given, size_given
from qwen35.checkpoint.open import hub_token
from qwen35.errors import UsageError
from qwen35.planning.merged_source import opened_adapters
from qwen35.progress import Progress

if TYPE_CHECKING:
    from qwen35.evaluation.evaluation_job import EvaluationJob
    from qwen35.evaluation.evaluation_report import EvaluationReport
    from qwen35.evaluation.lm_eval_tasks import LmEvalReport
    from qwen35.evaluation.task_accuracy import TaskReport
    from qwen35.serving.endpoint import Endpoint

__all__ = ["SIMULATED", "evaluate", "evaluate_lm_eval", "evaluate_tasks", "prepared", "state_of"]

SIMULATED = "llama.cpp"
"""The engine whose inputs of layers can be simulated for GGUF files."""


@plain_arguments
def evaluate(
    base: str | Path,
    candidates: str | Path | Sequence[str | Path] = (),
    *,
    adapter: str | Path | Sequence[str | Path] = (),
    onto: str | None = None,
    endpoint: str | Sequence[str] = (),
    served_model: str | Sequence[str] = (),
    api_key_env: str | None = None,
    timeout: int | None = None,
    serve: str | Sequence[str] = (),
    text: str | Path | None = None,
    context: int | None = None,
    chunks: int | None = None,
    report: str | Path | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    kl_divergence_base: str | Path | None = None,
    cache: str | Path | None = None,
    unquantized: str | Path | None = None,
    speed: bool = False,
    device: str = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
    streamed: bool = False,
    simulate: str | None = None,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure perplexity and KL divergence of candidates; without any, the base's perplexity.

    Args:
        base: folder, Hub id or GGUF file of the unquantized model; of any model if it is alone.
        candidates: folders, Hub ids, GGUF files or folders of them, ``hf:owner/name/path``.
        adapter: LoRA adapters of peft to merge into `base`, which is then a checkpoint: folders,
            as ``DIR`` or ``DIR=WEIGHT``.
        onto: merge them into the weights as this format holds them, such as ``nf4``.
        endpoint: addresses of servers that run more candidates: vLLM, SGLang, llama-server.
        served_model: their names of the models, in the same order; needed where one serves several.
        api_key_env: the environment variable with their key; QWEN35_API_KEY if None.
        timeout: seconds in which each of their answers must be complete; 600 if None.
        serve: commands that start them, without a shell; they are ended afterwards.
        text: the text file to measure on; optional if `kl_divergence_base` is read.
        context: tokens per chunk; 512 if None.
        chunks: the largest number of chunks; the whole text if None.
        report: folder to write report.json and report.html to.
        overwrite: replace an existing report.
        resume: file that holds results until the run is complete, to resume from; by default
            beside the report.
        kl_divergence_base: a llama-perplexity file: read instead of running the base if it
            exists, otherwise written.
        cache: the same in a compact format.
        unquantized: the base in the other engine's format, for the noise floor between engines.
        speed: also measure tokens per second of GGUF candidates and servers.
        device: for transformers: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: number of threads; all processors if None.
        memory: use at most this many bytes, or ``4GB``: run models layer by layer if they do not
            fit, and refuse where that takes more.
        streamed: run models layer by layer, in float32; GGUF files too.
        simulate: ``llama.cpp`` to measure GGUF candidates with its inputs of layers too.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives chunks.

    Raises:
        UsageError: arguments are missing or contradict each other, or a library is not installed.
        InputError: an input cannot be read, compared or run.
        OutputError: the report exists, or the disk is full.
        HubError: the Hub refused a request or could not be reached.
        EndpointError: a server refused, failed or could not be reached.
    """
    from qwen35.evaluation.evaluation_run import run
    from qwen35.reporting.report_files import write_report

    endpoints = _endpoints(listed(endpoint), listed(served_model), api_key_env, timeout)
    with _started(listed(serve), endpoints):
        job = prepared(
            base,
            listed(candidates),
            adapter=listed(adapter),
            onto=onto,
            endpoint=listed(endpoint),
            served_model=listed(served_model),
            api_key_env=api_key_env,
            timeout=timeout,
            text=text,
            context=context,
            chunks=chunks,
            report=report,
            overwrite=overwrite,
            resume=resume,
            kl_divergence_base=kl_divergence_base,
            cache=cache,
            unquantized=unquantized,
            device=device,
            threads=threads,
            memory=size_given("--memory", memory),
            streamed=streamed,
            simulate=simulate,
            hf_token=hf_token,
        )
        result = run(job, speed=speed, state=state_of(resume, report), progress=progress)
    if report is not None:
        write_report(result, Path(report))
    return result


@contextmanager
def _started(
    commands: Sequence[str], endpoints: Sequence[tuple[Endpoint, str | None]]
) -> Iterator[None]:
    """Start servers, and let nothing count that one which has ended would have answered."""
    if not commands:
        yield
        return
    from qwen35.serving.started_server import started_servers

    with started_servers(commands, [endpoint for endpoint, _ in endpoints]) as started:
        yield
        if (error := started.fate()) is not None:
            raise error


def evaluate_tasks(
    tasks: str | Path,
    *,
    models: str | Path | Sequence[str | Path] = (),
    endpoint: str | Sequence[str] = (),
    served_model: str | Sequence[str] = (),
    api_key_env: str | None = None,
    timeout: int | None = None,
    serve: str | Sequence[str] = (),
    threads: int | None = None,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> TaskReport:
    """Measure the accuracy of models on tasks; compare each with the first.

    Args:
        tasks: file with a JSON object a line: a prompt and a check of the answer.
        models: folders, Hub ids, GGUF files or folders of them: asked in transformers or llama.cpp.
        endpoint: addresses of servers that run more models, which come after those.
        served_model: their names of the models, in the same order; needed where one serves several.
        api_key_env: the environment variable with their key; QWEN35_API_KEY if None.
        timeout: seconds in which each of their answers must be complete; 600 if None.
        serve: commands that start them, without a shell; they are ended afterwards.
        threads: number of threads; all processors if None.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives tasks.

    Raises:
        UsageError: no model is given, arguments contradict each other, or an engine is missing.
        InputError: the file cannot be read, a line is no task, or a model cannot be asked.
        HubError: the Hub refused a request or could not be reached.
        EndpointError: a server was not reached, or answers nothing.
    """
    from qwen35.api.task_models import artifact_respondents
    from qwen35.evaluation.served_tasks import served_respondent
    from qwen35.evaluation.task_accuracy import run_tasks
    from qwen35.evaluation.task_file import read_tasks

    endpoints = _endpoints(listed(endpoint), listed(served_model), api_key_env, timeout)
    if not endpoints and not listed(models):
        hint = "name an artifact, or the server that runs the model with --endpoint"
        raise UsageError("--tasks", "no model to ask", hint=hint)
    file = Path(tasks)
    asked = read_tasks(file)
    here = [
        one
        for name in listed(models)
        for one in artifact_respondents(str(name), threads, hub_token(hf_token))
    ]
    served = [served_respondent(*one) for one in endpoints]
    with _started(listed(serve), endpoints):
        return run_tasks(asked, [*here, *served], file.name, progress)


def evaluate_lm_eval(
    names: str | Sequence[str],
    *,
    endpoint: str | Sequence[str],
    served_model: str | Sequence[str] = (),
    api_key_env: str | None = None,
    timeout: int | None = None,
    serve: str | Sequence[str] = (),
    include_path: str | Path | None = None,
    progress: Progress | None = None,
) -> LmEvalReport:
    """Run tasks of lm-eval on served models.

    Args:
        names: of the tasks.
        endpoint: addresses of servers.
        served_model: their names of the models, in the same order; needed where one serves several.
        api_key_env: the environment variable with their key; QWEN35_API_KEY if None.
        timeout: seconds in which each of their answers must be complete; 600 if None.
        serve: commands that start them, without a shell; they are ended afterwards.
        include_path: a folder with more tasks, as YAML files.
        progress: receives questions.

    Raises:
        UsageError: no server is given, lm-eval is missing, or a task needs log probabilities.
        InputError: lm-eval does not know a task, or cannot get its data.
        EndpointError: a server was not reached, or answers nothing.
    """
    from qwen35.evaluation.lm_eval_tasks import run_lm_eval

    endpoints = _endpoints(listed(endpoint), listed(served_model), api_key_env, timeout)
    if not endpoints:
        hint = "name the server that runs the model with --endpoint"
        raise UsageError("--lm-eval", "no model to ask", hint=hint)
    folder = None if include_path is None else Path(include_path)
    if folder is not None and not folder.is_dir():
        raise UsageError(
            "--include-path", f"{folder}: no such folder", hint="name a folder of tasks"
        )
    with _started(listed(serve), endpoints):
        return run_lm_eval(listed(names), endpoints, folder, progress)


def prepared(
    base: str | Path,
    candidates: Sequence[str | Path],
    *,
    adapter: Sequence[str | Path],
    onto: str | None,
    endpoint: Sequence[str],
    served_model: Sequence[str],
    api_key_env: str | None,
    timeout: int | None,
    text: str | Path | None,
    context: int | None,
    chunks: int | None,
    report: str | Path | None,
    overwrite: bool,
    resume: str | Path | None,
    kl_divergence_base: str | Path | None,
    cache: str | Path | None,
    unquantized: str | Path | None,
    device: str,
    threads: int | None,
    memory: int | None,
    streamed: bool,
    simulate: str | None,
    hf_token: str | None,
) -> EvaluationJob:
    """Prepare an evaluation without running it; arguments and errors as for `evaluate`."""
    from qwen35.evaluation.chunk_sweep import check_state
    from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
    from qwen35.reporting.report_files import check_report

    if simulate not in (None, SIMULATED):
        raise UsageError("simulate", f"{simulate!r:.80}", expected=SIMULATED)
    if report is not None:
        check_report(Path(report), overwrite=overwrite)
    if state := state_of(resume, report):
        check_state(state)
    request = EvaluationRequest(
        base=str(base),
        candidates=tuple(map(str, candidates)),
        text=Path(text) if text else None,
        context=context or 0,
        chunks=chunks or 0,
        threads=threads or 0,
        device=device,
        unquantized=str(unquantized) if unquantized else None,
        kld_file=Path(kl_divergence_base) if kl_divergence_base else None,
        cache=Path(cache) if cache else None,
        memory=memory or 0,
        streamed=streamed,
        llama_inputs=simulate is not None,
        endpoints=_endpoints(endpoint, served_model, api_key_env, timeout),
        token=hub_token(hf_token),
        adapters=opened_adapters(adapter, onto),
    )
    return prepare(request)


def _endpoints(
    urls: Sequence[str], names: Sequence[str], key_variable: str | None, timeout: int | None
) -> tuple[tuple[Endpoint, str | None], ...]:
    """Return the servers with the names of their models, as far as those are given."""
    from qwen35.serving.endpoint import Endpoint

    if names and len(names) != len(urls):
        found, expected = f"given {len(names)} times", f"once for each of {len(urls)} --endpoint"
        raise UsageError("--model", found, expected=expected)
    if not urls:
        asking = {"--api-key-env": key_variable is not None, "--timeout": timeout is not None}
        refuse_given(asking, "is for --endpoint", "give that, or leave it out")
    named: Sequence[str | None] = names or [None] * len(urls)
    endpoints = [Endpoint.parse(url, key_variable, timeout) for url in urls]
    return tuple(zip(endpoints, named, strict=True))


def state_of(resume: str | Path | None, report: str | Path | None) -> Path | None:
    """Return the file of an unfinished evaluation's results, by default beside a report.

    None if there is neither.
    """
    if resume or report is None:
        return Path(resume) if resume else None
    path = Path(report)
    return path.absolute().with_name(f".{path.name}.evaluation")
