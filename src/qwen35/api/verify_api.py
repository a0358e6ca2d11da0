"""Check an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import listed, refuse_given
from qwen35.checkpoint.adapter_files import Adapter, open_adapters
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint, is_published
from qwen35.errors import InputError, UsageError
from qwen35.planning.hessians import Hessians
from qwen35.planning.manifest import read_manifest, recorded_donor
from qwen35.planning.merged_source import opened_source
from qwen35.planning.recorded_adapters import recorded_adapters
from qwen35.planning.refinement import Refinement
from qwen35.progress import Progress
from qwen35.publishing.repo_documents import record_verdict
from qwen35.publishing.signing import SIGNATURE_NAME
from qwen35.verification.opening import open_artifact
from qwen35.verification.subject import Subject
from qwen35.verification.verdict import Depth, Engine, Verdict, served_verdict
from qwen35.verification.verdict import verify as check

__all__ = ["verify"]


@plain_arguments
def verify(
    model: str | Path | None = None,
    *,
    endpoint: str | None = None,
    served_model: str | None = None,
    api_key_env: str | None = None,
    context: int | None = None,
    timeout: int | None = None,
    serve: str | None = None,
    source: str | Path | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    mtp_from: str | Path | None = None,
    hessian: str | Path | None = None,
    depth: Depth | None = None,
    engine: Engine | None = None,
    threads: int | None = None,
    tensor_parallel: int | None = None,
    record: bool = False,
    hf_token: str | None = None,
    progress: Progress | None = None,
    questions: Progress | None = None,
) -> Verdict:
    """Check an artifact, or a model where it is served; alone or against its source.

    The verdict holds the findings; it only raises if the artifact cannot be checked at all.

    Args:
        model: folder, GGUF file, Hub id or ``hf:owner/name/path``.
        endpoint: instead of `model`, the address of a server with the OpenAI API, which is asked.
        served_model: its name of the model; needed if it serves several.
        api_key_env: the environment variable with its key; QWEN35_API_KEY if None.
        context: also ask it about an input of this many tokens.
        timeout: seconds in which each answer must be complete; 600 if None.
        serve: a command that starts the server, without a shell; it is ended afterwards.
        source: the checkpoint that it was made from.
        adapter: the adapters merged into it, as for `convert`; with a source only.
        mtp_from: the checkpoint whose MTP layer it has, as for `convert`; with a source only, and
            if the manifest does not name it on the Hub.
        hessian: the folder of `calibrate` whose Hessians refined its codes: these are compared by
            their errors in outputs too; with a source only.
        depth: ``structure`` reads headers and small files, ``numbers`` every byte, ``behaviour``
            also loads it and asks it questions; if None, ``numbers`` with a source, otherwise
            ``structure``.
        engine: engine for checkpoints at depth ``behaviour``; ``transformers`` if None.
        threads: number of threads; all processors if None.
        tensor_parallel: FP8: number of GPUs that must be able to split every weight in whole tiles.
        record: write the verdict into the artifact's qwen35.json.
        hf_token: for the Hub; by default HF_TOKEN.
        progress: receives bytes read.
        questions: receives questions asked.

    Raises:
        UsageError: arguments do not fit together, or an engine is not installed.
        InputError: there is nothing to check, or the source cannot be read.
        HubError: the Hub refused a request or could not be reached.
        EndpointError: the server refused, failed or could not be reached.

    >>> verify("assets/qwen3.5-tiny").passed
    True
    """
    asking: dict[str, Any] = {
        "served_model": served_model,
        "api_key_env": api_key_env,
        "context": context,
        "timeout": timeout,
        "serve": serve,
    }
    if endpoint is not None:
        files = {
            "MODEL": model,
            "--adapter": adapter,
            "--mtp-from": mtp_from,
            "--hessian": hessian,
            "--depth": depth if depth != "behaviour" else None,
            "--engine": engine,
            "--threads": threads,
            "--tensor-parallel": tensor_parallel,
            "--record": record,
        }
        refuse_given(files, "is about files, not about a server")
        return _verify_endpoint(
            endpoint, source=source, token=hf_token, questions=questions, **asking
        )
    alone = dict(zip(_ENDPOINT_FLAGS, asking.values(), strict=True))
    refuse_given(alone, "is for --endpoint", "give that, or leave it out")
    if model is None:
        raise UsageError("MODEL", "missing", hint="name an artifact, or a server with --endpoint")
    name = str(model)
    folder = _record_folder(name) if record else None
    depth = depth or ("numbers" if source else "structure")
    if engine and depth != "behaviour":
        hint = "add --depth behaviour, or leave it out"
        raise UsageError("--engine", f"is not used at depth {depth}", hint=hint)
    for flag, value in {"--adapter": adapter, "--mtp-from": mtp_from}.items():
        if value and not source:
            raise UsageError(flag, "needs --source, which it changes", hint="give both")
    if hessian is not None and (not source or depth == "structure"):
        hint = "give --source, and no --depth structure"
        raise UsageError("--hessian", "judges weights by their source", hint=hint)
    subject = open_artifact(
        name, depth, engine=engine, tensor_parallel=tensor_parallel, token=hf_token
    )
    original = measured = None
    if source and subject.files:
        manifest = _manifest(subject)
        adapters = _adapters(manifest, listed(adapter))
        donor = recorded_donor(manifest, None if mtp_from is None else str(mtp_from))
        # structure needs no weights; a published size has none, and is refused when fetched
        headers = depth == "structure" and not is_published(str(source))
        original = opened_source(source, adapters, donor or None, headers=headers, token=hf_token)
        measured = _hessians(manifest, original, hessian)
    verdict = check(
        subject,
        source=original,
        hessians=measured,
        depth=depth,
        threads=threads,
        tensor_parallel=tensor_parallel,
        engine=engine,
        progress=None if depth == "structure" else progress,
        questions=questions,
    )
    if folder is not None:
        record_verdict(folder, verdict)
    return verdict


_MOST_CONTEXT = 2**24
_ENDPOINT_FLAGS = ("--model", "--api-key-env", "--context", "--timeout", "--serve")


def _verify_endpoint(
    url: str,
    *,
    source: str | Path | None,
    token: str | None,
    served_model: str | None,
    api_key_env: str | None,
    context: int | None,
    timeout: int | None,
    serve: str | None,
    questions: Progress | None,
) -> Verdict:
    from qwen35.serving.endpoint import Endpoint
    from qwen35.serving.served_model import identify
    from qwen35.serving.server_client import ServerClient
    from qwen35.serving.started_server import started_servers
    from qwen35.verification.served_verdict import check_served

    endpoint = Endpoint.parse(url, api_key_env, timeout)
    if context is not None and not 0 <= context <= _MOST_CONTEXT:
        raise UsageError("--context", "out of range", expected=f"1 to {_MOST_CONTEXT} tokens")
    original = None if source is None else opened_source(source, headers=True, token=token)
    commands = [] if serve is None else [serve]
    with started_servers(commands, [endpoint]) as started, ServerClient(endpoint) as client:
        served = identify(client, served_model)
        if context and served.context and context > served.context:
            found, hint = f"the server has {served.context} tokens", "give fewer"
            raise UsageError(f"--context {context}", found, hint=hint)
        place = original.place if original else None
        result = check_served(
            client, served, source=place, context=context or 0, progress=questions
        )
        result = result.after(started.fate())
    return served_verdict(result, original.name if original else None)


def _manifest(subject: Subject) -> Mapping[str, Any]:
    """Return an artifact's manifest; empty if there is none, or none that can be read."""
    manifest = None
    with suppress(InputError):  # a finding of the check
        manifest = read_manifest(subject.place) if subject.place else None
    return manifest or {}


