"""Find the recipe that loses least at a given size, or takes least at a given loss.

Squared errors of every weight in every type, read in one pass, say how the types compare; probes
(models with one group of weights quantized, run in their engine) say how much each group matters.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qwen35.checkpoint.open import describe, fetch
from qwen35.cli.output import Output
from qwen35.cli.shared import add_model, positive
from qwen35.errors import UsageError

if TYPE_CHECKING:
    from qwen35.checkpoint.source import Checkpoint
    from qwen35.tune.measurements import Measurements
    from qwen35.tune.space import Space
    from qwen35.tune.tuning import Budget, Tuned

FORMATS = ("gguf", "nf4", "fp8")
DEFAULT_PROBES = 120
DEFAULT_CHUNKS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_model(parser)
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the artifact")
    parser.add_argument(
        "--size", metavar="S", help="of the weight files, at most: 4.5bpw, 3.2GB, 800MiB"
    )
    parser.add_argument(
        "--max-kld", type=float, metavar="K", help="mean divergence on the text, at most, in nats"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", required=True, help="to measure on")
    parser.add_argument("--output", type=Path, metavar="FILE", help="recipe to write (.toml)")
    parser.add_argument("--types", metavar="T,...", help="GGUF: types to choose from")
    parser.add_argument("--imatrix", metavar="FILE", help="GGUF: importance matrix, or hf:...")
    parser.add_argument("--measurements", type=Path, metavar="FILE", help=_MEASUREMENTS_HELP)
    parser.add_argument("--start-from", type=Path, metavar="FILE", help=_START_HELP)
    parser.add_argument(
        "--probes",
        type=int,
        default=DEFAULT_PROBES,
        metavar="N",
        help="groups to measure at most; 0: squared errors alone (default: %(default)s)",
    )
    parser.add_argument(
        "--chunks",
        type=positive,
        default=DEFAULT_CHUNKS,
        metavar="N",
        help="chunks of the text to measure on (default: %(default)s)",
    )
    parser.add_argument(
        "--context", type=positive, default=512, metavar="N", help="tokens a chunk (default: 512)"
    )
    parser.add_argument(
        "--explicit", action="store_true", help="a rule for every role in every layer"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write tune.json and tune.html")
    parser.add_argument("--device", default="auto", help="for transformers (NF4, FP8)")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: all processors")
    parser.add_argument("--overwrite", action="store_true", help="replace the recipe or report")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")


_MEASUREMENTS_HELP = (
    "keep what is measured in FILE and go on from it: another budget then takes seconds "
    "(default: the recipe's name with .json)"
)
_START_HELP = "measurements of the model that this one was tuned from: its probes are not repeated"


def run(args: argparse.Namespace, output: Output) -> int:
    """Run the verb."""
    from qwen35.evaluate.text import read_text
    from qwen35.threads import default_threads
    from qwen35.tune.probing import Setting
    from qwen35.tune.show import plan_text, tuned_json, tuned_text
    from qwen35.tune.tuning import tune

    _check(args)
    text = read_text(args.text)
    opened = describe if args.dry_run else fetch
    checkpoint = opened(args.model, token=args.hf_token)
    space = _space(checkpoint, args)
    budget = _budget(args, space)
    if args.dry_run:
        output.data(*plan_text(space, budget, args.probes))
        return 0
    path: Path = args.measurements or args.output.with_suffix(".json")
    threads = args.threads or default_threads()
    setting = Setting(args.text, args.context, args.chunks, threads, args.device)
    measured = _measurements(checkpoint, space, text.sha256, path, args)
    tuned = tune(
        space,
        budget,
        setting,
        measured,
        probes=args.probes,
        save=lambda found: found.save(path),
        work=args.output.parent,
        progress=output.progress,
    )
    _write(args.output, space.recipe(tuned.chosen, _describe(tuned), explicit=args.explicit))
    if args.report is not None:
        from qwen35.report.tuning import write_tuning

        write_tuning(args.report, measured.name, space, tuned, measured)
        output.info(f"{args.report}: tune.json and tune.html")
    output.data(
        tuned_text(space, tuned, args.output),
        {**tuned_json(space, tuned), "recipe": str(args.output)},
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check what can be checked before anything is read."""
    if (args.size is None) == (args.max_kld is None):
        raise UsageError("--size, --max-kld", "none or both", expected="one of them")
    if args.max_kld is not None and not 0 < args.max_kld < 100:
        raise UsageError("--max-kld", str(args.max_kld), expected="nats, such as 0.02")
    if args.probes < 0:
        raise UsageError("--probes", str(args.probes), expected="a number of groups, or 0")
    if args.format != "gguf" and (args.types or args.imatrix):
        option = "--types" if args.types else "--imatrix"
        raise UsageError(option, f"given with --format {args.format}", expected="--format gguf")
    if not args.dry_run:
        _check_outputs(args)


