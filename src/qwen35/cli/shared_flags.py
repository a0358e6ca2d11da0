"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen35.codecs.registry import LAYOUTS, TRAINED_ON
from qwen35.display import bytes_of, units_for
from qwen35.model.sizes import PUBLISHED
from qwen35.planning.gguf_files.mixes import CONVERTED, DRAFTED
from qwen35.planning.mtp_choice import MTP_CHOICES
from qwen35.planning.recipe import built_in
from qwen35.planning.refinement import CODES

__all__ = [
    "Joined",
    "add_adapter",
    "add_chunks",
    "add_codes",
    "add_endpoint",
    "add_model",
    "add_mtp",
    "add_mtp_from",
    "add_onto",
    "add_recipe",
    "add_types",
    "count",
    "keywords",
    "positive",
    "size_of",
]


def positive(text: str) -> int:
    """Parse a positive integer; argparse prints the error."""
    return _number(text, 1, "a positive number")


def add_codes(parser: argparse._ActionsContainer, *, texts: bool = True) -> None:
    """Add ``--codes``, ``--hessian`` and, with `texts`, ``--calibration``."""
    parser.add_argument(
        "--codes",
        choices=CODES,
        help="refined: chosen by what they do to a layer's outputs, at the same size; "
        "refined+scales: with NF4's scales (default: plain, the nearest)",
    )
    parser.add_argument(
        "--hessian",
        type=Path,
        metavar="DIR",
        help="for refined codes: the folder of `qwen35 calibrate --hessian`",
    )
    if not texts:
        return
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=(),
        type=Path,
        metavar="FILE",
        help="the same from plain text, UTF-8, for this output alone: layer by layer",
    )


def add_chunks(parser: argparse._ActionsContainer, words: str) -> None:
    """Add --chunks, and the name that `calibrate` had for it; `words` say what it does."""
    parser.add_argument("--chunks", type=positive, metavar="N", help=words)
    parser.add_argument("--windows", dest="chunks", type=positive, help=argparse.SUPPRESS)


def count(text: str) -> int:
    """Parse a non-negative integer; argparse prints the error."""
    return _number(text, 0, "a number, or 0")


def _number(text: str, minimum: int, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return value


def _one_of(text: str, known: Sequence[str]) -> str:
    if text.upper() not in known:
        expected = f"{', '.join(known)} (MODEL and OUTDIR come first)"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return text.upper()


def _converted(text: str) -> str:
    """Parse a file type of the converter; argparse prints the error."""
    return _one_of(text, CONVERTED)


def _drafted(text: str) -> str:
    """Parse a file type of an MTP layer alone; argparse prints the error."""
    return _one_of(text, DRAFTED)


def size_of(text: str) -> int:
    """Parse a size such as ``400MB`` or ``1.5GiB``; argparse prints the error."""
    try:
        return bytes_of(text)
    except ValueError as error:
        expected = f"a size such as {units_for(text, '400MB or 1.5GiB')}"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}") from error


def keywords(args: argparse.Namespace, *without: str) -> dict[str, Any]:
    """Return a command's arguments as the keywords of the function of the same name."""
    excluded = ("json", "quiet", *without)  # these only concern the output
    return {name: value for name, value in vars(args).items() if name not in excluded}


def add_model(
    parser: argparse.ArgumentParser,
    *,
    optional: bool = False,
    sizes: bool = False,
    files: bool = False,
) -> None:
    """Add MODEL and --hf-token.

    Args:
        parser: the parser.
        optional: whether MODEL is optional.
        sizes: whether it may be a published size, which has no weights.
        files: whether it may be a GGUF file.
    """
    known = "folder, GGUF file, Hub id" if files else "folder or Hub id"
    named = ", hf:owner/name/path of a GGUF file on the Hub" if files else ""
    published = f", or a published size: {', '.join(PUBLISHED)}" if sizes else ""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        help=f"{known} (owner/name[@revision]){named}{published}",
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")


