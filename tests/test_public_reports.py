"""Situations of checkpoints that people reported, each made small from the embedded checkpoint.

Those with a link were reported there; the others are kin to them. transformers is the oracle for
what a checkpoint means, beside the comparisons with the converter in `test_gguf_converter`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen35
from checkpoints import ASSET
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.source import open_folder
from qwen35.errors import Qwen35Error

EMBEDDING = "model.language_model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    """The tensors of the embedded checkpoint."""
    tensors: Tensors = load_file(ASSET / "model.safetensors-00001-of-00001.safetensors")
    return tensors


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, weights: Tensors) -> Make:
    """Write a changed copy of the embedded checkpoint into one file."""

    def write(
        change: Callable[[Tensors], Tensors] = dict,
        config: Callable[[dict[str, Any]], Any] = lambda _: None,
        **documents: dict[str, Any],
    ) -> Path:
        folder = tmp_path / "Model"
        ignored = shutil.ignore_patterns("*.safetensors*", "README.md", "*.txt~")
        shutil.copytree(ASSET, folder, ignore=ignored)
        save_file(change(dict(weights)), folder / "model.safetensors")
        parsed = json.loads((folder / "config.json").read_text())
        config(parsed)
        (folder / "config.json").write_text(json.dumps(parsed))
        for name, changes in documents.items():
            path = folder / f"{name}.json"
            found = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(found | changes))
        return folder

    return write


def convert(model: Path, recipe: str = "text", **options: Any) -> Path:
    """Convert and verify; return the output."""
    out = model.parent / recipe
    qwen35.convert(model, out, recipe=recipe, threads=1, **options)
    assert qwen35.verify(out, source=model, threads=1).findings == ()
    return out


def gguf(model: Path) -> dict[str, Any]:
    """Convert to GGUF and verify; return the keys."""
    out = model.parent / "gguf"
    qwen35.gguf(model, out, types=["F16"], threads=1)
    assert qwen35.verify(out, source=model, threads=1).findings == ()
    return dict(read_container(out / "Model-F16.gguf").keys)


def refusal(model: Path) -> str:
    """Return the sentence by which every verb refuses a checkpoint."""
    out = model.parent / "out"
    said = []
    calls: tuple[Callable[[], object], ...] = (
        lambda: qwen35.convert(model, out, recipe="nf4", dry_run=True),
        lambda: qwen35.gguf(model, out, types=["F16"], dry_run=True),
    )
    for call in calls:
        with pytest.raises(Qwen35Error) as caught:
            call()
        said.append(str(caught.value))
    # the tower is no part of both
    tower, text = (re.sub(r"\d+ (?=others)", "", one) for one in said)
    assert tower == text
    return said[0]


def notes(model: Path) -> list[str]:
    """Return the notes of a plan."""
    return list(qwen35.convert(model, model.parent / "x", recipe="nf4", dry_run=True).plan.notes)


def read(folder: Path, name: str) -> Any:
    """Return a parsed JSON file."""
    return json.loads((folder / name).read_text())


# --- tensors


def test_saved_rotary_buffers_are_left_behind(make: Make, weights: Tensors) -> None:
    """NVIDIA-NeMo/Automodel#3856, #2549: buffers that loaders compute."""
    names = ["model.language_model.rotary_emb.inv_freq", "model.visual.rotary_pos_emb.inv_freq"]
    model = make(lambda tensors: tensors | {name: torch.ones(8) for name in names})
    assert open_folder(model).buffers == tuple(sorted(names))
    note = f"not copied: {names[0]} and others alike, which loaders compute"
    assert note in notes(model)
    written = load_file(convert(model, "bf16") / "model.safetensors")
    assert written.keys() == weights.keys()
    gguf(model)


