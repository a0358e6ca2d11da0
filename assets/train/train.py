"""Train the embedded checkpoint from nothing: python assets/train/train.py --out FOLDER.

Everything is seeded and the number of steps is fixed, so the same Python, torch and machine give
the same files. The folder appears whole: it is written beside its final name and renamed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from batches import Batch, Mix, step_batches, text_rows
from check import PENALTIES, examine, load, tally
from checkpoint import (
    IMAGE_SETTINGS,
    generation_config,
    new_model,
    save_settings,
    save_weights,
    stored_tensors,
    write_json,
)
from corpus import Corpus, load_corpus
from dialogues import Example, picture_examples, text_examples
from exam import assert_separate, canonical_examples, questions
from learning import Weights, text_loss, train_trunk
from mtp import mtp_loss, new_layer, train_mtp
from pictures import Picture, draw, patches
from rendering import Sequence, completion_text, encode_all, prompt_text
from rounding import round_model, shuffle_model
from sides import Course, picture_count, train_sides
from spreading import spread_layer
from vocabulary import save_tokenizer, special_ids, train_tokenizer

MTP_RATE = 3e-3
MTP_STEPS = 240
MTP_MIX = Mix(8, 1, 1.0, 1)
MTP_SEED = 91
VOCABULARY_EXAMPLES = 6_000
WINDOW = 512
SHUFFLE_SEED = 7


@dataclass(frozen=True)
class Stage:
    """A stretch of training with its own data and learning rate.

    Args:
        arithmetic: share of arithmetic in the conversations without a picture.
        plain_shares: share of one-coloured pictures, for each part of the stage.
        canonical: how often each trained question of the exam is mixed in.
        sides: in a stage of `sides.py`, how it goes.
    """

    seed: int
    rate: float
    steps: int
    mix: Mix
    weights: Weights
    arithmetic: float
    plain_shares: tuple[float, ...]
    canonical: int
    sides: Course | None = None


STAGES = (
    Stage(35, 5e-3, 560, Mix(24, 10, 1.0, 2), Weights(), 0.3, (0.5, 0.1), 8),
    Stage(51, 3e-3, 420, Mix(64, 12, 0.6, 3), Weights(1.0, 1.0, 1.0, True), 0.6, (0.05,), 24),
    Stage(61, 3e-3, 210, Mix(20, 1, 0.6, 2), Weights(), 0.4, (0.0,), 16, Course(100, 0.3)),
    Stage(
        *(71, 2e-3, 150, Mix(28, 1, 0.6, 2), Weights(), 0.65, (0.0,), 16),
        Course(0, 0.5, rounded=True),
    ),
)
"""First language, names of things and colours; then sums and short answers; then sides; then all
of it again, rounded to NF4 in every other step."""


def token_stream(tokenizer: Tokenizer, documents: tuple[str, ...]) -> Tensor:
    """All documents as one row of ids, each followed by the end-of-text token."""
    end = special_ids()["<|endoftext|>"]
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents)):
        ids += encoding.ids
        ids.append(end)
    return torch.tensor(ids)


def conversations(stage: Stage) -> tuple[list[Example], list[Example]]:
    """Text and picture exchanges, the trained exam questions mixed in; checked to be apart."""
    canonical = canonical_examples() * stage.canonical
    texts = text_examples(stage.seed + 1, stage.steps * stage.mix.texts, stage.arithmetic)
    pictures = picture_examples(
        stage.seed + 2, stage.steps * stage.mix.pictures, stage.plain_shares
    )
    for start, pool, wanted in ((0, texts, False), (1, pictures, True)):
        extra = [e for e in canonical if (e.picture is not None) == wanted]
        places = np.random.default_rng(stage.seed + start).permutation(len(pool))[: len(extra)]
        for place, example in zip(places.tolist(), extra, strict=True):
            pool[place] = example
    assert_separate([*texts, *pictures])
    return texts, pictures


def held_out_rows(stream: Tensor) -> Batch:
    """The held-out ids in windows of 512."""
    count = (len(stream) - 1) // WINDOW
    return text_rows(stream, WINDOW, torch.arange(count) * WINDOW)


def unigram_loss(train: Tensor, held: Tensor) -> float:
    """Nats per held-out token of a model that knows token frequencies only (add-one)."""
    counts = torch.bincount(train, minlength=4096).double() + 1.0
    return float(-(counts / counts.sum()).log()[held].mean())


def assert_same_patches() -> None:
    """Our patches equal those of transformers' PIL image processor."""
    settings = {k: IMAGE_SETTINGS[k] for k in ("size", "image_mean", "image_std")}
    processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, **settings)
    pixels = draw(Picture("red", "blue", (448, 224), jitter=3))
    theirs = processor(images=Image.fromarray(pixels), return_tensors="pt")
    ours = torch.from_numpy(patches(pixels))
    torch.testing.assert_close(theirs["pixel_values"], ours, rtol=0, atol=1e-6)
    if theirs["image_grid_thw"].tolist() != [[1, 14, 28]]:
        raise AssertionError("the image processor found another grid")