def add_adapter(
    parser: argparse.ArgumentParser,
    words: str = "merge a LoRA adapter of peft as weights are read; may be repeated",
) -> None:
    """Add --adapter; `words` say what it does."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR[=WEIGHT]",
        help=words,
    )


def add_onto(parser: argparse._ActionsContainer) -> None:
    """Add --onto."""
    parser.add_argument(
        "--onto",
        choices=TRAINED_ON,
        help="first round the base's weights to this format, which the adapters were trained on",
    )


def add_endpoint(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add --endpoint and the flags that say how to ask there.

    Args:
        parser: the parser.
        several: whether there may be several servers.
    """
    more: dict[str, Any] = {"action": "append", "default": []} if several else {}
    again = "; may be repeated" if several else ""
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help=f"a server with the OpenAI API that runs the model{again}",
        **more,
    )
    parser.add_argument(
        "--model",
        dest="served_model",
        metavar="NAME",
        help=f"--endpoint: the server's name of the model, if it serves several{again}",
        **more,
    )
    parser.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="--endpoint: environment variable with the key (default: QWEN35_API_KEY)",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        metavar="SECONDS",
        help="--endpoint: time in which each answer must be complete (default: 600)",
    )
    parser.add_argument(
        "--serve",
        metavar="COMMAND",
        help=f"--endpoint: start the server with this command, and end it afterwards{again}",
        **more,
    )


class Joined(argparse.Action):
    """Joins the values of a list that is given in several pieces: none replaces another."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the values of one piece."""
        del parser, option_string
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def add_types(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add the flags for the content of GGUF files.

    Args:
        parser: the parser.
        default: the types without --types, for people; None if there are none.
    """
    group = parser.add_argument_group("GGUF") if default is None else parser
    shown = "" if default is None else f" (default: {default})"
    group.add_argument("--types", action=Joined, metavar="T,...", help=f"file types{shown}")
    group.add_argument(
        "--imatrix",
        metavar="FILE",
        help="importance matrix, the folder of calibrate, or hf:owner/name/path",
    )
    group.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="PATTERN=TYPE",
        help="type for tensors whose name matches the pattern; may be repeated",
    )
    group.add_argument(
        "--tensor-type-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a file of such lines, as in llama-quantize",
    )
    group.add_argument(
        "--upstream-counters",
        action="store_true",
        help="let named tensors shift the mix of the others, as llama-quantize does",
    )
    group.add_argument(
        "--mmproj",
        nargs="?",
        const="F16",
        default=False,
        type=_converted,
        metavar="TYPE",
        help=f"also write the vision tower, as F16 or as TYPE: {', '.join(CONVERTED)}",
    )
    group.add_argument(
        "--mtp-type",
        type=_drafted,
        metavar="TYPE",
        help="the type of the file of --mtp separate, one of the same or Q4_0 (default: Q8_0)",
    )
    group.add_argument(
        "--split-max-size",
        type=size_of,
        metavar="SIZE",
        help="write models with more bytes of tensors as several files, e.g. 40G",
    )


def add_mtp(parser: argparse.ArgumentParser) -> None:
    """Add --mtp and its short form."""
    parser.add_argument(
        "--mtp",
        choices=MTP_CHOICES,
        help="keep or drop the MTP layer; separate: write it as a file of its own (GGUF only)",
    )
    parser.add_argument("--drop-mtp", action="store_true", help="short for --mtp drop")


def add_mtp_from(
    parser: argparse._ActionsContainer,
    words: str = "take the MTP layer of this checkpoint: the original of a model saved without it",
) -> None:
    """Add --mtp-from; `words` say what it does."""
    parser.add_argument(
        "--mtp-from",
        metavar="MODEL",
        help=words,
    )


def add_recipe(parser: argparse.ArgumentParser, default: str | None = "nf4") -> None:
    """Add --recipe, the flags that adjust it, --threads and --memory."""
    parser.add_argument(
        "--recipe",
        default=default,
        metavar="NAME",
        help=f"{', '.join(built_in('safetensors'))} or a .toml file (default: nf4)",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="ROLE",
        help="also leave these tensors unquantized; may be repeated",
    )
    add_mtp(parser)
    parser.add_argument(
        "--keep-prefix",
        action="store_true",
        help="text-only: leave tensors under model.language_model.",
    )
    parser.add_argument(
        "--keep-shards", action="store_true", help="write the source's files instead of 5 GB each"
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="NVFP4, INT4, FP8 per channel: the tool whose tensors and config.json to write "
        "(default: the recipe's, compressed-tensors or gptq)",
    )
    parser.add_argument(
        "--activations",
        action="store_true",
        help="NVFP4: quantize inputs too (W4A4); convert then needs --activation-stats",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads (default: all processors)"
    )
    parser.add_argument(
        "--memory", type=size_of, metavar="SIZE", help="use fewer threads to stay below, e.g. 400MB"
    )
