"""The picture of a question, as a PNG file without a library for pictures."""

from __future__ import annotations

import base64
import struct
import zlib

from qwen35.verification.questions import Halves

__all__ = ["picture_address"]

_COLOURS = {"red": b"\xff\x00\x00", "blue": b"\x00\x00\xff"}


def picture_address(picture: Halves) -> str:
    """Return a picture as a ``data:`` address."""
    left = picture.width // 2
    row = _COLOURS[picture.left] * left + _COLOURS[picture.right] * (picture.width - left)
    head = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 0)
    body = zlib.compress((b"\x00" + row) * picture.height, 9)
    parts = (_part(b"IHDR", head), _part(b"IDAT", body), _part(b"IEND", b""))
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
    return f"data:image/png;base64,{encoded}"


def _part(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
