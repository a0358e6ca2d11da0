"""Numba kernels, compiled once and kept in its on-disk cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled", "inlined"]


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel, kept on disk where there is a place for it.

    No reordering of float operations is allowed: a result depends on no processor's vector width.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(**options)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a part of kernels, copied into each."""
    return njit(inline="always")(function)
