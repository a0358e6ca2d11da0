"""Ship Qwen3.5 checkpoints: quantized, verified, measured, published.

Every verb of the command line but `ui` is a function here, with the same name; a flag is a keyword:

>>> import qwen35
>>> plan = qwen35.plan("Qwen3.5-9B", recipe="nf4")
>>> sum(step.op == "nf4" for step in plan.steps), plan.nbytes > 7 * 10**9
(248, True)

Expected failures raise a subclass of `Qwen35Error` (`qwen35.errors`); nothing is printed. Importing
this package loads none of its modules; each is imported on first use.
"""

# No `from __future__` here: that is an import too, and none may come before this.
import sys

if (
    sys.argv[:1] == ["-m"]
    and any(word.removeprefix("-m").split(".")[0] == __name__ for word in sys.orig_argv)
    and not sys.flags.safe_path
):
    # `python -m qwen35`: Python puts the working directory first, so that a numbers.py in a model
    # folder would run in the place of Python's own.
    del sys.path[0]

import importlib
from typing import TYPE_CHECKING, Any

from qwen35.version import __version__

if TYPE_CHECKING:
    from qwen35.api.amend_api import amend as amend
    from qwen35.api.calibrate_api import calibrate as calibrate
    from qwen35.api.convert_api import convert as convert
    from qwen35.api.evaluate_api import evaluate as evaluate
    from qwen35.api.finalize_api import finalize as finalize
    from qwen35.api.gguf_api import gguf as gguf
    from qwen35.api.inspect_api import inspect as inspect
    from qwen35.api.merge_api import merge as merge
    from qwen35.api.plan_api import plan as plan
    from qwen35.api.publish_api import publish as publish
    from qwen35.api.report_api import report as report
    from qwen35.api.reproduce_api import reproduce as reproduce
    from qwen35.api.run_api import run as run
    from qwen35.api.tune_api import tune as tune
    from qwen35.api.verify_api import verify as verify
    from qwen35.errors import Qwen35Error as Qwen35Error

__all__ = [
    "Qwen35Error",
    "__version__",
    "amend",
    "calibrate",
    "convert",
    "evaluate",
    "finalize",
    "gguf",
    "inspect",
    "merge",
    "plan",
    "publish",
    "report",
    "reproduce",
    "run",
    "tune",
    "verify",
]

_HOMES = {"Qwen35Error": "qwen35.errors"} | {
    name: f"qwen35.api.{name}_api" for name in __all__ if name.islower() and name.isalpha()
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("qwen35.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen35' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access skips __getattr__
    return value


def __dir__() -> list[str]:
    return [*__all__, "errors"]