def test_float32_checkpoint_keeps_its_values(make: Make, weights: Tensors) -> None:
    """A trainer may save the float32 copy that its optimizer holds."""
    model = make(
        lambda tensors: {name: value.float() * 1.0001 for name, value in tensors.items()},
        lambda config: config["text_config"].update(dtype="float32"),
    )
    written = load_file(convert(model) / "model.safetensors")
    norm = written["model.norm.weight"]
    assert norm.dtype == torch.float32
    assert torch.equal(norm, weights["model.language_model.norm.weight"].float() * 1.0001)
    gguf(model)


def test_float32_among_bfloat16_keeps_its_dtype(make: Make) -> None:
    """Official releases keep A_log and the norms of states in float32 too."""
    ends = ("A_log", "linear_attn.norm.weight", "dt_bias")
    model = make(lambda t: {n: v.float() if n.endswith(ends) else v for n, v in t.items()})
    written = load_file(convert(model) / "model.safetensors")
    kinds = {value.dtype for name, value in written.items() if name.endswith(ends)}
    assert kinds == {torch.float32}
    assert written["model.norm.weight"].dtype == torch.bfloat16
    gguf(model)


def test_head_that_differs_from_its_tied_embedding_is_used(make: Make, weights: Tensors) -> None:
    """huggingface/transformers#45127, unslothai/unsloth#9331: merged while config.json ties."""
    from transformers import AutoModelForCausalLM

    head = weights[EMBEDDING] * 2
    model = make(lambda tensors: tensors | {"lm_head.weight": head})
    assert any("lm_head.weight is stored although" in note for note in notes(model))
    summary = qwen35.inspect(model)
    assert isinstance(summary, dict)
    assert any("lm_head.weight is stored although" in note for note in summary["notes"])
    out = convert(model)
    for folder in (model, out):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert torch.equal(theirs.lm_head.weight, head)
    qwen35.gguf(model, model.parent / "gguf", types=["F16"], threads=1)
    assert "output.weight" in read_container(model.parent / "gguf" / "Model-F16.gguf").tensors


def test_head_that_is_missing_names_the_key(make: Make) -> None:
    """QwenLM/Qwen3-VL-Embedding#89: not tied by config.json, and no head."""

    def untie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False

    sentence = refusal(make(config=untie))
    assert sentence.startswith("lm_head.weight: missing")
    assert "set tie_word_embeddings to true in config.json; otherwise" in sentence


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("score.weight", "the head of a classifier"),  # modelscope/ms-swift#8477
        ("v_head.summary.weight", "the value head of a trainer"),
    ],
)
def test_head_of_another_task_is_named(name: str, said: str, make: Make) -> None:
    sentence = refusal(make(lambda tensors: tensors | {name: torch.zeros(3, 256)}))
    assert sentence == (
        f"{name}: {said}, for which there is no place here, expected a language model; leave "
        "these tensors out to convert the model below the head"
    )


@pytest.mark.parametrize("every", [True, False])
def test_weights_that_were_not_gathered_are_named(every: bool, make: Make) -> None:
    """DeepSpeed ZeRO-3 saves empty placeholders if nobody gathers the weights."""
    model = make(
        lambda tensors: {
            name: torch.zeros(0, dtype=value.dtype) if every or name == EMBEDDING else value
            for name, value in tensors.items()
        }
    )
    sentence = refusal(model)
    assert sentence.startswith(f"{EMBEDDING}: no values in it" + ", like 1" * every)
    assert "stage3_gather_16bit_weights_on_model_save" in sentence


@pytest.mark.parametrize("where", ["nowhere", "root"])
def test_resized_vocabulary_names_the_key(where: str, make: Make) -> None:
    """unslothai/unsloth#3428 and kin: rows for new tokens, but config.json is as before."""
    model = make(
        lambda t: t | {EMBEDDING: torch.cat([t[EMBEDDING], t[EMBEDDING][:64]])},
        lambda config: config.update(vocab_size=4160) if where == "root" else None,
    )
    assert refusal(model) == (
        f"{EMBEDDING}: shape [4160, 256], expected [4096, 256] by config.json; if it has a row "
        "for each token, set vocab_size to 4160 beside hidden_size"
    )
    config = read(model, "config.json")
    config["text_config"]["vocab_size"] = 4160
    (model / "config.json").write_text(json.dumps(config))
    assert len(gguf(model)["tokenizer.ggml.tokens"]) == 4160


