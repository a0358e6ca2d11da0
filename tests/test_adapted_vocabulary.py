"""Adapters with a vocabulary, a tokenizer or a chat template of their own."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3_5ForCausalLM

import qwen35
from checkpoints import ASSET
from qwen35.errors import InputError
from running import load_all

pytestmark = [pytest.mark.sentences, pytest.mark.filterwarnings("ignore")]

TOKENS = 4103
EMBEDDING = "model.language_model.embed_tokens.weight"


def resized() -> Any:
    model = Qwen3_5ForCausalLM.from_pretrained(ASSET, dtype=torch.float32)
    model.resize_token_embeddings(TOKENS, mean_resizing=False)
    return model


def trained(out: Path, **settings: Any) -> Path:
    """Save an adapter of a model with more tokens than the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, lora_alpha=3, **settings)
        model = get_peft_model(resized(), config)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(out)
    return out


def merged_by_peft(adapter: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(resized(), adapter).merge_and_unload()
    return {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with more tokens and, as trainers save it, the tokenizer beside it."""
    out = trained(tmp_path_factory.mktemp("adapters") / "larger", target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    tokenizer.add_tokens(["<first>", "<second>"])
    tokenizer.save_pretrained(out)
    (out / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for name in ("optimizer.pt", "trainer_state.json", "README.md", "training_args.bin"):
        (out / name).write_text("---\nbase_model: x\n---\n")
    return out


@pytest.mark.parametrize(
    ("settings", "tied"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    ],
)
def test_the_vocabulary_follows_the_adapter(
    settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    adapter = trained(tmp_path / "adapter", **settings)
    qwen35.merge(ASSET, adapter, tmp_path / "out", threads=1)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config.get("text_config", config)["vocab_size"] == TOKENS
    assert config["tie_word_embeddings"] is tied
    got, wanted = load_all(tmp_path / "out"), merged_by_peft(adapter)
    for name in (EMBEDDING, *([] if tied else ["lm_head.weight"])):
        assert got[name].shape[0] == TOKENS
        near = wanted[name].to(got[name].dtype)
        assert int((got[name] != near).sum()) <= near.numel() / 10_000
    assert ("lm_head.weight" in got) is not tied


def test_tokenizer_and_template_come_along(larger: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = qwen35.merge(ASSET, larger, out, threads=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (larger / name).read_bytes(), name
    assert (out / "generation_config.json").read_bytes() == (
        ASSET / "generation_config.json"
    ).read_bytes()
    assert not any((out / name).exists() for name in ("optimizer.pt", "README.md"))
    assert any("from the adapter larger: chat_template.jinja, tok" in n for n in result.plan.notes)
    assert len(AutoTokenizer.from_pretrained(out)) > len(AutoTokenizer.from_pretrained(ASSET))
    assert qwen35.verify(out, source=ASSET, adapter=[larger]).passed
    [row] = json.loads((out / "qwen35.json").read_bytes())["source"]["adapters"]
    assert sorted(row["files"]) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


def test_every_verb_takes_the_vocabulary(larger: Path, tmp_path: Path) -> None:
    merged = tmp_path / ASSET.name
    qwen35.merge(ASSET, larger, merged, threads=1)
    qwen35.gguf(ASSET, tmp_path / "one", types="Q8_0", adapter=[larger], threads=1)
    qwen35.gguf(merged, tmp_path / "two", types="Q8_0", threads=1)
    [one], [two] = ((tmp_path / n).glob("*.gguf") for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    options: dict[str, Any] = {"text": ASSET / "eval.txt", "context": 32, "chunks": 1}
    report = qwen35.evaluate(ASSET, [merged], adapter=[larger], threads=1, **options)
    assert abs(report.candidates[0].comparison.kld.value) < 1e-9


def test_a_template_in_the_settings_of_the_tokenizer_is_not_hidden(
    larger: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(larger, tmp_path / "adapter"))
    settings = json.loads((adapter / "tokenizer_config.json").read_bytes())
    settings["chat_template"] = (adapter / "chat_template.jinja").read_text()
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    (adapter / "chat_template.jinja").unlink()
    qwen35.merge(ASSET, adapter, tmp_path / "out", threads=1)
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.chat_template == settings["chat_template"]


def _another_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"][0] += 1


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[f"base_model.model.{name}"] = tensors[f"base_model.model.{name}"][:, 1:].clone()


def _only_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.embed_tokens.weight"]


def _trained_twice(tensors: dict[str, torch.Tensor]) -> None:
    embedding = tensors["base_model.model.model.embed_tokens.weight"]
    tensors["base_model.model.model.embed_tokens.modules_to_save.weight"] = embedding + 1


DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "another head": (_another_head, "a change of the head alone, which the base ties"),
    "narrow": (_narrow, r"shape \[4103, 255\], the base has \[4103, 256\]"),
    "trained twice": (_trained_twice, "embed_tokens.weight: the same part as base_model.model.mo"),
    "only a head": (
        _only_head,
        "embeddings of 4103 tokens, the base has 4096, and no embed_tokens",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_vocabularies_that_cannot_be_merged(case: str, larger: Path, tmp_path: Path) -> None:
    damage, words = DAMAGED[case]
    tensors = load_file(larger / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    shutil.copy(larger / "adapter_config.json", tmp_path)
    with pytest.raises(InputError, match=words):
        qwen35.plan(ASSET, recipe="bf16", adapter=[tmp_path])


@pytest.mark.parametrize("text", ["[]", "{"])
def test_damaged_files_beside_an_adapter(text: str, larger: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(larger, tmp_path / "adapter"))
    (adapter / "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match=r"tokenizer_config.json"):
        qwen35.merge(ASSET, adapter, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
