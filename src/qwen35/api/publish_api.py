"""Make a Hub repository like a folder, or the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qwen35.errors import InputError, UsageError
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
    """What the user asks for; as `publish` takes it."""

    folder: Path
    repo: str
    mode: Mode = "init"
    files: tuple[str, ...] = ()
    message: str | None = None
    private: bool = False
    delete: bool = False
    dry_run: bool = False
    save: Path | None = None
    sign: Path | None = None
    base_model: str | None = None

    @property
    def dry(self) -> bool:
        """Whether nothing is to be changed."""
        return self.dry_run or self.mode in _DRY


@dataclass(frozen=True)
class PublishResult:
    """What came of a sync.

    Args:
        diff: what was to be done.
        commit: what both sides hold now; None if nothing was done: a dry run, or a finding.
        text: what was done, in a line.
        notes: what the user should know.
    """

    diff: Diff
    commit: str | None = None
    text: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        value = {**self.diff.to_json(), "counters": counters(self.diff)}
        return value if self.commit is None else {**value, "commit": self.commit}


def publish(
    folder: str | Path,
    repo: str,
    *,
    mode: Mode | None = None,
    files: Sequence[str] = (),
    message: str | None = None,
    private: bool = False,
    delete: bool = False,
    dry_run: bool = False,
    save: str | Path | None = None,
    apply: str | Path | None = None,
    sign: str | Path | None = None,
    base_model: str | None = None,
    hf_token: str | None = None,
    progress: Progress | None = None,
) -> PublishResult:
    """Sync a folder with a repository of the Hub: one commit on the state compared, or nothing.

    Args:
        folder: of the artifact.
        repo: ``owner/name``.
        mode: ``init`` creates the repository if needed and uploads what is new or changed (the
            default), ``diff`` uploads that, ``files`` the files named, ``pull`` downloads;
            ``check`` and ``fetch`` only say what ``init`` and ``pull`` would do.
        files: with mode ``files``: paths in the folder.
        message: of the commit; by mode if None.
        private: if the repository is created.
        delete: also delete what only the side to change has.
        dry_run: change nothing; the result says what would be.
        save: with a dry run: write the difference to this file.
        apply: do what that file says, if it still holds.
        sign: sign the folder first, with this key (PEM).
        base_model: what the model card names as base.
        hf_token: for the Hub; by default HF_TOKEN, or the Hub client's own.
        progress: told of the bytes hashed and sent.

    Raises:
        InputError: something in the folder must not be published, or it cannot be read.
        UsageError: arguments that do not go together.
        HubError: the Hub refused, was not reached, or has changed meanwhile.
        OutputError: the disk is full or something is in the way.
    """
    asked = PublishRequest(
        folder=Path(folder),
        repo=repo,
        mode=mode or "init",
        files=tuple(files),
        message=message,
        private=private,
        delete=delete,
        dry_run=dry_run,
        save=Path(save) if save else None,
        sign=Path(sign) if sign else None,
        base_model=base_model,
    )
    sync = prepare(asked, apply=apply, given=mode is not None, token=hf_token, progress=progress)
    if sync.asked.dry:
        return PublishResult(sync.diff)
    return (sync if sync.stopped else sync.finished()).carry_out(progress)


@dataclass(frozen=True)
class PreparedSync:
    """A difference that was looked at, and can be carried out.

    Args:
        asked: what was asked for, with what a saved difference brought.
        target: the folder and the repository.
        diff: what is to be done.
    """

    asked: PublishRequest
    target: SyncTarget = field(repr=False)
    diff: Diff

    @property
    def stopped(self) -> bool:
        """Whether something was found that must not be published."""
        return bool(self.diff.findings)

    def finished(self) -> PreparedSync:
        """Write the documents that the diff shows, and sign; return what is to be done then."""
        from qwen35.publishing.sync import finish_folder

        asked = self.asked
        if asked.mode in ("init", "diff") and finish_folder(
            self.target, base_model=asked.base_model, signing_key=asked.sign
        ):
            return replace(self, diff=_diff(asked, self.target))
        return self

    def carry_out(self, progress: Progress | None = None) -> PublishResult:
        """Do it.

        Raises:
            InputError: something in the folder must not be published, or changed meanwhile.
            HubError: the Hub refused, was not reached, or has changed meanwhile.
            OutputError: the disk is full or something is in the way.
        """
        if self.stopped:
            first, more = self.diff.findings[0], len(self.diff.findings) - 1
            found = f"{first.message}{f' (and {more} more)' if more else ''}"
            raise InputError(first.subject, found, hint="mode check names everything")
        return self._pull(progress) if self.asked.mode in _PULLS else self._push(progress)

    def _push(self, progress: Progress | None) -> PublishResult:
        from qwen35.publishing.push import apply_push

        asked, target = self.asked, self.target
        pushed = apply_push(
            self.diff,
            target.folder,
            message=asked.message or _MESSAGES[asked.mode],
            token=target.token,
            private=asked.private,
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
    asked: PublishRequest,
    *,
    apply: str | Path | None = None,
    given: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> PreparedSync:
    """Compare the folder with the repository; writes only what `PublishRequest.save` names.

    Args:
        asked: what is asked for.
        apply: a saved difference that this must still be.
        given: whether the mode was asked for, and is not the default.
        token: for the Hub; by default HF_TOKEN, or the Hub client's own.
        progress: told of the bytes hashed.

    Raises:
        InputError: the folder or the saved difference cannot be read.
        UsageError: arguments that do not go together.
        HubError: the Hub refused, or was not reached.
    """
    from qwen35.publishing.sync import SyncTarget, check_token, save_diff

    saved = load_diff(Path(apply)) if apply else None
    if saved:
        asked = _followed(asked, saved, str(apply), given)
    _check(asked, applies=saved is not None)
    target = SyncTarget.of(asked.folder, asked.repo, token, progress)
    if not asked.dry and asked.mode not in _PULLS:
        check_token(target)
    diff = _diff(asked, target)
    if saved:
        check_same(saved, diff)
    if asked.save:
        save_diff(diff, asked.save)
    return PreparedSync(asked, target, diff)


def _followed(asked: PublishRequest, saved: Diff, name: str, given: bool) -> PublishRequest:
    """Take mode, files and deletion from a saved difference."""
    if given or asked.files or asked.delete:
        raise UsageError("--apply", "brings its own mode, files and deletions", hint="leave yours")
    if saved.repo != asked.repo:
        raise UsageError(name, f"is for {saved.repo}", expected=asked.repo)
    push: Mode = "files" if saved.only else "diff" if saved.base else "init"
    mode: Mode = "pull" if saved.direction == "pull" else push
    return replace(asked, mode=mode, files=saved.only, delete=saved.delete)


def _check(asked: PublishRequest, *, applies: bool) -> None:
    """Refuse what does not go together, before anything is looked at."""
    if asked.mode not in get_args(Mode):
        raise UsageError(f"--mode {asked.mode}", "unknown", expected=", ".join(get_args(Mode)))
    if (asked.mode == "files") != bool(asked.files):
        needs = asked.mode == "files"
        found = "needs --files" if needs else "takes no --files"
        hint = "name them with --files" if needs else "leave them out, or use mode files"
        raise UsageError(f"--mode {asked.mode}", found, hint=hint)
    if asked.delete and asked.mode in ("init", "files"):
        found = f"mode {asked.mode} deletes nothing"
        raise UsageError("--delete", found, hint="use diff or pull")
    if asked.save and not asked.dry:
        raise UsageError("--save", "is for a dry run", hint="add --dry-run")
    if asked.save and asked.save.resolve().is_relative_to(asked.folder.resolve()):
        raise UsageError(f"--save {asked.save}", "lies in the folder", hint="save it elsewhere")
    if asked.sign and (asked.mode in (*_PULLS, "files") or asked.dry or applies):
        raise UsageError("--sign", "is for a fresh push of the folder", hint="leave it out")


def _diff(asked: PublishRequest, target: SyncTarget) -> Diff:
    from qwen35.publishing.sync import diff_pull, diff_push

    if asked.mode in _PULLS:
        return diff_pull(target, delete=asked.delete)
    return diff_push(
        target,
        create=asked.mode in ("init", "check"),
        delete=asked.delete,
        only=asked.files,
        base_model=asked.base_model,
    )
