"""Numba kernels, compiled once and kept in its on-disk cache."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from numba import njit

__all__ = ["compiled", "inlined"]


def _import_arrays() -> None:
    """Import Numba's array functions without SciPy, which takes longer than all of Numba.

    They look for its BLAS when they are imported, for products of matrices in kernels. We have
    none; kernels of others in this process find it as they would have.
    """
    blas, arrays = "scipy.linalg.cython_blas", "numba.np.arraymath"
    if blas in sys.modules or arrays in sys.modules:
        return
    sys.modules[blas] = None  # type: ignore[assignment]  # makes its import fail
    try:
        from numba.np import arraymath
    finally:
        del sys.modules[blas]
    arraymath._HAVE_BLAS = find_spec("scipy") is not None


_import_arrays()


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
