"""Verify a bnb-4bit, bf16 or f16 Qwen3.5 checkpoint (now: qwen35 verify --depth behaviour).

Checks config, loading and precision, then asks questions with thinking off and on. The exit code is
1 if an answer or anything else is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qwen35.checkpoint.inventory import InventoryItem
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import Checkpoint
from qwen35.cli.console import Console
from qwen35.cli.exits import EXIT_FINDINGS
from qwen35.codecs.registry import CODECS, is_packed
from qwen35.errors import Finding
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.behaviour import Answer, ask
from qwen35.verification.device_choice import Strategy, choose, free_gpu_bytes, sizes
from qwen35.verification.safetensors_subject import CheckpointSubject
from qwen35.verification.structure_check import check_structure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", required=True, help="Hub id or folder")
    parser.add_argument("--hf-token", metavar="TOKEN", help="Hub token (default: HF_TOKEN)")


def run(args: argparse.Namespace, output: Console) -> int:
    """Run the command."""
    return stages(args, output, image=False)


def stages(args: argparse.Namespace, output: Console, *, image: bool) -> int:
    """Run the stages; stop after the config if it has findings."""
    local = _is_local(args.model)
    checkpoint = fetch(args.model, token=args.hf_token, lenient=True)
    subject = CheckpointSubject(checkpoint)
    findings = check_structure(subject).findings
    kind = CODECS[subject.kind].toolkit
    vision = checkpoint.config.architecture.vision
    where, sees = ("local" if local else "hub"), ("vlm" if vision else "text")
    output.line(f"[Qwen3.5 · {where} · {sees} · {kind}] {args.model}")
    total, visual = sizes(subject.items)
    output.line(f"Size on disk: {total / 1e9:.2f} GB\n")
    result = {"model": args.model, "kind": kind, "vision": vision}
    if not _config(findings, checkpoint, output):
        return _end(output, result, findings, [])
    strategy = choose(total, visual if image else 0, free_gpu_bytes())
    asker = _load(checkpoint.folder(), strategy, output)
    right = _precision(subject, output)
    skipped = _skipped(asker, vision=vision)
    answers = _inference(asker, strategy, output, image=image and asker.vision, skipped=skipped)
    return _end(output, result, findings, answers, passed=right and not asker.missing)


def _is_local(model: str) -> bool:
    return model.startswith(("./", "../", "/", "~")) or Path(model).is_dir()


def _config(findings: Sequence[Finding], checkpoint: Checkpoint, output: Console) -> bool:
    output.line("1 Config")
    output.line(f"   architectures: {checkpoint.config.raw.get('architectures')}")
    quantization = checkpoint.config.quantization or {}
    for key in ("quant_method", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype"):
        if key in quantization:
            output.line(f"   {key}: {quantization[key]}")
    for finding in findings:
        output.line(f"   FAILED {finding.subject}: {finding.message}")
    if not findings:
        output.line("   ok: headers, config and lists agree")
    return not findings


def _load(folder: Path, strategy: Strategy, output: Console) -> Asker:
    output.line("2 Load")
    asker = Asker(folder)
    if strategy == "cuda_direct" and not asker.move("cuda", drop_tower=False):
        strategy = "cpu"
        output.line("   out of memory on the GPU, back on the CPU")
    output.line(f"   {type(asker.model).__name__}, strategy {strategy}")
    for name in asker.missing[:5]:
        output.line(f"   FAILED {name}: missing or unexpected when loaded")
    if asker.settled:
        output.line(f"   {asker.settled} layers kept off bitsandbytes' AVX512-BF16 path")
    for note in asker.notes:
        output.line(f"   note: {note}")
    return asker


def _precision(subject: CheckpointSubject, output: Console) -> bool:
    """Print how many linear layers the files have packed; nothing is repaired."""
    output.line("3 Precision")
    linear = [item for item in subject.items if _is_module(item)]
    packed = sum(is_packed(item.weight) for item in linear)
    tied = not subject.checkpoint.layout.head  # a tied head is a module without a tensor
    count = len(linear) + tied
    output.line(f"   {packed}/{count} linear layers quantized ({packed / max(1, count):.0%})")
    tower = [item for item in linear if item.role.scope == "visual"]
    wrong = [item for item in tower if is_packed(item.weight)]
    if not tower:
        output.line("   no visual tower")
    elif wrong:
        output.line(f"   FAILED {len(wrong)} of {len(tower)} visual tower layers are quantized")
    else:
        output.line(f"   {len(tower)} visual tower layers at full precision")
    empty = CODECS[subject.kind].packed and not packed
    if empty:
        output.line("   FAILED no layer is quantized")
    return not wrong and not empty


def _is_module(item: InventoryItem) -> bool:
    """Whether a weight is an ``nn.Linear`` in transformers, which has no MTP layer."""
    return item.role.info.kind in ("linear", "head") and item.role.scope != "mtp"


def _skipped(asker: Asker, *, vision: bool) -> str:
    """Return why no picture is shown."""
    if asker.vision:
        return "skipped by this command"
    return "skipped: no picture can be shown (see the note)" if vision else "skipped: text only"


def _inference(
    asker: Asker, strategy: Strategy, output: Console, *, image: bool, skipped: str
) -> list[Answer]:
    answers: list[Answer] = []
    output.line("4 Inference [IMAGE]")
    if image:
        answers += _show(list(ask(asker, image=True, thinking=())), output)
    else:
        output.line(f"   {skipped}")
    if strategy == "cuda_drop":
        moved = asker.move("cuda", drop_tower=True)
        output.line(
            "   tower dropped, text on the GPU" if moved else "   out of memory: on the CPU"
        )
    for stage, thinking in (("5a THINKING OFF", False), ("5b THINKING ON", True)):
        output.line(stage)
        if thinking not in asker.thinking:
            output.line("   skipped: the chat template has no switch for thinking")
        answers += _show(list(ask(asker, image=False, thinking=(thinking,))), output)
    return answers


def _show(answers: list[Answer], output: Console) -> list[Answer]:
    for answer in answers:
        text = answer.turn.rpartition("</think>")[2].strip()
        mark = "ok" if answer.right else f"FAILED: {answer.fault}"
        output.line(f"   {answer.question.prompt[:60]} -> {text[:60]!r} ({mark})")
        if answer.question.image is not None:
            output.line(f"   expected: {answer.question.expect!r}")
    return answers


def _end(
    output: Console,
    result: dict[str, object],
    findings: Sequence[Finding],
    answers: list[Answer],
    *,
    passed: bool = True,
) -> int:
    passed = passed and not findings and all(answer.right for answer in answers)
    value = {
        **result,
        "passed": passed,
        "findings": [finding.to_json() for finding in findings],
        "answers": [answer.to_json() for answer in answers],
    }
    output.data("\nALL CHECKS PASSED" if passed else "\nFAILED: do not use this checkpoint", value)
    return 0 if passed else EXIT_FINDINGS
