"""Train the embedded checkpoint from nothing: python assets/train/train.py --out FOLDER.

Everything is seeded and the number of steps is fixed, so the same Python, torch and machine give
the same files. The folder appears whole: it is written beside its final name, checked
(`check.py`) and renamed. With --stages-dir the result of every stage is kept, and a stage whose
result is there already is not trained again; the report says so.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from check import held_out_rows, record, token_stream, with_perplexity
from checkpoint import IMAGE_SETTINGS, save_settings, save_weights, stored_tensors, write_json
from corpus import Corpus, load_corpus
from dialogues import Example
from exam import questions
from learning import Clock, text_loss
from mtp import mtp_loss
from pictures import Picture, draw, patches
from rendering import completion_text, prompt_text
from spreading import spread_layer
from stages import STAGES, Material, conversations, fit_mtp, train_stages
from vocabulary import save_tokenizer, train_tokenizer

VOCABULARY_EXAMPLES = 6_000


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


def prepare(corpus: Corpus, fresh: Path) -> Material:
    """Learn the vocabulary and write the files that need no training; check both."""
    texts, pictures = conversations(STAGES[0])
    tokenizer = make_tokenizer(corpus, texts, pictures)
    save_static(fresh, tokenizer, corpus)
    assert_same_patches()
    assert_same_rendering(fresh, texts[:100] + pictures[:20])
    return Material(tokenizer, token_stream(tokenizer, corpus.train))


def run(fresh: Path, kept: Path | None) -> bool:
    """Train, save into `fresh`, measure what was saved, report. -> whether all checks pass"""
    clock = Clock()
    corpus = load_corpus()
    material = prepare(corpus, fresh)
    model, stages = train_stages(material, fresh, kept)
    layer, mtp_stage = fit_mtp(material, model)
    held = token_stream(material.tokenizer, (corpus.held_out,))
    rows = held_out_rows(held)
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
        "held_out_tokens": len(held),
        "held_out_files": list(corpus.held_out_files),
        "unigram": with_perplexity(unigram_loss(material.stream, held)),
        "held_out": {"float32": with_perplexity(before)},
        "mtp": {**with_perplexity(guessed), "first_guess_right": round(accepted, 4)},
    }
    write_json(fresh / "training.json", report)
    return record(fresh)


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
    if not run(fresh, options.stages_dir):
        sys.stderr.write(f"a check failed; what was trained is left in {fresh}\n")
        return 1
    replace_folder(fresh, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
