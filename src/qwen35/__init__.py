"""Ship Qwen3.5 checkpoints: quantized, verified, measured, published.

Every verb of the command line is a function here, with the same name; a flag is a keyword:

>>> import qwen35
>>> plan = qwen35.plan("Qwen3.5-9B", recipe="nf4")
>>> sum(step.op == "nf4" for step in plan.steps), plan.nbytes > 7 * 10**9
(248, True)

What is expected to go wrong raises `Qwen35Error` or a kind of it (`qwen35.errors`); nothing is
printed. Importing this package loads none of its modules: each is imported when it is first used.

Most verbs are called as a module is, where their work is done. ``qwen35.plan`` is the function,
always; it has the attributes of the module too, so that ``qwen35.plan.recipe`` is what it seems.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qwen35.version import __version__

if TYPE_CHECKING:
    from qwen35.api.calibrate import calibrate as calibrate
    from qwen35.api.convert import convert as convert
    from qwen35.api.evaluate import evaluate as evaluate
    from qwen35.api.finalize import finalize as finalize
    from qwen35.api.gguf import gguf as gguf
    from qwen35.api.inspect import inspect as inspect
    from qwen35.api.plan import plan as plan
    from qwen35.api.publish import publish as publish
    from qwen35.api.reproduce import reproduce as reproduce
    from qwen35.api.run import run as run
    from qwen35.api.tune import tune as tune
    from qwen35.api.verify import verify as verify
    from qwen35.errors import Qwen35Error as Qwen35Error

__all__ = [
    "Qwen35Error",
    "__version__",
    "calibrate",
    "convert",
    "evaluate",
    "finalize",
    "gguf",
    "inspect",
    "plan",
    "publish",
    "reproduce",
    "run",
    "tune",
    "verify",
]

_HOMES = {"Qwen35Error": "qwen35.errors"} | {
    name: f"qwen35.api.{name}" for name in __all__ if name.islower() and name.isalpha()
}

_MODULES = (
    "calibrate",
    "evaluate",
    "plan",
    "publish",
    "reproduce",
    "tune",
    "verify",
)
"""Verbs that modules are called as; reading and setting their attributes reaches the module."""


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("qwen35.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen35' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        # The function stands where `import qwen35.plan` would put the module of the same name.
        # Sharing the module's dictionary (its own, not a copy) lets `qwen35.plan.recipe` and
        # monkeypatching through that path reach the module; a function calls with its __globals__,
        # which this does not touch.
        found.__dict__ = importlib.import_module(f"qwen35.{name}").__dict__
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "errors"]


class _Package(ModuleType):
    """Keeps the verbs: importing a module of the same name would put that in their place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
