"""llama.cpp on the CPU, through llama-cpp-python's low-level bindings."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.array_types import F32
from qwen35.closing import Closing
from qwen35.errors import InputError, UsageError, extra_hint

__all__ = ["Llama", "llama_cpp"]

_CACHE_F32 = 0
"""``GGML_TYPE_F32``: an exact attention cache."""


@cache
def llama_cpp() -> Any:
    """Return the bindings with llama.cpp's logging off.

    Raises:
        UsageError: they are not installed.
    """
    try:
        import llama_cpp as binding
    except ImportError as error:
        found = f"{error.name} is not installed"
        hint = f"{extra_hint('llama-cpp')}, or evaluate --streamed, which does without"
        raise UsageError("running a GGUF file", found, hint=hint) from error
    quiet = binding.llama_log_callback(lambda *_: None)
    binding.llama_log_set(quiet, ctypes.c_void_p(0))
    # llama.cpp keeps the pointer, so the callback must not be collected.
    llama_cpp.quiet = quiet  # type: ignore[attr-defined]
    binding.llama_backend_init()
    return binding


class Llama(Closing):
    """A loaded model, without the kernels that fail on some processors.

    Args:
        path: the GGUF file.
        context: maximum tokens.
        threads: for llama.cpp.
        vocabulary_only: load only the vocabulary, to encode and decode.
        at_once: tokens of a prompt that are computed together; all of them if None.

    Raises:
        InputError: llama.cpp cannot load the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int = 1024,
        threads: int = 1,
        vocabulary_only: bool = False,
        at_once: int | None = None,
    ) -> None:
        self._llama = llama_cpp()
        self._context: Any = None
        params = self._llama.llama_model_default_params()
        params.vocab_only = vocabulary_only
        # Repacking selects AMX kernels; depending on the compiler they crash or compute garbage.
        params.use_extra_bufts = False
        params.n_gpu_layers = 0
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise InputError(path.name, "llama.cpp cannot load it", hint="qwen35 verify it first")
        self.context = context
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.tokens = int(self._llama.llama_vocab_n_tokens(self._vocabulary))
        if vocabulary_only:
            return
        options = self._llama.llama_context_default_params()
        # One batch holds a whole context, so that all its logits come from one call.
        options.n_ctx = options.n_batch = options.n_ubatch = context
        if at_once is not None:
            options.n_ubatch = min(at_once, context)
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = _CACHE_F32
        self._context = self._llama.llama_init_from_model(self._model, options)
        if not self._context:
            self.close()
            raise InputError(path.name, f"llama.cpp cannot create a context of {context} tokens")

    def close(self) -> None:
        """Free the model; closing twice is harmless."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._context = self._model = None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return token ids; without `special`, special tokens in the text stay plain text."""
        data = text.encode()
        ids = (self._llama.llama_token * (len(data) + 8))()  # at most one token per byte
        count = self._llama.llama_tokenize(
            self._vocabulary, data, len(data), ids, len(ids), False, special
        )
        if count < 0:
            raise RuntimeError(f"llama_tokenize returned {count}")
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        pieces = []
        buffer = ctypes.create_string_buffer(1024)
        for token in ids:
            size = self._llama.llama_token_to_piece(self._vocabulary, token, buffer, 1024, 0, True)
            pieces.append(buffer.raw[: max(0, size)])
        return b"".join(pieces).decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Return whether a token ends a turn."""
        return bool(self._llama.llama_vocab_is_eog(self._vocabulary, token))

    def logits(self, ids: Sequence[int], first: int = 0) -> F32:
        """Return the logits after each token from `first` on, [len(ids) - first, vocabulary]."""
        return self.lend_logits(ids, first).copy()

    def lend_logits(self, ids: Sequence[int], first: int) -> F32:
        """Return `logits` as a view of llama.cpp's memory.

        The next call of any method overwrites them, and `close` frees them.
        """
        self._clear()
        self._feed(ids, 0, first)
        pointer = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (len(ids) - first, self.tokens))

    def seconds(self, prompt: int, generated: int) -> tuple[float, float]:
        """Return the seconds for processing `prompt` tokens, and for generating `generated`."""
        self._clear()
        begin = time.perf_counter()
        self._feed([0] * prompt, 0, prompt - 1)
        self._llama.llama_synchronize(self._context)
        middle = time.perf_counter()
        for i in range(generated):
            self._feed([0], prompt + i, 0)
            self._llama.llama_synchronize(self._context)  # decoding may be asynchronous
        return middle - begin, time.perf_counter() - middle

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _feed(self, ids: Sequence[int], start: int, first: int) -> None:
        """Run tokens from position `start`; compute logits from the `first` of them on."""
        batch = self._llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i >= first
        status = self._llama.llama_decode(self._context, batch)
        self._llama.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def answer(
        self,
        prompt: Sequence[int],
        limit: int = 96,
        adjust: Callable[[F32, Sequence[int]], F32] | None = None,
    ) -> list[int]:
        """Continue `prompt` greedily until a token ends the turn.

        Args:
            prompt: token ids.
            limit: maximum new tokens, also limited by the context.
            adjust: called with the logits and all tokens so far, returns adjusted logits.
        """
        self._clear()
        self._feed(prompt, 0, len(prompt) - 1)
        generated: list[int] = []
        while len(generated) < min(limit, self.context - len(prompt)):
            pointer = self._llama.llama_get_logits_ith(self._context, -1)
            row = np.ctypeslib.as_array(pointer, (self.tokens,))
            if adjust is not None:
                row = adjust(row, [*prompt, *generated])
            token = int(row.argmax())
            if self.ends(token):
                break
            generated.append(token)
            self._feed([token], len(prompt) + len(generated) - 1, 0)
        return generated
