"""Sign all files of a folder with the `model-signing` library (OpenSSF)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qwen35.checkpoint.locations import read_bounded
from qwen35.errors import InputError, UsageError, extra_hint
from qwen35.sinks.staging import os_errors

__all__ = ["SIGNATURE_NAME", "sign"]

SIGNATURE_NAME = "model.sig"
# the signature itself, and the cache of the Hub's client
_IGNORED = (SIGNATURE_NAME, f".qwen35-{SIGNATURE_NAME}.partial", ".cache")


def sign(folder: Path, private_key: Path) -> bool:
    """Sign a folder with an elliptic-curve key, unless it has a valid signature by this key.

    Anyone with the public key verifies a copy with
    ``model_signing verify key --signature model.sig --public_key KEY FOLDER``.

    Returns:
        Whether a new signature was written to `SIGNATURE_NAME`.

    Raises:
        UsageError: the library is not installed, or the key cannot be used.
        InputError: the folder cannot be signed.
    """
    try:
        from model_signing import hashing, signing
    except ImportError as error:
        raise UsageError(
            "--sign", "model-signing is not installed", hint=extra_hint("sign")
        ) from error
    key = _load(private_key)
    if _holds(folder, key):
        return False
    beside = folder / f".qwen35-{SIGNATURE_NAME}.partial"
    ignored = [folder / name for name in _IGNORED]
    config = signing.Config().use_elliptic_key_signer(private_key=private_key)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=ignored))
    with os_errors(folder):
        try:
            config.sign(folder, beside)
            beside.replace(folder / SIGNATURE_NAME)
        except ValueError as error:
            raise InputError(str(folder), f"cannot be signed ({error})") from error
        finally:
            beside.unlink(missing_ok=True)
    return True


def _load(private_key: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    subject, expected = f"--sign {private_key}", "an elliptic-curve key in PEM, without password"
    try:
        key = load_pem_private_key(read_bounded(private_key), None)
    except (ValueError, TypeError) as error:
        raise UsageError(subject, "not such a key", expected=expected) from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UsageError(subject, "a key of another kind", expected=expected)
    return key


def _holds(folder: Path, key: Any) -> bool:
    """Return whether there is a valid signature of the present files by this key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from model_signing import verifying

    if not (folder / SIGNATURE_NAME).is_file():
        return False
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with tempfile.NamedTemporaryFile(suffix=".pub") as file:
        file.write(public)
        file.flush()
        config = verifying.Config().use_elliptic_key_verifier(public_key=Path(file.name))
        try:
            config.verify(folder, folder / SIGNATURE_NAME)
        except (ValueError, InvalidSignature):
            return False
    return True
