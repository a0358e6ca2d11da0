"""The backward pass, layer by layer: the gradients of transformers' whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calibrating import source
from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Reader, open_folder
from qwen35.forward.backward_stream import BackwardStream, ProductGradients, drawn
from qwen35.forward.batch_size import PassSizes
from qwen35.forward.blocks import blocks
from qwen35.forward.builder import Builder
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.forward.stream_folder import StreamFolder
from qwen35.progress import Silent

WINDOWS, LENGTH, FIRST, SEED = 3, 24, 10, 7

CASES: dict[str, dict[str, Any]] = {
    "dense, tied": {},
    "dense, text-only": {"text_only": True, "tied": False, "mtp": 0},
    "experts, fused": {"moe": True, "tied": False},
    "experts, one by one": {"moe": True, "tied": True, "per_expert": True},
}


class Kept:
    """Keeps the sums of all gradients of weights in files, by block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._sums: dict[str, Any] = {}
        self.seen: list[tuple[str, int]] = []

    def _add(self, key: str, value: Any) -> None:
        self._sums[key] = self._sums.get(key, 0) + value

    def product(self, gradients: ProductGradients) -> None:
        one = gradients
        assert one.weight.shape == (one.g.shape[1], one.x.shape[1])
        expert = "" if one.expert is None else f"@{one.expert}"
        self._add(f"{one.name}{expert}+{one.first}", one.total.numpy())
        self.seen.append((one.block, one.window))

    def embedding(self, window: int, ids: Any, g: Any) -> None:
        total = np.zeros((int(ids.max()) + 1, g.shape[1]), np.float32)
        np.add.at(total, ids, g.numpy())
        padded = np.zeros((4096, g.shape[1]), np.float32)
        padded[: len(total)] = total
        self._add("embed_tokens", padded)

    def finished(self, block: str) -> None:
        with (self.folder / f"{block}.npz").open("wb") as file:
            np.savez(file, allow_pickle=False, **self._sums)
        self._sums = {}

    def block(self, name: str) -> dict[str, Any]:
        with np.load(self.folder / f"{name}.npz") as arrays:
            return dict(arrays)


def token_windows(vocabulary: int) -> Any:
    generator = np.random.default_rng(1)
    return generator.integers(0, vocabulary, (WINDOWS, LENGTH)).astype(np.int32)


def stream(
    folder: Path, work: StreamFolder, kept: Kept, progress: Silent, reader: Reader, **options: Any
) -> BackwardStream:
    checkpoint, items = take(open_folder(folder), tower=False)
    builder = Builder(StoredWeights(reader, checkpoint.config, items), "float32", "cpu")
    windows = token_windows(checkpoint.config.dims["vocab"])
    parts = blocks(items)
    options = {"sizes": PassSizes(0, 0, batch=2), "group": 2, "seed": SEED, **options}
    return BackwardStream(
        builder, parts, windows, FIRST, work=work, visitor=kept, progress=progress, **options
    )


def run(folder: Path, out: Path, progress: Silent | None = None, **options: Any) -> Kept:
    kept = Kept(out)
    work = StreamFolder(out.with_name(f"{out.name}-work"), "digest", restart=False)
    with work, Reader(open_folder(folder)) as reader:
        stream(folder, work, kept, progress or Silent(), reader, **options).run()
    return kept


def whole_model(folder: Path) -> tuple[Any, Any]:
    """Return the model after one backward pass over all windows, and its text part."""
    vision = open_folder(folder).config.architecture.vision
    kind = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    model.eval()
    text = model.model.language_model if vision else model.model
    for window, ids in enumerate(token_windows(text.embed_tokens.weight.shape[0])):
        logits = model(input_ids=torch.from_numpy(ids).long()[None]).logits[0, FIRST:]
        uniform = np.random.default_rng([SEED, window]).random(len(logits))
        tokens = drawn(torch, logits.detach(), uniform)
        logits.log_softmax(-1).gather(-1, tokens[:, None]).sum().backward()
    return model, text


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_model(case: str, tmp_path: Path) -> None:
    folder = source(tmp_path, **CASES[case])
    kept = run(folder, tmp_path / "out")
    model, text = whole_model(folder)
    compared = set()

    def compare(found: Any, expected: Any, name: str) -> None:
        scale = expected.abs().max()
        assert scale > 0
        assert np.abs(found - expected.numpy()).max() <= 2e-5 * scale, name
        compared.add(name)

    for i, layer in enumerate(text.layers):
        found = kept.block(f"layers.{i}")
        for key, value in found.items():
            name, _, expert = key.partition("+")[0].partition("@")
            if expert:
                compare(value, layer.get_parameter(name).grad[int(expert)], f"{i}.{name}")
            else:
                compare(value, layer.get_submodule(name).weight.grad, f"{i}.{name}")
        linears = {n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        assert {key.partition("+")[0] for key in found if "@" not in key} == linears
    pieces = kept.block("head")
    head = np.concatenate([pieces[key] for key in sorted(pieces, key=lambda k: int(k[8:]))])
    embedding = kept.block("embeddings")["embed_tokens"][: len(text.embed_tokens.weight)]
    if model.config.tie_word_embeddings:
        compare(head + embedding, text.embed_tokens.weight.grad, "tied")
    else:
        compare(head, model.lm_head.weight.grad, "head")
        compare(embedding, text.embed_tokens.weight.grad, "embedding")
    assert any("experts" in name for name in compared) == ("moe" in CASES[case])


class Stop(Silent):
    """Stops when it has heard of a block so many times."""

    def __init__(self, block: str, times: int) -> None:
        self.block, self.times = block, times

    def advance(self, nbytes: int, item: str) -> None:
        self.times -= item == self.block
        if not self.times:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), moe=True, tied=False)


def test_interrupted_it_goes_on_with_equal_bytes(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "whole")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    for block, times in (("layers.1", 1), ("head", 1), ("layers.2", 2)):
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "out", Stop(block, times))
    last = run(folder, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == expected
    assert {block for block, _ in last.seen} == {"layers.0", "layers.1"}
    assert [window for _, window in last.seen] == sorted(
        (window for _, window in last.seen[: len(last.seen) // 2])
    ) + sorted(window for _, window in last.seen[len(last.seen) // 2 :])


def test_groups_and_reading_ahead_change_nothing(folder: Path, tmp_path: Path) -> None:
    one = run(folder, tmp_path / "one", group=3)
    other = run(folder, tmp_path / "other", group=1, ahead=True)
    for name in ("head", "layers.3", "layers.0", "embeddings"):
        first, second = one.block(name), other.block(name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert np.abs(value - second[key]).max() <= 1e-5 * np.abs(value).max()


def test_tokens_are_drawn_from_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(2048, -1)
    tokens = drawn(torch, logits, np.random.default_rng(0).random(2048))
    shares = torch.bincount(tokens, minlength=4) / 2048
    assert (shares - torch.tensor([0.5, 0.25, 0.125, 0.125])).abs().max() < 0.03
    edges = drawn(torch, logits[:4], np.array([0.0, 0.49, 0.51, np.nextafter(1, 0)]))
    assert edges.tolist() == [0, 0, 1, 3]
