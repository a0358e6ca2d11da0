"""Prices of rounding: those of transformers' whole model, whatever holds the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import qwen35
from calibrating import source
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.reconciled import take
from qwen35.checkpoint.source import Reader
from qwen35.codecs.input_quantizers import eight_bits
from qwen35.errors import OutputError, UsageError
from qwen35.evaluation.runners import PYTORCH_MEMORY
from qwen35.forward.backward_stream import drawn
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.planning.sources import fetch_source
from qwen35.progress import Silent
from qwen35.tuning.prices import FEW_TOKENS, ExpertPrices, Prices, few_experts, shared_prices
from qwen35.tuning.pricing_passes import SEED, PricingSetting
from qwen35.tuning.pricing_plan import plan_pricing
from qwen35.tuning.pricing_run import discard_work, measure_prices
from qwen35.tuning.space import ChoiceSpace

COUNT, CONTEXT = 2, 33
FIRST = CONTEXT // 2
EXPERTS = 4
SCORED = COUNT * (CONTEXT - 1 - FIRST)

CASES: dict[str, dict[str, Any]] = {
    "dense, tied": {},
    "dense, untied": {"text_only": True, "tied": False, "mtp": 0},
    "experts, fused": {"moe": True, "tied": False},
    "experts, one by one": {"moe": True, "per_expert": True},
}


def setting(**options: Any) -> PricingSetting:
    windows = np.random.default_rng(1).integers(0, 400, (COUNT, CONTEXT)).astype(np.int32)
    return replace(PricingSetting(windows, "cpu", 1, 1, None, restart=False), **options)


def prices(
    space: ChoiceSpace, path: Path, progress: Silent | None = None, **options: Any
) -> Prices:
    return measure_prices(space, setting(**options), "it", path, progress or Silent())


def decoded(folder: Path) -> dict[str, Any]:
    """Return the weights of the text model by their names in transformers."""
    checkpoint, items = take(fetch_source(str(folder)), tower=False)
    found: dict[str, Any] = {}
    with Reader(checkpoint) as reader:
        weights = StoredWeights(reader, checkpoint.config, items)
        for item in items:
            if item.role.scope == "text" and len(item.spec.shape) > 1:
                name = item.spec.name.replace("language_model.", "")
                found[name] = torch.empty(item.spec.shape)
                weights.fill(torch, item, found[name])
    return stacked(found)


def stacked(found: dict[str, Any]) -> dict[str, Any]:
    """Return weights with matrices of experts stacked, as transformers has them."""
    stems = {name.rpartition(".0.gate_proj")[0] for name in found if ".0.gate_proj" in name}
    for stem in stems:
        matrices = {
            leaf: [found.pop(f"{stem}.{e}.{leaf}.weight") for e in range(EXPERTS)]
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
        pairs = zip(matrices["gate_proj"], matrices["up_proj"], strict=True)
        found[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        found[f"{stem}.down_proj"] = torch.stack(matrices["down_proj"])
    return found


def _keep(seen: list[Any], _: Any, x: Any, out: Any) -> None:
    seen.append((x, out))


class Whole:
    """Transformers' whole model: squares of gradients by parameter, and inputs of one product."""

    def __init__(self, folder: Path) -> None:
        kind = "AutoModelForCausalLM"
        if "vision_config" in json.loads((folder / "config.json").read_text()):
            kind = "AutoModelForImageTextToText"
        model = getattr(transformers, kind).from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        )
        model.eval()
        text = getattr(model.model, "language_model", model.model)
        # Both roles of a tied matrix apart, as they are priced.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        self.squares: dict[str, Any] = {}
        self.inputs = 0.0
        layer = text.layers[0].mlp
        watched = getattr(layer, "down_proj", None)
        for window, ids in enumerate(setting().windows[:, :-1]):
            logits = model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits
            logits = logits[0, FIRST:]
            uniform = np.random.default_rng([SEED, window]).random(len(logits))
            tokens = drawn(torch, logits.detach(), uniform)
            model.zero_grad()
            seen: list[Any] = []
            keep = partial(_keep, seen)
            hook = watched and watched.register_forward_hook(keep)
            logits = model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits
            for _, out in seen:
                out.retain_grad()
            logits[0, FIRST:].log_softmax(-1).gather(-1, tokens[:, None]).sum().backward()
            if hook and watched:
                hook.remove()
                [((x,), out)] = seen
                shift = eight_bits(x.detach(), 32, half=True) - x.detach()
                moved = ((out.grad @ watched.weight) * shift).sum(-1)
                self.inputs += float(moved.detach().double().square().sum())
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    own = name.replace("language_model.", "")
                    self.squares[own] = self.squares.get(own, 0) + parameter.grad.square()


