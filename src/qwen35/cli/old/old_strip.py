"""Strip the vision tower from a Qwen3.5 checkpoint (now: qwen35 convert --recipe text).

Mode bnb takes an NF4 checkpoint, mode f16 a bf16 or f16 one; tensors are copied byte for byte. The
output is then verified against its source and asked a question.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen35.checkpoint.open import describe, fetch
from qwen35.checkpoint.source import Checkpoint
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.codecs.registry import CODECS
from qwen35.errors import ConfigError, InputError, UsageError
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.behaviour import asked
from qwen35.verification.questions import Question, is_right
from qwen35.verification.safetensors_subject import CheckpointSubject
from qwen35.verification.verdict import verify

MODES = ("bnb", "f16")
PLAIN = "f16"
QUESTION = Question("What is the capital of France?", "Paris", "contains")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--mode", choices=MODES, default="bnb", help="format of MODEL (default: bnb)"
    )
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output of qwen35")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the command."""
    from qwen35.writing.write import check_before, write

    check_before(args.output, overwrite=args.overwrite, device="cpu")
    source = fetch(args.model, token=args.hf_token)
    _check_mode(source, args.mode)
    plan = make_plan(source, load_recipe("text"))
    output.line(f"Mode: {args.mode}")
    output.line(f"Weights on disk: {sum(source.file_sizes.values()) / 1e9:.2f} GB\n")
    dropped = [step for step in plan.steps if step.op == "drop"]
    keys = sum(len(step.weight.parts) for step in dropped)
    nbytes = sum(step.weight.nbytes for step in dropped)
    output.line("Strip")
    output.line(f"   dropped {keys} visual keys, removed {nbytes / 1e9:.2f} GB")
    write(plan, args.output, overwrite=args.overwrite, progress=output.progress())
    output.line("Config rebuilt from text_config\n")
    passed = _check(plan, args.output, output)
    message = f"Done. Saved to: {args.output}" if passed else "FAILED: do not use this output"
    output.data(f"\n{message}", {"out": str(args.output), "passed": passed})
    return 0 if passed else EXIT_FINDINGS


def _check_mode(source: Checkpoint, mode: str) -> None:
    if not source.config.architecture.vision:
        raise ConfigError(source.name, "already a text-only checkpoint")
    storages = {weight.storage for weight in source.weights}
    packed = [CODECS[name] for name in CODECS if name in storages and CODECS[name].packed]
    actual = packed[0].toolkit if packed else PLAIN
    if actual != mode:
        supported = actual in MODES
        raise UsageError(
            f"--mode {mode}",
            f"{source.name} is {actual}",
            hint=f"give --mode {actual}" if supported else "use qwen35 convert --recipe text",
        )


def _check(plan: Plan, out: Path, output: Console) -> bool:
    """Verify the output against its source and ask it a question; print what was checked."""
    output.line("Verification")
    artifact = describe(str(out.absolute()), lenient=True)
    verdict = verify(CheckpointSubject(artifact), source=plan.checkpoint, depth="numbers")
    config = artifact.config.raw
    visual = sum("visual" in weight.name for weight in artifact.weights)
    output.line(f"   architectures: {config['architectures']}")
    output.line(f"   vision_config: {'present' if 'vision_config' in config else 'absent'}")
    quantized = "present" if artifact.config.quantization else "absent"
    output.line(f"   quantization_config: {quantized}")
    output.line(f"   visual keys in shards: {visual}")
    packed = verdict.counts["packed"]
    if packed:
        output.line(f"   Quantized layers: {packed} / {_linear_modules(plan)} linear")
    for finding in verdict.findings:
        output.line(f"   FAILED {finding.subject}: {finding.message}")
    return _answers(out, plan, output) and verdict.passed


def _linear_modules(plan: Plan) -> int:
    """Count the text model's linear modules in transformers, including the head."""
    kinds = [s.role for s in plan.steps if s.outputs and s.role.scope == "text"]
    return 1 + sum(role.info.kind == "linear" for role in kinds)


def _answers(out: Path, plan: Plan, output: Console) -> bool:
    if "tokenizer.json" not in plan.copied:
        output.line("   inference: skipped, the source has no tokenizer.json")
        return True
    try:
        asker = Asker(out)
        question = asked(asker, QUESTION)
        answer = asker.ask(question).strip()
    except UsageError as error:
        output.line(f"   inference: skipped, {error.found}")
        return True
    except InputError as error:
        output.line(f"   inference: FAILED {error}")
        return False
    for note in asker.notes:
        output.line(f"   note: {note}")
    right = is_right(question, answer)
    verdict = "ok" if right else f"FAILED, expected {QUESTION.expect!r}"
    output.line(f"   inference: {QUESTION.prompt} -> {answer!r} ({verdict})")
    return right