def _check_outputs(args: argparse.Namespace) -> None:
    if args.output is None or args.output.suffix != ".toml":
        raise UsageError(
            "--output",
            "missing" if args.output is None else str(args.output),
            expected="a file to write, ending with .toml",
        )
    if not args.output.absolute().parent.is_dir():
        raise UsageError("--output", f"{args.output.parent} is not a folder")
    if args.output.exists() and not args.overwrite:
        raise UsageError("--output", f"{args.output} exists", hint="give --overwrite")
    if args.report is not None:
        from qwen35.report.tuning import TUNE_NAMES
        from qwen35.report.write import check_report

        check_report(args.report, overwrite=args.overwrite, names=TUNE_NAMES)


def _space(checkpoint: Checkpoint, args: argparse.Namespace) -> Space:
    if args.format != "gguf":
        from qwen35.tune.packed_space import PackedSpace

        return PackedSpace(checkpoint, args.format)
    from qwen35.cli.gguf import imatrix_of
    from qwen35.gguf.types import GGML_TYPES, ggml_type
    from qwen35.tune.gguf_space import DEFAULT_TYPES, GgufSpace

    names = args.types.split(",") if args.types else DEFAULT_TYPES
    types = {ggml_type(name.strip(), "--types").name for name in names} | {GgufSpace.exact}
    by_size = sorted(types, key=lambda name: GGML_TYPES[name].nbytes / GGML_TYPES[name].block)
    by_size.remove(GgufSpace.exact)
    return GgufSpace(checkpoint, (*by_size, GgufSpace.exact), imatrix_of(args))


def _budget(args: argparse.Namespace, space: Space) -> Budget:
    from qwen35.cli.shared import size_of
    from qwen35.tune.tuning import Budget

    if args.size is None:
        return Budget(kld=args.max_kld)
    try:
        if args.size.lower().endswith("bpw"):
            return Budget(nbytes=int(float(args.size[:-3]) * space.weights / 8))
        return Budget(nbytes=size_of(args.size))
    except ValueError as error:
        expected = "bits per weight or bytes: 4.5bpw, 3.2GB"
        raise UsageError("--size", repr(args.size), expected=expected) from error


def _measurements(
    checkpoint: Checkpoint, space: Space, text: str, path: Path, args: argparse.Namespace
) -> Measurements:
    """Return what is in the file, if it is of this very case, or nothing measured yet.

    Raises:
        UsageError: the file is of another case, or there is nothing to start from.
    """
    from qwen35.tune.measurements import Key, Measurements, load_measurements, model_digest

    imatrix = getattr(space, "imatrix", None)
    key = Key(
        args.format,
        model_digest(checkpoint),
        text,
        args.context,
        args.chunks,
        imatrix.digest if imatrix else "",
    )
    if path.exists():
        found = load_measurements(path)
        if found.key != key:
            differing = [n for n in vars(key) if getattr(key, n) != getattr(found.key, n)]
            raise UsageError(
                str(path),
                f"measured with another {', '.join(differing)}",
                hint="give another --measurements, or it as --start-from",
            )
        return found
    fresh = Measurements(key, Path(checkpoint.name).name)
    if args.start_from is not None:
        earlier = load_measurements(args.start_from)
        if earlier.key.format != args.format or not earlier.probes:
            found_there = f"measurements of {earlier.key.format}" if earlier.probes else "no probes"
            raise UsageError(str(args.start_from), found_there, expected=f"probes of {args.format}")
        fresh.groups, fresh.probes = earlier.groups, earlier.probes
    return fresh


def _describe(tuned: Tuned) -> str:
    measured = f"{tuned.kld:.3g} nats measured" if tuned.kld is not None else "not measured"
    return f"tuned: {tuned.nbytes} bytes, {measured}"


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, "utf-8")
    part.replace(path)
