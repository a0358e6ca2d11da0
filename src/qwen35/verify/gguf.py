"""GGUF files checked: the container, its keys and tensors, the manifest, and every number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from qwen35.checkpoint.inventory import inventory
from qwen35.checkpoint.open import GgufFiles
from qwen35.checkpoint.place import Folder
from qwen35.checkpoint.sidecars import MANIFEST_NAME
from qwen35.checkpoint.source import Checkpoint, Reader
from qwen35.errors import Finding, InputError
from qwen35.gguf.container import Container, read_gguf
from qwen35.gguf.expected import KEYS, expected, missing_keys
from qwen35.gguf.names import Tensor, text_tensors, vision_tensors
from qwen35.gguf.types import FLOATS
from qwen35.plan.manifest import read_manifest
from qwen35.progress import Progress, Silent
from qwen35.threads import default_threads
from qwen35.verify.artifact import Depth, Verdict
from qwen35.verify.asking_llama import LlamaAsker
from qwen35.verify.behaviour import NOT_ASKED, Answer, ask, behaviour_findings
from qwen35.verify.compared import RoleError
from qwen35.verify.gguf_numbers import compare
from qwen35.verify.memo import Memo, stamped

__all__ = ["verify_gguf"]


def verify_gguf(
    artifact: str,
    files: GgufFiles,
    *,
    source: Checkpoint | None = None,
    depth: Depth = "structure",
    threads: int | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check GGUF files.

    Args:
        artifact: what the user called them.
        files: what `qwen35.checkpoint.open.gguf_files` found.
        source: the checkpoint they were made from; needs depth ``numbers``.
        depth: ``structure`` reads heads, ``numbers`` every byte, ``behaviour`` asks as well.
        threads: tensors decoded at a time.
        token: for files on the Hub: read by ranges for their structure, else downloaded.
        progress: told of the bytes read.

    Raises:
        HubError: the Hub refused, or was not reached.
    """
    if depth != "structure":
        files = files.fetch(token)
    progress = progress or Silent()
    findings: list[Finding] = []
    containers: list[Container] = []
    for name in files.names:
        try:
            containers.append(read_gguf(files, name))
        except InputError as error:
            message = str(error).removeprefix(f"{error.subject}: ")
            findings.append(Finding("readable", name, message))
    for container in containers:
        findings += _structure(container)
    errors: list[RoleError] = []
    notes: list[str] = []
    if depth == "structure":
        findings += _manifest_findings(files, containers, None)
    else:
        with Memo(_stamped(files, source)) as memo:
            findings += _manifest_findings(files, containers, memo)
            errors, more = _numbers(containers, source, memo, threads, progress)
        findings += more
        notes += memo.notes
    tensors = [entry for container in containers for entry in container.tensors.values()]
    counts = {
        "weights": len(tensors),
        "packed": sum(entry.kind.name not in FLOATS for entry in tensors),
        "files": len(files.names),
    }
    answers: list[Answer] = []
    if depth == "behaviour" and not findings:
        answers, findings, how = _behaviour(containers, threads)
        notes += how
    elif depth == "behaviour":
        notes.append(NOT_ASKED)
    return Verdict(
        artifact,
        "gguf",
        depth,
        counts,
        tuple(errors),
        tuple(findings),
        tuple(answers),
        tuple(notes),
    )


def _stamped(files: GgufFiles, source: Checkpoint | None) -> dict[str, Any]:
    assert files.root is not None  # fetched
    stamps = Folder(files.root).stamps()
    artifact = [str(files.root.resolve()), {name: list(stamps[name]) for name in files.names}]
    return {"artifact": artifact, "source": source and stamped(source)}


def _behaviour(
    containers: Sequence[Container], threads: int | None
) -> tuple[list[Answer], list[Finding], list[str]]:
    """Load every text model in llama.cpp and ask it everything but pictures."""
    answers: list[Answer] = []
    findings: list[Finding] = []
    notes = ["asked in llama.cpp, without pictures: the binding is built without its vision part"]
    for container in containers:
        if container.architecture == "clip":
            continue
        with LlamaAsker(container, threads or default_threads()) as asker:
            said = list(ask(asker, image=False))
        answers += [replace(answer, file=container.path.name) for answer in said]
        findings += [
            Finding(f.check, f"{container.path.name}: {f.subject}", f.message)
            for f in behaviour_findings(said)
        ]
    return answers, findings, notes


def _structure(container: Container) -> Iterator[Finding]:
    name = container.path.name
    if container.architecture not in KEYS:
        found = f"architecture {container.architecture!r}, expected {' or '.join(KEYS)}"
        yield Finding("metadata", name, found)
        return
    missing = missing_keys(container)
    yield from (Finding("metadata", name, f"no key {key}") for key in missing)
    if missing:
        return
    yield from _vocabulary(container)
    try:
        table = expected(container)
    except InputError as error:
        yield Finding("metadata", name, str(error).removeprefix(f"{error.subject}: "))
        return
    yield from _tensors(container, table)


def _vocabulary(container: Container) -> Iterator[Finding]:
    if container.architecture == "clip":
        return
    keys, name = container.keys, container.path.name
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    if len(tokens) != len(types):
        yield Finding("metadata", name, f"{len(tokens)} tokens, but {len(types)} token types")
    if len(set(tokens)) != len(tokens):
        yield Finding("metadata", name, "a token occurs twice")
    for key in ("eos_token_id", "padding_token_id", "bos_token_id"):
        value = keys.get(f"tokenizer.ggml.{key}", 0)
        if not 0 <= value < len(tokens):
            yield Finding("metadata", name, f"{key} is {value}, beyond the {len(tokens)} tokens")
    if "tokenizer.chat_template" not in keys:
        yield Finding("metadata", name, "no chat template: chat programs will guess one")


