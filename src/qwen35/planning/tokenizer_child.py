"""Load a tokenizer as engines do, and encode texts with it.

Runs as a bounded child (`qwen35.planning.bounded_child`). Its input are blocks, each after its
length in 8 bytes: tokenizer.json, then texts. It answers ``E`` and what is wrong, or ``I`` and, for
each text, the number of its tokens and their ids, as 4-byte integers. All are little-endian.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator


def blocks(data: io.BytesIO) -> Iterator[bytes]:
    """Yield the blocks of the input."""
    while head := data.read(8):
        yield data.read(struct.unpack("<Q", head)[0])


def answer(tokenizer: bytes, texts: Iterator[bytes]) -> bytes:
    """Return the answer; `Exception` and more if there is none."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_buffer(tokenizer)
    loaded.no_truncation()
    loaded.no_padding()
    out = io.BytesIO()
    for text in texts:
        ids = loaded.encode(text.decode(), add_special_tokens=False).ids  # no BOS before a text
        out.write(struct.pack(f"<{1 + len(ids)}I", len(ids), *ids))
    return b"I" + out.getvalue()


def main() -> None:
    """Read the input and answer."""
    tokenizer, *texts = blocks(io.BytesIO(sys.stdin.buffer.read()))
    try:
        found = answer(tokenizer, iter(texts))
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no `Exception`
        found = b"E" + (f"{error}"[:200] or type(error).__name__).encode(errors="replace")
    sys.stdout.buffer.write(found)


if __name__ == "__main__":
    main()