def test_vocabulary_of_an_odd_size_is_converted(make: Make) -> None:
    """arcee-ai/mergekit#425: the padding of the embedding cut off."""
    model = make(
        lambda tensors: tensors | {EMBEDDING: tensors[EMBEDDING][:4031].contiguous()},
        lambda config: config["text_config"].update(vocab_size=4031),
    )
    assert load_file(convert(model, "nf4") / "model.safetensors")[EMBEDDING].shape == (4031, 256)
    qwen35.convert(model, model.parent / "x", recipe="fp8", dry_run=True)
    assert len(gguf(model)["tokenizer.ggml.tokens"]) == 4031


# --- config.json


@pytest.mark.parametrize("kind", ["bitsandbytes", "fp8", "gptq", None])
def test_settings_of_a_quantization_that_was_undone_are_dropped(
    kind: str | None, make: Make
) -> None:
    """The weights were dequantized, but config.json still says how they were packed."""
    settings = kind and {"quant_method": kind, "load_in_4bit": True, "bits": 4}
    model = make(config=lambda config: config.update(quantization_config=settings))
    written = {}
    for recipe in ("text", "nf4"):
        plan = qwen35.convert(model, model.parent / "x", recipe=recipe, dry_run=True).plan
        written[recipe] = json.loads(plan.documents["config.json"])
    assert "quantization_config" not in written["text"]
    assert written["nf4"]["quantization_config"]["quant_method"] == "bitsandbytes"
    assert "bits" not in written["nf4"]["quantization_config"]


@pytest.mark.parametrize("value", ["auto", "torch.bfloat16", "bf16"])
def test_dtype_that_transformers_refuses_is_refused(value: str, make: Make) -> None:
    from transformers import AutoConfig

    def change(config: dict[str, Any]) -> None:
        del config["text_config"]["dtype"]
        config["torch_dtype"] = value

    model = make(config=change)
    with pytest.raises(AttributeError):
        AutoConfig.from_pretrained(model)
    assert refusal(model).startswith(f"config.json: torch_dtype is {value!r}, expected bfloat16")


def test_dtype_goes_before_torch_dtype(make: Make) -> None:
    """transformers 5 writes `dtype`, earlier versions `torch_dtype`; edited configs have both."""
    from transformers import AutoConfig

    model = make(config=lambda config: config.update(dtype="bfloat16", torch_dtype="float16"))
    assert AutoConfig.from_pretrained(model).dtype == torch.bfloat16
    assert open_folder(model).config.dtype == "BF16"


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_section_that_is_null_is_named(key: str, make: Make) -> None:
    model = make(config=lambda config: config.update({key: None}))
    assert refusal(model) == f"config.json: {key} is missing"


def test_kind_of_rope_of_older_models_is_refused_as_in_transformers(make: Make) -> None:
    """Configs of Qwen2-VL say `mrope`; Qwen3.5 has no such kind."""
    from transformers import Qwen3_5Config
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

    rope = {"type": "mrope", "mrope_section": [3, 3, 2]}
    model = make(config=lambda config: config["text_config"].update(rope_scaling=rope))
    theirs = Qwen3_5Config(**read(model, "config.json"))
    with pytest.raises(KeyError, match="mrope"):
        Qwen3_5TextRotaryEmbedding(theirs.text_config)
    with pytest.raises(Qwen35Error, match="rope_type is 'mrope', expected default"):
        qwen35.gguf(model, model.parent / "out", types=["F16"], dry_run=True)
    assert any("transformers refuses config.json" in note for note in notes(model))


