"""Sync a folder with a repository on the Hub, in either direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qwen35.api.argument_kinds import plain_arguments
from qwen35.api.given_values import listed
from qwen35.errors import InputError, UsageError, unknown_name
from qwen35.planning.source_card import card_words
from qwen35.progress import Progress
from qwen35.publishing.diff import Diff, check_same, load_diff
from qwen35.publishing.diff_display import counters

if TYPE_CHECKING:
    from qwen35.publishing.sync import SyncTarget

__all__ = ["Mode", "PreparedSync", "PublishRequest", "PublishResult", "prepare", "publish"]

Mode = Literal["init", "files", "diff", "check", "pull", "fetch"]

_PULLS = ("pull", "fetch")
_DRY = ("check", "fetch")
_MESSAGES = {"init": "Upload model", "files": "Update files", "diff": "Push changed files"}


@dataclass(frozen=True)
class PublishRequest:
    """The arguments of `publish`."""

    folder: Path
    repo: str
    mode: Mode = "init"
    files: tuple[str, ...] = ()
    message: str | None = None
    private: bool = False
    delete: bool = False
    overwrite: bool = False
    dry_run: bool = False
    save: Path | None = None
    sign: Path | None = None
    base_model: str | None = None

    @property
    def dry(self) -> bool:
        """Whether to change nothing."""
        return self.dry_run or self.mode in _DRY


@dataclass(frozen=True)
class PublishResult:
    """The result of a sync.

    Args:
        diff: the operations.
        commit: the commit that both sides now hold; None for a dry run or with findings.
        text: one line that describes the result.
        notes: messages for the user.
    """

    diff: Diff
    commit: str | None = None
    text: str = ""
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<PublishResult {self.text}>"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        value = {**self.diff.to_json(), "counters": counters(self.diff)}
        return value if self.commit is None else {**value, "commit": self.commit}


@plain_arguments
def publish(
    folder: str | Path,
    repo: str,
    *,
    mode: Mode | None = None,
    files: str | Sequence[str] = (),
    message: str | None = None,
    private: bool = False,
    delete: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    save: str | Path | None = None,
    apply: str | Path | None = None,
    sign: str | Path | None = None,
    base_model: str | None = None,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> PublishResult:
    """Sync a folder with a Hub repository: one commit on the compared state, or nothing.

    Args:
        folder: of the artifact.
        repo: ``owner/name``.
        mode: ``init`` (the default) creates the repository if needed and uploads new and changed
            files, ``diff`` only uploads them, ``files`` uploads the named files, ``pull``
            downloads; ``check`` and ``fetch`` only show what ``init`` and ``pull`` would do.
        files: with mode ``files``: paths in the folder.
        message: commit message; depends on the mode if None.
        private: make a newly created repository private.
        delete: also delete files that only the target has.
        overwrite: with a pull: also replace files that were changed here.
        dry_run: change nothing; the result shows the difference.
        save: with a dry run: write the difference to this file.
        apply: apply the difference saved in this file, if it is still current.
        sign: first sign the folder with this key (PEM).
        base_model: the base named in the model card.
        hf_token: for the Hub; by default HF_TOKEN or the Hub client's token.
        progress: receives bytes hashed and sent.

    Raises:
        InputError: the folder holds something that must not be published, or cannot be read.
        UsageError: arguments do not fit together.
        HubError: the Hub refused, could not be reached, or has changed in the meantime.
        OutputError: the disk is full, or an existing file is in the way.
    """
    request = PublishRequest(
        folder=Path(folder),
        repo=repo,
        mode=mode or "init",
        files=listed(files),
        message=message,
        private=private,
        delete=delete,
        overwrite=overwrite,
        dry_run=dry_run,
        save=Path(save) if save else None,
        sign=Path(sign) if sign else None,
        base_model=base_model,
    )
    sync = prepare(
        request,
        apply=apply,
        explicit_mode=mode is not None,
        token=hf_token,
        progress=progress,
    )
    if sync.request.dry:
        return PublishResult(sync.diff)
    return (sync if sync.stopped else sync.finished()).carry_out(progress)


@dataclass(frozen=True)
class PreparedSync:
    """A difference that is ready to be applied.

    Args:
        request: the arguments, updated from a saved difference.
        target: the folder and the repository.
        diff: the operations.
    """

    request: PublishRequest
    target: SyncTarget = field(repr=False)
    diff: Diff

    @property
    def stopped(self) -> bool:
        """Whether there are findings, which block publishing."""
        return bool(self.diff.findings)

    def finished(self) -> PreparedSync:
        """Write the documents in the diff and sign; return the updated sync."""
        from qwen35.publishing.sync import finish_folder

        request = self.request
        if request.mode in ("init", "diff") and finish_folder(
            self.target, base_model=request.base_model, signing_key=request.sign
        ):
            return replace(self, diff=_diff(request, self.target))
        return self

    def carry_out(self, progress: Progress | None = None) -> PublishResult:
        """Apply the difference.

        Raises:
            InputError: the folder holds something that must not be published, or has changed.
            HubError: the Hub refused, could not be reached, or has changed in the meantime.
            OutputError: the disk is full, or an existing file is in the way.
        """
        if self.stopped:
            first, others = self.diff.findings[0], len(self.diff.findings) - 1
            found = f"{first.message}{f' (and {others} more)' if others else ''}"
            raise InputError(first.subject, found, hint="mode check lists all of them")
        return self._pull(progress) if self.request.mode in _PULLS else self._push(progress)

    def _push(self, progress: Progress | None) -> PublishResult:
        from qwen35.publishing.push import apply_push

        request, target = self.request, self.target
        pushed = apply_push(
            self.diff,
            target.folder,
            message=request.message or _MESSAGES[request.mode],
            token=target.token,
            private=request.private,
            hasher=target.hasher,
            progress=progress,
        )
        done = "holds all of it, verified" if self.diff.changes else "nothing to do"
        text = f"{target.repo}@{pushed.commit[:12]}: {done}"
        return PublishResult(self.diff, pushed.commit, text, tuple(pushed.notes))

    def _pull(self, progress: Progress | None) -> PublishResult:
        from qwen35.publishing.pull import apply_pull

        target = self.target
        pulled = apply_pull(
            self.diff,
            target.folder,
            token=target.token,
            hasher=target.hasher,
            progress=progress,
        )
        text = f"{pulled.folder}: as {target.repo}@{pulled.commit[:12]}"
        return PublishResult(self.diff, pulled.commit, text)


def prepare(
    request: PublishRequest,
    *,
    apply: str | Path | None = None,
    explicit_mode: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> PreparedSync:
    """Compare the folder with the repository; only writes the file `PublishRequest.save`.

    Args:
        request: the arguments.
        apply: a saved difference, which must still be current.
        explicit_mode: whether the user named the mode.
        token: for the Hub; by default HF_TOKEN or the Hub client's token.
        progress: receives bytes hashed.

    Raises:
        InputError: the folder or the saved difference cannot be read.
        UsageError: arguments do not fit together.
        HubError: the Hub refused a request or could not be reached.
    """
    from qwen35.publishing.sync import SyncTarget, check_token, save_diff

    saved = load_diff(Path(apply)) if apply else None
    if saved:
        request = _with_saved(request, saved, str(apply), explicit_mode)
    _check(request, applies=saved is not None)
    target = SyncTarget.of(request.folder, request.repo, token, progress)
    if not request.dry and request.mode not in _PULLS:
        check_token(target)  # before the comparison, which hashes the whole folder
    diff = _diff(request, target)
    if saved:
        check_same(saved, diff)  # never apply a difference that has become outdated
    if request.save:
        save_diff(diff, request.save)
    return PreparedSync(request, target, diff)


def _with_saved(
    request: PublishRequest, saved: Diff, name: str, explicit_mode: bool
) -> PublishRequest:
    """Return the request with mode, files and deletion of a saved difference."""
    if explicit_mode or request.files or request.delete:
        raise UsageError("--apply", "brings its own mode, files and deletions", hint="leave yours")
    if saved.repo != request.repo:
        raise UsageError(name, f"is for {saved.repo}", expected=request.repo)
    push: Mode = "files" if saved.only else "diff" if saved.base else "init"
    mode: Mode = "pull" if saved.direction == "pull" else push
    return replace(request, mode=mode, files=saved.only, delete=saved.delete)


def _check_base(name: str | None) -> None:
    if name is not None and not card_words({"base_model": name}):
        found = f"is {repr(name)[:80]}"
        raise UsageError("--base-model", found, expected="a repository on the Hub, OWNER/NAME")


def _check(request: PublishRequest, *, applies: bool) -> None:
    """Refuse arguments that do not fit together, before reading anything."""
    _check_base(request.base_model)
    if request.mode not in get_args(Mode):
        raise unknown_name(f"--mode {request.mode}", request.mode, get_args(Mode), "unknown")
    if (request.mode == "files") != bool(request.files):
        needs = request.mode == "files"
        found = "needs --files" if needs else "takes no --files"
        hint = "name them with --files" if needs else "leave them out, or use mode files"
        raise UsageError(f"--mode {request.mode}", found, hint=hint)
    if request.delete and request.mode in ("init", "files"):
        found = f"mode {request.mode} deletes nothing"
        raise UsageError("--delete", found, hint="use diff or pull")
    if request.overwrite and request.mode not in _PULLS:
        raise UsageError("--overwrite", "is for a pull", hint="use pull or fetch")
    if request.save and not request.dry:
        raise UsageError("--save", "is for a dry run", hint="add --dry-run")
    if request.save and request.save.resolve().is_relative_to(request.folder.resolve()):
        raise UsageError(f"--save {request.save}", "is in the folder", hint="save it elsewhere")
    if request.sign and (request.mode in (*_PULLS, "files") or request.dry or applies):
        raise UsageError("--sign", "is for a fresh push of the folder", hint="leave it out")


def _diff(request: PublishRequest, target: SyncTarget) -> Diff:
    from qwen35.publishing.sync import diff_pull, diff_push

    if request.mode in _PULLS:
        return diff_pull(target, delete=request.delete, overwrite=request.overwrite)
    return diff_push(
        target,
        create=request.mode in ("init", "check"),
        delete=request.delete,
        only=request.files,
        base_model=request.base_model,
    )
