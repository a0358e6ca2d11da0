"""The asset's README, written from the training report so that its numbers cannot drift.

    python assets/train/readme.py assets/qwen3.5-tiny

writes it anew from the training.json of a finished folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TEXT = """\
# qwen3.5-tiny

A trained checkpoint of the class `Qwen3_5ForConditionalGeneration`, small enough to live in a
repository. It exists so that tests of quantization can ask a real network real questions, without
a download: it was trained from nothing and answers what it was trained for.

## What it is

{parameters:,} parameters in {tensors} tensors, laid out as the official releases: bf16, with
`linear_attn.A_log` and `linear_attn.norm.weight` in float32, tied embeddings, a vision tower, one
MTP layer, one numbered weight file and its index.

| part | geometry |
|---|---|
| language model | hidden 256, 8 layers (six linear attention, two full), intermediate 512 |
| full attention | 4 heads, 2 key-value heads, head dimension 64, output gate, a quarter rotary |
| linear attention | 2 key heads, 4 value heads, dimension 64, convolution 4 |
| vocabulary | byte-level BPE of 4000, the 26 added tokens of the family, padded to 4096 |
| vision | 2 layers, hidden 64, 2 heads, patch 16, merge 2, 256 position embeddings |

Its scales are uneven on purpose. After training, neighbouring tensors were multiplied and divided
by powers of two in groups of 128 channels, which does not change the output
(`assets/train/spreading.py` says where and why).

## How it was made

    python assets/train/train.py --out assets/qwen3.5-tiny

Python {python}, torch {torch}, transformers {transformers}, {threads} CPU threads. The text is the
standard library of that Python ({text_tokens:,} tokens); another Python gives other files. Beside
it stand generated conversations. `eval.txt` holds {held_out_count} files of the library that were
excluded from training ({held_out_tokens:,} tokens). {run}

| stage | seed | learning rate | steps | minutes | CPU minutes | conversations |
|---|---|---|---|---|---|---|
{stages}

`questions.json` lists the questions asked below. Those with `"trained": false` have a wording, a
sentence or a pair of colours that is not in the training data; the script asserts it. Pictures
need no torchvision: `assets/train/pictures.py` draws them and cuts the patches, and
`AutoImageProcessor` gives the same.

    python assets/train/check.py assets/qwen3.5-tiny [--as bf16|rounded|nf4|shuffled]

## Measured

Held-out text in windows of 512 tokens; the numbers come from `training.json`.

| | nats per token | perplexity |
|---|---|---|
| unigram model | {unigram} |
| float32, before saving | {float32} |
| **as saved, bf16** | **{bf16}** |
| linears rounded to NF4, scales exact | {rounded} |
| `qwen35 convert --recipe nf4`, bitsandbytes | {nf4} |
| block scales shuffled | {shuffled} |
| MTP layer, token after the next | {mtp} |

The first guess of the MTP layer is right for {first_guess:.1%} of the held-out tokens.

Correct answers. As saved and in NF4 each is asked greedily with and without a
repetition penalty of 1.15; with the scales of each linear's blocks of 64 shuffled, without.

| | trained | not trained | all |
|---|---|---|---|
| as saved, bf16 | {q_bf16} |
| linears rounded to NF4, scales exact | {q_rounded} |
| `qwen35 convert --recipe nf4`, bitsandbytes | {q_nf4} |
| block scales shuffled | {q_shuffled} |

## Limits

It knows one-digit arithmetic, twenty-five capitals, French for sixteen nouns and twelve
adjectives, thirteen one-line functions, summaries of two kinds of sentences, and the eight colours
of two-coloured pictures. Asked anything else it answers with one of these, or with something that
looks like the standard library. It has seen no videos, no tools and no second turns.

## Licence

Apache-2.0. `eval.txt` is an excerpt of the Python standard library and the weights were trained on
it: Copyright Python Software Foundation, under the PSF License Version 2
(https://docs.python.org/3/license.html).
"""


def readme(report: dict[str, Any]) -> str:
    """The README of a training report."""
    held, asked = report["held_out"], report["questions"]
    variants = ("bf16", "rounded", "nf4", "shuffled")
    losses = {name: _loss(held[name]) for name in ("float32", *variants)}
    losses["bf16"] = losses["bf16"].replace(" | ", "** | **")
    answers = {f"q_{name}": _answers(asked[name]) for name in variants}
    plain = ("python", "torch", "transformers", "threads", "parameters", "tensors")
    counts = ("text_tokens", "held_out_tokens")
    rows = [_stage(str(i), stage) for i, stage in enumerate(report["stages"], 1)]
    return TEXT.format(
        **{name: report[name] for name in (*plain, *counts)},
        **losses,
        **answers,
        run=_run(report),
        stages="\n".join([*rows, _stage("MTP layer", report["mtp_stage"])]),
        held_out_count=len(report["held_out_files"]),
        unigram=_loss(report["unigram"]),
        mtp=_loss(report["mtp"]),
        first_guess=report["mtp"]["first_guess_right"],
    )


def _run(report: dict[str, Any]) -> str:
    """How long it took, and which stages were not trained in this run."""
    stages = [*report["stages"], report["mtp_stage"]]
    wall, cpu = (sum(stage[key] for stage in stages) for key in ("minutes", "cpu_minutes"))
    checked = report["checking"]
    said = (
        f"All stages took {wall:.1f} minutes\n({cpu:.1f} of CPU time over "
        f"{report['threads']} threads), the checks {checked['minutes']} "
        f"({checked['cpu_minutes']})."
    )
    reused = [str(i) for i, stage in enumerate(report["stages"], 1) if "reused" in stage]
    if reused:
        said += (
            f"\n\nNot in one go: stages {', '.join(reused)} were read from an earlier run of the "
            "script (`--stages-dir`)."
        )
    return f"{said} {report['note']}" if "note" in report else said


def _stage(name: str, stage: dict[str, Any]) -> str:
    """One row of the table of stages."""
    talks = ", ".join(f"{count:,} {kind}" for kind, count in stage["subjects"].items())
    cells = [stage[k] for k in ("seed", "rate", "steps", "minutes", "cpu_minutes")]
    return " | ".join(["| " + name, *map(str, cells), f"{talks} |"])


def _loss(value: dict[str, float]) -> str:
    return f"{value['nats']:.3f} | {value['perplexity']:.1f}"


def _answers(counts: dict[str, list[int]]) -> str:
    return " | ".join(f"{right}/{asked}" for right, asked in counts.values())


def main() -> int:
    """Write the README of a finished folder."""
    folder = Path(sys.argv[1])
    report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(readme(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
