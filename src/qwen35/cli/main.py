"""The command `qwen35`: a table of verbs, each in a module that is imported when it is used."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_INTERRUPTED, EXIT_USAGE
from qwen35.cli.help import HelpFormatter
from qwen35.errors import Qwen35Error, UsageError, did_you_mean
from qwen35.version import __version__

__all__ = ["SHELLS", "VERBS", "main", "parser_of", "run_verb", "whole_parser"]

VERBS: dict[str, str] = {
    "inspect": "what a checkpoint is, from its headers",
    "plan": "what would be written: every file and tensor, to the byte",
    "convert": "write a quantized or text-only checkpoint",
    "gguf": "write GGUF files for llama.cpp, quantized or not",
    "calibrate": "activation statistics and an importance matrix, layer by layer",
    "verify": "check an artifact, alone or against its source",
    "evaluate": "perplexity and KL divergence of quantized models, in one table",
    "tune": "find the recipe that loses least under a budget",
    "run": "a path to a repository: make, verify, measure, publish",
    "publish": "make a Hub repository like a folder, or the other way round",
    "reproduce": "make an artifact again from its manifest and compare",
    "finalize": "put together what the slices of a conversion have written",
}
"""Verb to what it does; the module is `qwen35.cli.<verb>_command`."""

SHELLS = ("bash", "fish", "zsh")

_START = """\
start here:
  qwen35 plan Qwen3.5-9B --recipe nf4       what would come out, no download
  qwen35 convert MODEL OUT --recipe nf4     write it
  qwen35 verify OUT --source MODEL          check every byte of it
  qwen35 VERB --help                        everything else, with examples
"""

_EPILOG = """\
MODEL is a folder, a Hub id (owner/name[@revision]) or, to plan or inspect, a
published size.

Exit codes: 0 fine, 1 findings, 2 wrong input or usage, 130 interrupted.
"""

_OUT_OF_MEMORY = UsageError(
    "memory",
    "there is not enough of it",
    hint="use fewer --threads, or name what there is with --memory; qwen35 plan says the need",
)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {verb:<{width}}{text}" for verb, text in VERBS.items())
    lead = "Ship Qwen3.5 checkpoints: quantized, verified, measured, published."
    parser = argparse.ArgumentParser(
        prog="qwen35",
        usage="qwen35 [--version] VERB ...",
        description=f"{lead}\n\n{_START}\nverbs:\n{verbs}",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qwen35 {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        help="print a script that completes commands in this shell, and how to install it",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    if argv is None:
        _tune_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        asked = arguments[1:2]
        if asked and asked[0] not in VERBS:
            Console().error(_unknown(asked[0]))
            return EXIT_USAGE
        arguments = [*asked, "--help"]
    if arguments and arguments[0] in VERBS:
        return run_verb(arguments[0], arguments[1:])
    parser = _parser()
    parser.add_argument("verb", nargs="?", help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help()
        return 0
    known, _ = parser.parse_known_args(arguments)
    if known.print_completion and known.verb is None:
        from qwen35.cli.completion import script

        Console().script(script(known.print_completion, whole_parser()))
        return 0
    first = arguments[0]
    if known.verb in VERBS:
        error = UsageError(first, "comes before the verb", hint=f"put it after {known.verb}")
    else:
        error = _unknown(known.verb) if known.verb or first == "" else _no_verb(first)
    Console().error(error)
    return EXIT_USAGE


def _no_verb(option: str) -> UsageError:
    return UsageError(option, "an option without a verb before it", expected=", ".join(VERBS))


def _unknown(verb: str) -> UsageError:
    hint = did_you_mean(verb, VERBS)
    return UsageError(f"verb {verb!r}", "unknown", expected=", ".join(VERBS), hint=hint)


def _tune_process() -> None:
    """Spare a process of its own what a command never profits from, before numpy is imported.

    NumPy's BLAS starts a thread a core that spins, and we multiply no matrices with it; a plan is
    some 10,000 objects that live to the end, which the collector would walk again and again.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(1_000_000)
    atexit.register(_leave)


def _leave() -> None:
    """Spare the end of the process a walk through everything there is.

    Not where torch was loaded: what it brings in complains of objects that are left.
    """
    if "torch" not in sys.modules:
        gc.freeze()


def run_verb(verb: str, argv: Sequence[str], *, module: str = "", prog: str = "") -> int:
    """Run one verb and return the exit code.

    Args:
        verb: a key of `VERBS`.
        argv: what follows it.
        module: the module to use instead of the verb's own.
        prog: what the usage line calls it.
    """
    implementation = importlib.import_module(f"qwen35.cli.{module or verb + '_command'}")
    parser = argparse.ArgumentParser(**_options(implementation, prog or f"qwen35 {verb}"))
    _fill(parser, implementation)
    args = parser.parse_args(argv)
    output = Console(quiet=args.quiet, as_json=args.json)
    try:
        code: int = implementation.run(args, output)
    except Qwen35Error as error:
        output.error(error)
        _tell(error, output)
        return EXIT_USAGE
    except MemoryError as error:
        output.error(_OUT_OF_MEMORY)
        _tell(error, output)
        return EXIT_USAGE
    except KeyboardInterrupt as error:
        output.info("interrupted")
        _tell(error, output)
        return EXIT_INTERRUPTED
    return code


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser of a verb."""
    implementation = importlib.import_module(f"qwen35.cli.{verb}_command")
    parser = argparse.ArgumentParser(**_options(implementation, f"qwen35 {verb}"))
    _fill(parser, implementation)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser for all verbs, for what generates from it; `main` needs no such thing."""
    parser = _parser()
    verbs = parser.add_subparsers(dest="verb", prog="qwen35")
    for verb, text in VERBS.items():
        implementation = importlib.import_module(f"qwen35.cli.{verb}_command")
        _fill(verbs.add_parser(verb, help=text, **_options(implementation, "")), implementation)
    return parser


def _options(implementation: ModuleType, prog: str) -> dict[str, Any]:
    examples = getattr(implementation, "EXAMPLES", {})
    shown = "\n".join(f"  {what}:\n    {command}" for what, command in examples.items())
    return {
        **({"prog": prog} if prog else {}),
        "description": implementation.__doc__,
        "usage": getattr(implementation, "USAGE", None),
        "epilog": f"examples:\n{shown}" if examples else None,
        "formatter_class": HelpFormatter,
        "allow_abbrev": False,
    }


def _fill(parser: argparse.ArgumentParser, implementation: ModuleType) -> None:
    implementation.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print data as JSON (docs/schemas)")
    parser.add_argument("--quiet", action="store_true", help="print only data and errors")


def _tell(error: BaseException, output: Console) -> None:
    """Say what was added to an error on its way: what can be continued."""
    for note in getattr(error, "__notes__", ()):
        output.info(f"note: {note}")


if __name__ == "__main__":
    sys.exit(main())