def _tensors(container: Container, table: Mapping[str, Tensor]) -> Iterator[Finding]:
    file = container.path.name
    for name, tensor in table.items():
        entry = container.tensors.get(name)
        if entry is None:
            yield Finding("tensors", f"{file}: {name}", "missing, but the keys promise it")
            continue
        if _squeezed(entry.shape) != _squeezed(tensor.shape):
            message = f"shape {list(entry.shape)}, expected {list(tensor.shape)} by the keys"
            yield Finding("tensors", f"{file}: {name}", message)
        if tensor.storage == "f32" and entry.kind.name != "f32":
            message = f"{entry.kind.name}, but llama.cpp computes with it in f32"
            yield Finding("tensors", f"{file}: {name}", message)
    for name in sorted(container.tensors.keys() - table.keys()):
        yield Finding("tensors", f"{file}: {name}", "not a tensor that the keys promise")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without leading ones, which ggml does not count."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _manifest_findings(
    files: GgufFiles, containers: list[Container], memo: Memo | None
) -> Iterator[Finding]:
    try:
        manifest = read_manifest(files.place)
    except InputError as error:
        yield Finding("manifest", MANIFEST_NAME, str(error).removeprefix(f"{error.subject}: "))
        return
    if manifest is None:
        return
    if files.whole:
        for name in sorted(manifest["files"].keys() - set(files.names)):
            yield Finding("files", name, f"missing, but {MANIFEST_NAME} lists it")
    for name in files.names:
        yield from _entry_findings(files, name, manifest["files"].get(name), memo)
    for container in containers:
        planned = manifest["tensors"].get(container.path.name, {})
        yield from _planned_findings(container, planned)


def _entry_findings(
    files: GgufFiles, name: str, entry: Mapping[str, Any] | None, memo: Memo | None
) -> Iterator[Finding]:
    if entry is None:
        yield Finding("files", name, f"not listed in {MANIFEST_NAME}")
        return
    size = files.place.sizes()[name]
    if size != entry["size"]:
        yield Finding("files", name, f"{size} bytes, expected {entry['size']}")
    elif memo is not None and files.root is not None:
        digest = memo.sha256(files.root / name)
        if digest != entry["sha256"]:
            message = f"sha256 {digest[:12]}..., written as {entry['sha256'][:12]}..."
            yield Finding("hash", name, message)


def _planned_findings(container: Container, planned: Mapping[str, str]) -> Iterator[Finding]:
    file = container.path.name
    stored = {
        name: (entry.kind.name, _squeezed(entry.shape)) for name, entry in container.tensors.items()
    }
    for name, text in planned.items():
        kind, _, shape = text.partition(" ")
        sizes = tuple(int(size) for size in shape.strip("[]").split(",") if size.strip().isdigit())
        if name not in stored:
            yield Finding("plan", f"{file}: {name}", f"planned as {text}, but not there")
        elif stored[name] != (kind, _squeezed(sizes)):
            found = f"{stored[name][0]} {list(stored[name][1])}"
            yield Finding("plan", f"{file}: {name}", f"{found}, planned as {text}")
    for name in sorted(stored.keys() - planned.keys()):
        yield Finding("plan", f"{file}: {name}", "not in the plan")


def _numbers(
    containers: list[Container],
    source: Checkpoint | None,
    memo: Memo,
    threads: int | None,
    progress: Progress,
) -> tuple[list[RoleError], list[Finding]]:
    errors: list[RoleError] = []
    findings: list[Finding] = []
    with Reader(source) if source else nullcontext() as reader:
        for container in containers:
            table = _originals(container, source) if source else {}
            mismatch = list(_source_findings(container, table)) if source else []
            findings += mismatch
            if mismatch:
                continue
            progress.begin(f"checking {container.path.name}", container.nbytes)
            try:
                rows, more = compare(
                    container, table, reader, memo=memo, threads=threads, progress=progress
                )
            finally:
                progress.end()
            errors += rows
            findings += more
    return errors, findings


def _originals(container: Container, source: Checkpoint) -> dict[str, Tensor]:
    items = inventory(source)
    if container.architecture == "clip":
        tensors = vision_tensors(items)
    else:
        tensors = text_tensors(items, source.config, mtp=_has_mtp(container))
    return {tensor.name: tensor for tensor in tensors}


def _has_mtp(container: Container) -> bool:
    return bool(container.keys.get(f"{container.architecture}.nextn_predict_layers"))


def _source_findings(container: Container, table: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Yield what keeps a file from being compared with the source."""
    file = container.path.name
    for name, tensor in table.items():
        entry = container.tensors.get(name)
        if entry is None:
            yield Finding("source", f"{file}: {name}", "in the source, but not here")
        elif _squeezed(entry.shape) != _squeezed(tensor.shape):
            message = f"shape {list(entry.shape)}, the source has {list(tensor.shape)}"
            yield Finding("source", f"{file}: {name}", message)
    for name in sorted(container.tensors.keys() - table.keys()):
        yield Finding("source", f"{file}: {name}", "not in the source")