@pytest.mark.parametrize("case", CASES)
def test_prices_are_those_of_the_whole_model(case: str, tmp_path: Path) -> None:
    """Also of rows and columns that GGUF files reorder, of experts, and of both roles of a head."""
    folder = source(tmp_path, **CASES[case])
    space = ChoiceSpace(fetch(str(folder)), "gguf", ("q8_0", "f16"))
    found = prices(space, tmp_path / "m.json")
    made = Path(space.make({unit.name: "q8_0" for unit in space.units}, tmp_path / "made", 1))
    exact, rounded = decoded(folder), decoded(next(made.glob("*.gguf")))
    whole = Whole(folder)
    expected: dict[str, float] = {}
    for name, error in ((name, rounded[name] - exact[name]) for name in rounded):
        if name in whole.squares and error.any():
            expected[name] = float((whole.squares[name] * error.square()).sum()) / (2 * SCORED)
            if name == EMBEDDING and space.checkpoint.config.tied:
                nats = float((whole.squares["lm_head.weight"] * error.square()).sum())
                expected[name] += nats / (2 * SCORED)
    summed: dict[str, float] = {}
    for unit, row in found.weights.items():
        assert row["f16"] == found.inputs[unit]["f16"] == 0
        summed[parameter(unit)] = summed.get(parameter(unit), 0.0) + row["q8_0"]
    assert summed.keys() == expected.keys()
    for name, nats in expected.items():
        assert summed[name] == pytest.approx(nats, rel=2e-3), name
    if whole.inputs:
        nats = found.inputs["mlp.down_proj@0"]["q8_0"]
        assert nats == pytest.approx(whole.inputs / (2 * SCORED), rel=1e-3)
    # So few tokens reach an expert that each has its layer's price per token; the sum is the same.
    assert bool(few_experts(found.experts)) == ("experts" in case)


def test_a_gguf_source_has_the_prices_of_its_original(tmp_path: Path) -> None:
    """Whose rows are in another order, in which the file is read."""
    folder = source(tmp_path, layers=1, mtp=0)
    qwen35.gguf(folder, tmp_path / "exact", types="F32", threads=1)
    [file] = (tmp_path / "exact").glob("*.gguf")
    found = []
    for name, model in enumerate((folder, file)):
        space = ChoiceSpace(fetch_source(str(model)), "gguf", ("q4_K", "q8_0"))
        found.append(prices(space, tmp_path / f"{name}.json"))
    for unit, row in found[0].weights.items():
        assert found[1].weights[unit] == pytest.approx(row, rel=1e-5), unit
        assert found[1].inputs[unit] == pytest.approx(found[0].inputs[unit], rel=1e-5), unit


EMBEDDING = "model.embed_tokens.weight"


def parameter(unit: str) -> str:
    """Return the parameter of transformers that a unit is, or is a part of."""
    kind, _, layer = unit.partition("@")
    kind = kind.replace("experts.gate_proj", "experts.gate_up_proj")
    kind = kind.replace("experts.up_proj", "experts.gate_up_proj")
    if not layer:
        return "lm_head.weight" if kind == "lm_head" else f"model.{kind}.weight"
    return f"model.layers.{layer}.{kind}" + ("" if "experts." in kind else ".weight")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> ChoiceSpace:
    folder = source(tmp_path_factory.mktemp("moe"), moe=True, layers=2)
    return ChoiceSpace(fetch(str(folder)), "gguf", ("q4_K", "q8_0", "f16"))