def assert_same_rendering(folder: Path, examples: list[Example]) -> None:
    """Our rendering of a conversation equals the chat template's, text and ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for number, example in enumerate(examples):
        thinking = number % 2 == 0
        content: list[dict[str, str]] = [{"type": "text", "text": example.prompt}]
        if example.picture is not None:
            content.insert(0, {"type": "image"})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if example.system:
            messages.insert(0, {"role": "system", "content": example.system})
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        ours = prompt_text(example, thinking=thinking)
        if text != ours or tokenizer(text)["input_ids"] != plain.encode(ours).ids:
            raise AssertionError(f"rendered otherwise: {ours!r} and {text!r}")


def make_tokenizer(corpus: Corpus, texts: list[Example], pictures: list[Example]) -> Tokenizer:
    """Learn the vocabulary from the corpus and a part of the conversations."""
    part = texts[:VOCABULARY_EXAMPLES] + pictures[: VOCABULARY_EXAMPLES // 4]
    spoken = [prompt_text(e, thinking=True) + completion_text(e, thinking=True) for e in part]
    return train_tokenizer([*corpus.train, *spoken])


def spread(model: Qwen3_5ForConditionalGeneration, layer: torch.nn.ModuleDict) -> None:
    """Make the scales of all decoder layers uneven without changing the function."""
    for number, part in enumerate([*model.model.language_model.layers, layer["layers"][0]]):
        spread_layer(part, number)


def exam_results(folder: Path) -> dict[str, Any]:
    """Questions answered rightly by the saved files: as saved, after NF4, with shuffled scales."""
    out: dict[str, Any] = {}
    for name in ("bf16", "nf4", "shuffled"):
        model, tokenizer = load(folder)
        if name == "nf4":
            round_model(model)
        if name == "shuffled":
            shuffle_model(model, SHUFFLE_SEED)
        rows = examine(model, tokenizer, questions(), PENALTIES[: 1 if name == "shuffled" else 2])
        out[name] = tally(rows)
        sys.stderr.write(f"questions {name} {out[name]}\n")
        wrong = [f"{q['id']} {p} {said!r}" for q, p, said, right in rows if not right]
        if name != "shuffled":
            out[f"{name} wrong"] = wrong
            sys.stderr.writelines(f"  wrong {line}\n" for line in wrong)
    return out


def saved_text_loss(folder: Path, rows: Batch) -> dict[str, float]:
    """Held-out loss of the saved bf16 files: as saved, after NF4, with shuffled scales."""
    out = {}
    for name in ("bf16", "nf4", "shuffled"):
        model, _ = load(folder)
        if name == "nf4":
            round_model(model)
        if name == "shuffled":
            shuffle_model(model, SHUFFLE_SEED)
        out[name] = text_loss(model, rows)
    return out


def with_perplexity(loss: float) -> dict[str, float]:
    """A loss in nats per token, and as perplexity."""
    return {"nats": round(loss, 4), "perplexity": round(math.exp(loss), 2)}


def save_static(folder: Path, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Write everything but weights and reports."""
    folder.mkdir(parents=True)
    save_settings(folder)
    save_tokenizer(tokenizer, folder)
    (folder / "eval.txt").write_text(corpus.held_out, encoding="utf-8")
    write_json(folder / "questions.json", questions())


def replace_folder(fresh: Path, folder: Path) -> None:
    """Put the finished folder in the place of the old one."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class Clock:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def minutes(self) -> dict[str, float]:
        """Both in minutes."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        return {"minutes": round(wall / 60, 1), "cpu_minutes": round(cpu / 60, 1)}


@dataclass(frozen=True)
class Material:
    """What all stages read."""

    corpus: Corpus
    tokenizer: Tokenizer
    stream: Tensor
    held: Tensor


def prepare(fresh: Path) -> Material:
    """Learn the vocabulary and write the files that need no training; check both."""
    corpus = load_corpus()
    texts, pictures = conversations(STAGES[0])
    tokenizer = make_tokenizer(corpus, texts, pictures)
    save_static(fresh, tokenizer, corpus)
    assert_same_patches()
    assert_same_rendering(fresh, texts[:100] + pictures[:20])
    stream = token_stream(tokenizer, corpus.train)
    return Material(corpus, tokenizer, stream, token_stream(tokenizer, (corpus.held_out,)))


def encoded(
    stage: Stage, tokenizer: Tokenizer
) -> tuple[list[Sequence], list[Sequence], dict[str, int]]:
    """The conversations of a stage as ids, without and with pictures, and how many of each kind."""
    texts, pictures = conversations(stage)
    spoken = encode_all(tokenizer, texts, stage.seed + 3)
    shown = encode_all(tokenizer, pictures, stage.seed + 4)
    counts = Counter(e.subject for e in (texts if stage.sides else texts + pictures))
    if stage.sides:
        counts["picture"] = picture_count(stage.sides, stage.steps)
    return spoken, shown, dict(sorted(counts.items()))


