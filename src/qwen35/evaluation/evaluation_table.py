"""An evaluation as text: its table, and notes on how to read it."""

from __future__ import annotations

from collections.abc import Iterator

from qwen35.display import counted
from qwen35.evaluation.abnormal import is_abnormal
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.table import table_lines

__all__ = ["notes", "report_text"]

_NEAR = 3.0
"""A divergence below this multiple of the noise floor says little."""


def report_text(report: EvaluationReport, width: int | None = None) -> str:
    """Render a report, for a terminal of `width` columns if given."""
    chunks = report.chunks
    lines = [
        f"{report.base.name}, {report.base.stored} in {report.base.engine}: "
        f"{counted(chunks.count, 'chunk')} of {chunks.context} tokens, "
        f"{chunks.count * chunks.scored} scored",
        "",
        *table_lines(*report.table, width),
        "",
        "± assumes independent tokens, as llama-perplexity does; (in brackets) independent chunks",
        *notes(report),
    ]
    return "\n".join(lines)


def notes(report: EvaluationReport) -> list[str]:
    """Return notes on the table, one sentence each; what is abnormal comes first."""
    sentences = [f"[{one.check}] {one.subject}: {one.message}" for one in report.findings]
    if not report.base.exact:
        sentences.append(
            f"perplexity only: {report.base.name} is quantized ({report.base.stored}); compare it "
            "with its original to see what that cost"
        )
    if report.base.served_inputs and not report.base.single:
        sentences.append(
            f"the inputs of its layers are not quantized here, as servers do "
            f"({report.base.served_inputs})"
        )
    sentences += [
        f"{model.name}: config.json describes other tensors than were measured, and engines go by "
        f"it ({model.contradiction}): qwen35 verify it first"
        for model in (report.base, *(row.model for row in report.candidates))
        if model.contradiction
    ]
    sentences += [
        f"the base was made from a source with {count} weights in {label}: figures compare with "
        "what they decode to, not with the original weights"
        for label, count in report.base.decoded.items()
    ]
    sentences += [
        f"{'abnormal ' * is_abnormal(row)}noise floor: the unquantized model in "
        f"{row.model.engine} ({row.model.stored}) is {row.comparison.kld.value:.3g} nats from "
        f"itself in {report.base.engine} (99.9%: "
        f"{row.comparison.percentiles[99.9]:.3g}, same top p {row.comparison.same_top.value:.3%})"
        for row in report.floors
    ]
    sentences += _stream_notes(report)
    sentences += [
        f"{row.model.name}: simulates servers, which quantize the inputs of packed layers too "
        f"({row.model.served_inputs})"
        for row in report.simulations
        if not row.model.single
    ]
    sentences += [
        f"{row.model.name}: no column with quantized inputs: config.json describes them in a way "
        "that cannot be simulated"
        for row in report.candidates
        if row.model.unknown_inputs
    ]
    sentences += [
        f"{row.model.name}: by its server's probabilities of {row.scored} tokens; all tokens that "
        "the server does not tell count as one, which makes divergences too low, at most by about "
        "the bound"
        for row in report.candidates
        if row.model.engine == "server"
    ]
    sentences += [
        f"{name}: the server tells no texts of tokens, so that its tokenizer was not compared"
        for name, told in report.served.items()
        if not told["texts"]
    ]
    if any(row.model.engine != "server" for row in report.candidates) and not report.floors:
        sentences.append(f"noise floor: none between engines, all run in {report.base.engine}")
    abnormal = any(map(is_abnormal, report.floors))
    for row in report.candidates:
        other = row.model.engine not in (report.base.engine, "server")
        if other and not abnormal and row.comparison.kld.value < _NEAR * report.floor:
            sentences.append(f"{row.model.name}: within {_NEAR:g} times the noise floor")
    if report.reference == "16-bit file":
        sentences.append(
            "the base's log probabilities come from a 16-bit file: steps of up to 2.4e-4 nats, "
            "so small percentiles are noise"
        )
    return sentences


def _stream_notes(report: EvaluationReport) -> Iterator[str]:
    """Yield why models ran layer by layer, and what of llama.cpp figures of GGUF files hold."""
    if report.stream is None:
        return
    if report.stream.why:
        yield f"models ran layer by layer: {report.stream.why}"
    simulated = {row.model.path for row in report.simulations}
    for model in (report.base, *(row.model for row in report.candidates)):
        if model.single and model.path not in simulated:
            how = " (--simulate llama.cpp)" if model is not report.base else ""
            yield (
                f"{model.name}: its weights alone, in float32; llama.cpp rounds inputs of layers "
                f"too{how}"
            )
    for row in report.simulations:
        if row.model.single:
            yield f"{row.model.name}: simulates llama.cpp ({row.model.served_inputs})"
