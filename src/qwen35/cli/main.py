"""The `qwen35` command: a table of verbs, each in a module that is imported on use."""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen35.cli.command_parser import CommandParser
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_INTERRUPTED, EXIT_USAGE
from qwen35.cli.help import HelpFormatter
from qwen35.cli.signals import SignalInterrupt, raise_on_signals
from qwen35.errors import Qwen35Error, UsageError, did_you_mean
from qwen35.version import __version__

__all__ = ["SHELLS", "VERBS", "main", "parser_of", "run_verb", "tune_process", "whole_parser"]

VERBS: dict[str, str] = {
    "inspect": "describe a checkpoint from its headers",
    "plan": "show what would be written: every file and tensor, to the byte",
    "convert": "write a quantized or text-only checkpoint",
    "merge": "merge LoRA adapters into a checkpoint",
    "gguf": "write GGUF files for llama.cpp, quantized or not",
    "calibrate": "collect activation statistics and an importance matrix",
    "verify": "check an artifact, alone or against its source",
    "evaluate": "measure perplexity and KL divergence of quantized models",
    "report": "rank the candidates of one or more evaluations",
    "tune": "find the recipe with the least loss under a budget",
    "run": "run a whole pipeline: make, verify, measure, publish",
    "amend": "record edits of an artifact's small files, such as a template",
    "publish": "sync a folder with a Hub repository, in either direction",
    "reproduce": "rebuild an artifact from its manifest and compare",
    "finalize": "complete an output from its slices",
    "ui": "open a page in the browser for all of this",
}
"""Verb to its description; its module is `qwen35.cli.<verb>_command`."""

_OTHER_WORDS = {
    **dict.fromkeys(("quantize", "quantise", "quant", "export", "strip", "fp8", "nf4"), "convert"),
    **dict.fromkeys(("upload", "push", "download", "pull", "sync", "card"), "publish"),
    **dict.fromkeys(("check", "test", "validate", "ask"), "verify"),
    **dict.fromkeys(("measure", "compare", "benchmark", "bench", "perplexity", "kld"), "evaluate"),
    **dict.fromkeys(("info", "show", "ls", "list", "sizes"), "inspect"),
    **dict.fromkeys(("dry-run", "preview", "fit", "estimate"), "plan"),
    **dict.fromkeys(("imatrix", "hessian", "stats"), "calibrate"),
    **dict.fromkeys(("search", "allocate", "optimize", "optimise"), "tune"),
    **dict.fromkeys(("lora", "adapter", "peft"), "merge"),
    **dict.fromkeys(("pipeline", "all", "make"), "run"),
    **dict.fromkeys(("gui", "web", "browser", "app"), "ui"),
    "edit": "amend",
    "rebuild": "reproduce",
    "llama.cpp": "gguf",
}
"""What other tools call these verbs."""

_SERVING = ("serve", "server", "chat", "generate", "infer", "vllm", "sglang", "ollama")
_SERVE_HINT = "an engine runs models, such as vLLM or llama.cpp; docs/jobs.md has the commands"
"""For what is no work of ours: names that resemble our verbs by accident."""

SHELLS = ("bash", "fish", "zsh")

_START = """\
start here:
  qwen35 plan Qwen3.5-9B --recipe nf4       preview the output, no download
  qwen35 convert MODEL OUT --recipe nf4     write it
  qwen35 verify OUT --source MODEL          check every byte of it
  qwen35 VERB --help                        all options, with examples
"""

_EPILOG = """\
MODEL is a folder, a GGUF file, a Hub id (owner/name[@revision]) or, for plan
and inspect, a published size.

Exit codes: 0 success, 1 findings, 2 wrong input or usage; interrupted: 130 by
Ctrl-C, 143 by SIGTERM, 129 by SIGHUP.
"""

