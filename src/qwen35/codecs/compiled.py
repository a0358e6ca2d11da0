"""Decorators for Numba kernels, compiled once and cached on disk."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

__all__ = ["compiled", "inlined"]


def _import_numba() -> None:
    """Import Numba without the settings that it reads from the working directory.

    A ``.numba_config.yaml`` there could name the folder of compiled kernels, which are pickled, or
    change what is compiled. Variables of the environment count as ever.
    """
    if "numba" in sys.modules:  # a program that uses it has its own settings
        return
    yaml = sys.modules.get("yaml")
    sys.modules["yaml"] = None  # type: ignore[assignment]  # makes its import fail
    try:
        with warnings.catch_warnings(action="ignore"):  # that such a file needs it
            from numba.core import config
    finally:
        del sys.modules["yaml"]
        if yaml is not None:
            sys.modules["yaml"] = yaml
    config._config_fname = ""  # it looks again whenever it compiles


_import_numba()

from numba import njit  # noqa: E402


def _import_arrays() -> None:
    """Import Numba's array functions without SciPy, which takes longer to import than Numba.

    Numba imports SciPy's BLAS for matrix products in kernels. Ours have none; other kernels in this
    process still find BLAS.
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

from numba.core import event  # noqa: E402

_LOG = logging.getLogger(__name__)


class _FirstCompilation(event.Listener):
    """Says once that kernels are being compiled: seconds in which nothing else moves.

    Numba has no such event for kernels that it finds in its cache.
    """

    said = False

    def on_start(self, event_: Any) -> None:
        """Log it, unless it was."""
        del event_
        if not self.said:
            self.said = True
            _LOG.info("compiling kernels, only the first time")

    def on_end(self, event_: Any) -> None:
        """Do nothing."""


event.register("numba:compile", _FirstCompilation())


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel, cached on disk if possible.

    Float operations are never reordered (no fastmath), so that results do not depend on the
    processor's vector width.
    """
    # nogil: threads encode in parallel. error_model: x / 0 is inf, without a branch per division.
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package folder nor the user's cache is writable
        return njit(**options)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a function that is inlined into kernels."""
    return njit(inline="always")(function)