def fit(stage: Stage, material: Material, model: Qwen3_5ForConditionalGeneration) -> dict[str, Any]:
    """Train the trunk. -> what was done"""
    torch.manual_seed(stage.seed)
    clock = Clock()
    spoken, shown, subjects = encoded(stage, material.tokenizer)
    data = step_batches(material.stream, spoken, shown, stage.mix, stage.seed)
    if stage.sides:
        plan = (stage.sides, stage.steps, stage.rate, stage.seed)
        train_sides(model, material.tokenizer, data, *plan)
    else:
        train_trunk(model, data, stage.steps, stage.rate, stage.weights)
    done = {"seed": stage.seed, "rate": stage.rate, "steps": stage.steps}
    return {**done, **clock.minutes(), "subjects": subjects}


def fit_mtp(
    material: Material, model: Qwen3_5ForConditionalGeneration
) -> tuple[torch.nn.ModuleDict, dict[str, Any]]:
    """Train the MTP layer on the text and on the conversations of the second stage."""
    torch.manual_seed(MTP_SEED)
    clock = Clock()
    spoken, shown, _ = encoded(STAGES[1], material.tokenizer)
    layer = new_layer(model)
    data = step_batches(material.stream, spoken, shown, MTP_MIX, MTP_SEED)
    train_mtp(model, layer, data, MTP_STEPS, MTP_RATE)
    done = {"seed": MTP_SEED, "rate": MTP_RATE, "steps": MTP_STEPS}
    return layer, {**done, **clock.minutes()}


def say_how_it_stands(
    model: Qwen3_5ForConditionalGeneration, tokenizer: Any, rows: Batch, number: int
) -> None:
    """Write held-out loss and right answers of a part of the exam to stderr."""
    part = Batch(rows.ids[:24], rows.targets[:24])
    counts = tally(examine(model, tokenizer, questions()[::3], PENALTIES[:1]))
    loss = text_loss(model, part)
    sys.stderr.write(f"stage {number}: held-out text {loss:.3f}, every third question {counts}\n")
    sys.stderr.flush()


def train_stages(
    material: Material, fresh: Path, kept: Path | None
) -> tuple[Qwen3_5ForConditionalGeneration, list[dict[str, Any]]]:
    """Run all stages. A stage whose result lies in `kept` is read from there instead."""
    torch.manual_seed(STAGES[0].seed)
    model = new_model()
    model.generation_config = GenerationConfig.from_dict(generation_config())
    tokenizer = AutoTokenizer.from_pretrained(fresh)
    rows = held_out_rows(material.held)
    stages = []
    for number, stage in enumerate(STAGES, 1):
        result = kept / f"stage-{number}.safetensors" if kept else None
        if result and result.exists():
            load_model(model, result)
            stages.append({**json.loads(result.with_suffix(".json").read_text()), "reused": True})
            continue
        stages.append(fit(stage, material, model))
        if result:
            result.parent.mkdir(parents=True, exist_ok=True)
            save_model(model, str(result))
            write_json(result.with_suffix(".json"), stages[-1])
        say_how_it_stands(model, tokenizer, rows, number)
    return model, stages


def run(fresh: Path, kept: Path | None) -> None:
    """Train, save into `fresh`, measure what was saved and write the report."""
    clock = Clock()
    material = prepare(fresh)
    model, stages = train_stages(material, fresh, kept)
    layer, mtp_stage = fit_mtp(material, model)
    rows = held_out_rows(material.held)
    guessed, accepted = mtp_loss(model, layer, rows)
    before = text_loss(model, rows)
    spread(model, layer)
    tensors = stored_tensors(model, layer.state_dict())
    save_weights(tensors, fresh)
    report = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "training": clock.minutes(),
        "stages": stages,
        "mtp_stage": mtp_stage,
        "parameters": sum(t.numel() for t in tensors.values()),
        "tensors": len(tensors),
        "text_tokens": len(material.stream),
        "held_out_tokens": len(material.held),
        "held_out_files": list(material.corpus.held_out_files),
        "unigram": with_perplexity(unigram_loss(material.stream, material.held)),
        "held_out": {"float32": with_perplexity(before)},
        "mtp": {**with_perplexity(guessed), "first_guess_right": round(accepted, 4)},
    }
    write_json(fresh / "training.json", report)
    losses = saved_text_loss(fresh, rows)
    report["held_out"].update({k: with_perplexity(v) for k, v in losses.items()})
    report["questions"] = exam_results(fresh)
    report["all"] = clock.minutes()
    write_json(fresh / "training.json", report)
    sys.stderr.write(f"{json.dumps(report)}\n")


def main() -> int:
    """Parse the command line and run the training."""
    parser = argparse.ArgumentParser(description="Train the embedded tiny checkpoint.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages-dir", type=Path, help="keep the result of every stage there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fresh = options.out.with_name(options.out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    run(fresh, options.stages_dir)
    replace_folder(fresh, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
