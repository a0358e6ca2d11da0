"""What becomes of the multi-token-prediction (MTP) layer, by the user's words."""

from __future__ import annotations

from qwen35.errors import UsageError, unknown_name

__all__ = ["MTP_CHOICES", "drops_mtp", "mtp_choice"]

MTP_CHOICES = ("keep", "drop", "separate")


def mtp_choice(mtp: str | None, *, drop: bool) -> str:
    """Return one of `MTP_CHOICES`.

    Args:
        mtp: `--mtp`, if given.
        drop: whether `--drop-mtp` is given, the short form of `--mtp drop`.

    Raises:
        UsageError: the choice is unknown, or the two differ.
    """
    if mtp is None:
        return "drop" if drop else "keep"
    if mtp not in MTP_CHOICES:
        raise unknown_name("--mtp", mtp, MTP_CHOICES)
    if drop and mtp != "drop":
        raise UsageError("--drop-mtp", f"not with --mtp {mtp}", hint="leave one of them out")
    return mtp


def drops_mtp(mtp: str | None, *, drop: bool) -> bool:
    """Return whether a checkpoint loses the layer; arguments as for `mtp_choice`.

    Raises:
        UsageError: as `mtp_choice`, or it is to be a file of its own, which is for GGUF.
    """
    choice = mtp_choice(mtp, drop=drop)
    if choice == "separate":
        found = "engines read a checkpoint's MTP layer beside its other weights"
        raise UsageError("--mtp separate", found, expected="keep or drop", hint="it is for GGUF")
    return choice == "drop"