_OUT_OF_MEMORY = UsageError(
    "memory",
    "not enough",
    hint="use fewer --threads, or set the limit with --memory; qwen35 plan shows the need",
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
        help="print a completion script for this shell, with instructions",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    if argv is None:
        tune_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        verb = arguments[1:2]
        if verb and verb[0] not in VERBS:
            Console().error(_unknown(verb[0]))
            return EXIT_USAGE
        arguments = [*verb, "--help"]
    if arguments and arguments[0] in VERBS:
        return run_verb(arguments[0], arguments[1:])
    parser = _parser()
    # not argparse subparsers: they would import every verb's module
    parser.add_argument("verb", nargs="?", help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help()
        return 0
    known, _ = parser.parse_known_args(arguments)
    if known.print_completion and known.verb is None:
        from qwen35.cli.completion import script

        output = Console()
        try:
            output.script(script(known.print_completion, whole_parser()))
        except UsageError as full:
            output.error(full)
            return EXIT_USAGE
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
    meant = _OTHER_WORDS.get(verb.lower())
    if verb.lower() in _SERVING:
        hint = _SERVE_HINT
    else:
        hint = f"did you mean {meant}?" if meant else did_you_mean(verb, VERBS)
    return UsageError(f"verb {verb!r}", "unknown", expected=", ".join(VERBS), hint=hint)


def tune_process() -> None:
    """Prepare the process of a command, before numpy is imported: signals, environment, memory."""
    raise_on_signals()
    _open_streams()
    # NumPy's BLAS starts a spinning thread per core, but nothing here multiplies matrices with it
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # libraries start interpreters too (torch, multiprocessing): none imports from where we work
    os.environ["PYTHONSAFEPATH"] = "1"
    # a plan's 10,000 objects live until the end: repeated collections would scan them in vain
    gc.set_threshold(1_000_000)
    atexit.register(_leave)


def _open_streams() -> None:
    """Open standard streams that are closed: a file could get their number, and be written to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _leave() -> None:
    """Skip the final garbage collection, which would visit every object."""
    # libraries that torch loads complain about objects that are left at exit
    if "torch" not in sys.modules:
        gc.freeze()


def run_verb(verb: str, argv: Sequence[str], *, module: str = "", prog: str = "") -> int:
    """Run one verb and return the exit code.

    Args:
        verb: a key of `VERBS`.
        argv: the arguments after it.
        module: the module to use instead of the verb's.
        prog: the name in the usage line.
    """
    output = Console()
    try:
        implementation = importlib.import_module(f"qwen35.cli.{module or verb + '_command'}")
        parser = CommandParser(**_options(implementation, prog or f"qwen35 {verb}"))
        parser.elsewhere = _verbs_with
        _fill(parser, implementation)
        args = parser.parse_args(argv)
        output.quiet, output.as_json = args.quiet, args.json
        with output.warnings():
            code: int = implementation.run(args, output)
    except Qwen35Error as error:
        output.error(error)
        _print_notes(error, output)
        return EXIT_USAGE
    except MemoryError as error:
        output.error(_OUT_OF_MEMORY)
        _print_notes(error, output)
        return EXIT_USAGE
    except FileNotFoundError:
        if _working_folder_exists():
            raise
        output.error(UsageError("the working folder", "no longer exists", hint="change to another"))
        return EXIT_USAGE
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename or "a name")[:80]
        hint = "choose a shorter one"
        output.error(UsageError(f"{name}...", "longer than the file system takes", hint=hint))
        return EXIT_USAGE
    except KeyboardInterrupt as error:
        by_signal = error if isinstance(error, SignalInterrupt) else None
        output.info(f"interrupted by {by_signal.name}" if by_signal else "interrupted")
        _print_notes(error, output)
        return by_signal.code if by_signal else EXIT_INTERRUPTED
    return code


def _working_folder_exists() -> bool:
    try:
        return Path.cwd().is_dir()
    except OSError:
        return False


def _verbs_with(option: str) -> Iterator[str]:
    """Yield the commands that have an option."""
    for verb in VERBS:
        if any(option in action.option_strings for action in parser_of(verb)._actions):
            yield f"qwen35 {verb}"


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser of a verb."""
    implementation = importlib.import_module(f"qwen35.cli.{verb}_command")
    parser = argparse.ArgumentParser(**_options(implementation, f"qwen35 {verb}"))
    _fill(parser, implementation)
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser for all verbs, for generating completion scripts."""
    parser = _parser()
    verbs = parser.add_subparsers(dest="verb", prog="qwen35")
    for verb, text in VERBS.items():
        implementation = importlib.import_module(f"qwen35.cli.{verb}_command")
        _fill(verbs.add_parser(verb, help=text, **_options(implementation, "")), implementation)
    return parser


def _options(implementation: ModuleType, prog: str) -> dict[str, Any]:
    examples = getattr(implementation, "EXAMPLES", {})
    shown = "\n".join(f"  {title}:\n    {command}" for title, command in examples.items())
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


def _print_notes(error: BaseException, output: Console) -> None:
    """Print the notes added to an error, such as how to resume."""
    for note in getattr(error, "__notes__", ()):
        output.info(f"note: {note}")


if __name__ == "__main__":
    sys.exit(main())