def test_keys_of_experts_in_a_dense_model_mean_nothing(make: Make) -> None:
    """Configs merged from a mixture's: num_experts 0 beside a dense model."""
    experts = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": None}
    model = make(config=lambda config: config["text_config"].update(experts))
    assert "qwen35.expert_used_count" not in gguf(model)


# --- sidecars


@pytest.mark.parametrize(
    "settings",
    [
        {
            # huggingface/transformers#45376, ml-explore/mlx-lm#661: a list, as version 5 writes
            # hiyouga/LlamaFactory#10310, ModelCloud/GPTQModel#2403: the class of version 5
            "tokenizer_config": {
                "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
                "tokenizer_class": "TokenizersBackend",
                "is_local": True,
            },
            # hiyouga/LlamaFactory#2837, huggingface/transformers#29988: settings never applied
            "generation_config": {"do_sample": False, "temperature": 0.6, "top_p": 0.95},
            "added_tokens": {"<|im_end|>": 4002},
        },
        {
            "tokenizer_config": {
                "extra_special_tokens": {"image_token": "<|image_pad|>"},
                "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
            },
            "special_tokens_map": {"eos_token": {"content": "<|im_end|>"}, "pad_token": None},
            "generation_config": {"do_sample": True, "temperature": 0.0, "pad_token_id": [4000]},
        },
    ],
)
def test_unusual_settings_travel_as_they_are(
    settings: dict[str, dict[str, Any]], make: Make
) -> None:
    model = make(**settings)
    out = convert(model)
    for name, values in settings.items():
        assert values.items() <= read(out, f"{name}.json").items()
    keys = gguf(model)
    assert keys["tokenizer.ggml.eos_token_id"] == 4002


@pytest.mark.parametrize("pairs", [True, False])
def test_merges_are_read_in_both_forms(pairs: bool, make: Make) -> None:
    """The tokenizers library has written a merge as text and, later, as a pair."""
    model = make()
    tokenizer = read(model, "tokenizer.json")
    merges = [m.split(" ") if isinstance(m, str) else m for m in tokenizer["model"]["merges"]]
    tokenizer["model"]["merges"] = merges if pairs else [" ".join(pair) for pair in merges]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert gguf(model)["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_templates_in_a_list_all_travel(make: Make) -> None:
    """Earlier versions of transformers kept named templates in tokenizer_config.json."""
    model = make()
    default = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": default}, {"name": "tool_use", "template": "{{ 1 }}"}]
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(read(model, "tokenizer_config.json") | {"chat_template": named}))
    assert read(convert(model, "nf4"), "tokenizer_config.json")["chat_template"] == named
    keys = gguf(model)
    assert keys["tokenizer.chat_template"] == default
    assert keys["tokenizer.chat_template.tool_use"] == "{{ 1 }}"


def test_processor_config_alone_holds_the_preprocessors(make: Make) -> None:
    """transformers 5 saves all of a processor there (kin: modelscope/ms-swift#8215)."""
    model = make()
    parts = {
        "image_processor": "preprocessor_config",
        "video_processor": "video_preprocessor_config",
    }
    whole = {key: read(model, f"{name}.json") for key, name in parts.items()}
    for name in parts.values():
        (model / f"{name}.json").unlink()
    (model / "processor_config.json").write_text(json.dumps(whole))
    assert read(convert(model, "nf4"), "processor_config.json") == whole
    assert not (convert(model) / "processor_config.json").exists()


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"])
def test_license_and_notice_travel_in_any_form(name: str, make: Make) -> None:
    """The Apache License asks for it (section 4), whatever the files are called."""
    model = make()
    (model / name).write_bytes(b"\xff any form")
    assert qwen35.convert(model, model.parent / "x", dry_run=True).plan.copied[name] == 10


def test_index_without_metadata_is_read(make: Make, weights: Tensors) -> None:
    """Tools that write only the map; `total_size` is for people."""
    model = make()
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(model)