def _hessians(
    manifest: Mapping[str, Any], source: Checkpoint, folder: str | Path | None
) -> Hessians | None:
    """Open the Hessians that an artifact was made with, if they are given.

    Raises:
        UsageError: it was made without any.
        InputError: they are others, damaged, or of another model.
    """
    recipe = manifest.get("recipe")
    if folder is None:
        return None
    if not isinstance(recipe, dict):
        raise UsageError("--hessian", f"no recipe in {MANIFEST_NAME}", hint="leave it out")
    hessians = Refinement.from_json(recipe, Path(folder)).hessians
    assert hessians is not None
    hessians.check(source.config.geometry)
    return hessians


def _adapters(manifest: Mapping[str, Any], texts: Sequence[str | Path]) -> tuple[Adapter, ...]:
    """Open the adapters that an artifact was made with; its manifest knows their weights."""
    adapters, source = open_adapters(texts), manifest.get("source")
    if not isinstance(source, dict) or not source.get("adapters"):
        return adapters
    return recorded_adapters(manifest, adapters)


def _record_folder(name: str) -> Path:
    """Return the folder whose manifest will hold the verdict.

    Raises:
        UsageError: it has no manifest, or is signed: any change would break the signature.
    """
    folder = Path(name).expanduser()
    if not (folder / MANIFEST_NAME).is_file():
        raise UsageError("--record", f"{name} holds no {MANIFEST_NAME}", hint="leave it out")
    if (folder / SIGNATURE_NAME).is_file():
        hint = "remove it, record, then sign again with `qwen35 publish --sign`"
        raise UsageError("--record", f"{SIGNATURE_NAME} signs the manifest as it is", hint=hint)
    return folder