@pytest.fixture(scope="module")
def moe_prices(moe: ChoiceSpace, tmp_path_factory: pytest.TempPathFactory) -> Prices:
    return prices(moe, tmp_path_factory.mktemp("prices") / "m.json")


def test_threads_change_nothing(moe: ChoiceSpace, moe_prices: Prices, tmp_path: Path) -> None:
    found = prices(moe, tmp_path / "m.json", threads=2)
    for unit, row in moe_prices.weights.items():
        assert found.weights[unit] == pytest.approx(row, rel=1e-4)


def test_experts_read_one_by_one_cost_the_same(
    moe: ChoiceSpace, moe_prices: Prices, tmp_path: Path
) -> None:
    """Where a layer does not fit into memory, also on the way back."""
    with pytest.raises(UsageError, match="too little, expected at least"):
        prices(moe, tmp_path / "m.json", memory=100)
    plan = plan_pricing(moe.checkpoint, context=CONTEXT, windows=COUNT, memory=None)
    memory = PYTORCH_MEMORY + plan.sizes.layer * 2 // 3 + 4 * plan.sizes.window
    assert plan_pricing(moe.checkpoint, context=CONTEXT, windows=COUNT, memory=memory).sizes.wide
    found = prices(moe, tmp_path / "m.json", memory=memory)
    for unit, row in moe_prices.weights.items():
        assert found.weights[unit] == pytest.approx(row, rel=1e-3)
        assert found.inputs[unit] == pytest.approx(moe_prices.inputs[unit], rel=1e-3)
    for unit, one in moe_prices.experts.items():
        assert found.experts[unit].tokens == one.tokens
        assert sum(one.tokens) == 2 * COUNT * (CONTEXT - 1)


class Stopping(Silent):
    """Progress that stops at a weight, as Ctrl-C does."""

    def advance(self, nbytes: int, item: str) -> None:
        if ".layers.0." in item:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(moe: ChoiceSpace, moe_prices: Prices, tmp_path: Path) -> None:
    """With the same prices, to the bit; another command does not take them for its own."""
    path = tmp_path / "m.json"
    with pytest.raises(KeyboardInterrupt):
        prices(moe, path, Stopping())
    assert {p.name for p in tmp_path.iterdir()} == {".m.json.pricing"}
    assert {"head.prices", "layers.1.prices"} <= {
        p.name for p in (tmp_path / ".m.json.pricing").iterdir()
    }
    with pytest.raises(OutputError, match="an interrupted run of another plan"):
        prices(moe, path, sample=2)
    assert prices(moe, path) == moe_prices
    discard_work(path)
    assert not list(tmp_path.iterdir())


def test_rows_stand_for_others(moe: ChoiceSpace, moe_prices: Prices, tmp_path: Path) -> None:
    found = prices(moe, tmp_path / "m.json", sample=4)
    ratios = [found.weights[unit]["q8_0"] / row["q8_0"] for unit, row in moe_prices.weights.items()]
    assert 0.7 < np.median(ratios) < 1.4
    assert found.weights != moe_prices.weights


def test_an_expert_that_few_tokens_reach() -> None:
    """It has the price per token of its layer; the others have their own."""
    tokens = [2 * FEW_TOKENS, FEW_TOKENS, 32, 0]
    shared = shared_prices([6.0, 3.0, 4.0, 0.0], tokens)
    assert shared[:2] == [6.0, 3.0]
    assert shared[2:] == [pytest.approx(32 * 13 / sum(tokens)), 0]
    assert few_experts({"a": ExpertPrices(tokens), "b": ExpertPrices(tokens[:2])}) == {"a": 2}


@pytest.mark.parametrize("kind", ["nf4", "fp8", "nvfp4", "int4", "int4-gptq", "fp8-channel"])
def test_every_format_has_prices(kind: str, tmp_path: Path) -> None:
    folder = source(tmp_path, layers=2)
    space = ChoiceSpace(fetch(str(folder)), kind, (kind, "plain"))
    found = prices(space, tmp_path / "m.json")
    assert found.weights.keys() == {unit.name for unit in space.units}
    for unit, row in found.weights.items():
        assert row[kind] > 0 == row["plain"]
        assert not any(found.inputs[unit].values())
