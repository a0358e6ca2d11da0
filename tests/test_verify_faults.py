"""Every fault planted in tensors or config.json is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoints import Tensors, write_checkpoint
from qwen35.verification.behaviour import Answer
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from running import load_all, read_config, run
from verifying import PIECE, check, edit_config, rewrite

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.1.mlp.up_proj.weight"
STATE = "quant_state.bitsandbytes__nf4"
NORM = "model.language_model.norm.weight"


def flip(tensors: Tensors, name: str, at: int = 100) -> None:
    tensors[name].view(-1).view(torch.uint8)[at] ^= 0x20


def swap(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def transpose_blocks(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].reshape(256, -1).T.contiguous().reshape(-1, 1)


def cut(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


@dataclass(frozen=True)
class Fault:
    """A change of the tensors and the finding that must name it."""

    change: Callable[[Tensors], object]
    check: str
    subject: str
    words: str = ""
    needs_source: bool = False


TENSOR_FAULTS: dict[str, Fault] = {
    "weight dropped": Fault(
        lambda t: t.pop(f"{LAYER}.0.mlp.up_proj.weight") is None,
        "packing",
        f"{LAYER}.0.mlp.up_proj.weight.absmax",
        "weight it belongs to",
    ),
    "kept weight dropped": Fault(
        lambda t: t.pop(NORM),
        "tensors",
        NORM,
        "missing",
    ),
    "vision weight dropped": Fault(
        lambda t: t.pop("model.visual.merger.norm.bias"),
        "tensors",
        "model.visual.merger.norm.bias",
        "missing",
    ),
    "state dropped": Fault(lambda t: t.pop(f"{QKV}.{STATE}"), "packing", QKV, "missing"),
    "absmax dropped": Fault(lambda t: t.pop(f"{QKV}.absmax"), "packing", QKV, "absmax is missing"),
    "quant_map dropped": Fault(lambda t: t.pop(f"{UP}.quant_map"), "packing", UP, "quant_map"),
    "nested map dropped": Fault(lambda t: t.pop(f"{UP}.nested_quant_map"), "packing", UP, "nested"),
    "all companions dropped": Fault(
        lambda t: [t.pop(k) for k in list(t) if k.startswith(f"{UP}.")], "packing", UP, "U8 data"
    ),
    "stranger": Fault(
        lambda t: t.update({f"{LAYER}.0.extra.weight": torch.zeros(1)}),
        "tensors",
        f"{LAYER}.0.extra.weight",
        "not a tensor of Qwen3.5",
    ),
    "layer too many": Fault(
        lambda t: t.update({f"{LAYER}.4.input_layernorm.weight": torch.zeros(256).bfloat16()}),
        "tensors",
        f"{LAYER}.4.input_layernorm.weight",
        "no place for",
    ),
    "packed codes cut": Fault(lambda t: cut(t, QKV), "tensors", QKV, "packed bytes"),
    "packed codes of another shape": Fault(
        lambda t: t.update({QKV: t[QKV].reshape(-1)}), "companions", QKV, "expected U8"
    ),
    "absmax cut": Fault(lambda t: cut(t, f"{QKV}.absmax"), "companions", f"{QKV}.absmax"),
    "nested absmax cut": Fault(
        lambda t: cut(t, f"{QKV}.nested_absmax"), "companions", f"{QKV}.nested_absmax"
    ),
    "absmax of another dtype": Fault(
        lambda t: t.update({f"{QKV}.absmax": t[f"{QKV}.absmax"].float()}),
        "companions",
        f"{QKV}.absmax",
        "F32",
    ),
    "kept weight of another shape": Fault(
        lambda t: t.update({f"{LAYER}.0.linear_attn.conv1d.weight": torch.zeros(4).bfloat16()}),
        "tensors",
        f"{LAYER}.0.linear_attn.conv1d.weight",
        "shape [4]",
    ),
    "kept weight as integers": Fault(
        lambda t: t.update({NORM: torch.zeros(256).int()}),
        "tensors",
        NORM,
        "dtype I32",
    ),
    "vision packed nowhere listed": Fault(
        lambda t: t.update({"mtp.fc.weight.absmax": torch.zeros(4)}), "packing", "mtp.fc.weight"
    ),
    "absmax zeroed": Fault(lambda t: t[f"{QKV}.absmax"].zero_(), "absmax", QKV, "scales", True),
    "nested absmax zeroed": Fault(
        lambda t: t[f"{QKV}.nested_absmax"].zero_(), "absmax", QKV, "scales", True
    ),
    "nested absmax of another weight": Fault(
        lambda t: swap(
            t, f"{QKV}.nested_absmax", f"{LAYER}.1.linear_attn.in_proj_qkv.weight.nested_absmax"
        ),
        "absmax",
        QKV,
        "",
        True,
    ),
    "one code flipped": Fault(lambda t: flip(t, QKV), "codes", QKV, "1 of", True),
    "codes transposed": Fault(lambda t: transpose_blocks(t, QKV), "codes", QKV, "", True),
    "codes of another layer": Fault(
        lambda t: swap(t, QKV, f"{LAYER}.1.linear_attn.in_proj_qkv.weight"), "codes", QKV, "", True
    ),
    "nibbles swapped": Fault(
        lambda t: t.update({QKV: (t[QKV] << 4) | (t[QKV] >> 4)}), "codes", QKV, "", True
    ),
    "level changed": Fault(
        lambda t: t[f"{QKV}.quant_map"].mul_(1.01), "constants", QKV, "quant_map", True
    ),
    "dynamic map changed": Fault(
        lambda t: t[f"{QKV}.nested_quant_map"].mul_(0.5), "constants", QKV, "nested_quant_map", True
    ),
    "blob is not JSON": Fault(
        lambda t: t[f"{QKV}.{STATE}"].fill_(120), "decode", QKV, "quant_state", True
    ),
    "embedding flipped": Fault(
        lambda t: flip(t, "model.language_model.embed_tokens.weight"),
        "bytes",
        "model.language_model.embed_tokens.weight",
        "1 bytes differ",
        True,
    ),
    "norms swapped": Fault(
        lambda t: swap(t, f"{LAYER}.0.input_layernorm.weight", f"{LAYER}.1.input_layernorm.weight"),
        "bytes",
        f"{LAYER}.0.input_layernorm.weight",
        "",
        True,
    ),
    "a NaN": Fault(
        lambda t: t[NORM][0].fill_(float("nan")),
        "decode",
        NORM,
        "NaN",
        True,
    ),
    "MTP weight flipped": Fault(
        lambda t: flip(t, "mtp.fc.weight"), "bytes", "mtp.fc.weight", "", True
    ),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_planted_fault_in_the_tensors_is_named(fault: str, broken_nf4: Path, dense: Path) -> None:
    planted = TENSOR_FAULTS[fault]
    rewrite(broken_nf4, planted.change)
    verdict = check(broken_nf4, dense if planted.needs_source else None)
    assert not verdict.passed
    found = [
        f for f in verdict.findings if (f.check, f.subject) == (planted.check, planted.subject)
    ]
    assert found, verdict.findings
    assert any(planted.words in finding.message for finding in found), found


CONFIG_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str, str, str]] = {
    "no quantization_config": (
        lambda c: c.pop("quantization_config"),
        "quantization-config",
        "config.json",
        "packed",
    ),
    "head not listed": (
        lambda c: c["quantization_config"]["llm_int8_skip_modules"].remove("lm_head"),
        "skip-list",
        "lm_head",
        "pack the head",
    ),
    "vision not listed": (
        lambda c: c["quantization_config"]["llm_int8_skip_modules"].remove("model.visual"),
        "skip-list",
        "model.visual.blocks.0.attn.qkv",
        "missing from",
    ),
    "old short names": (
        lambda c: c["quantization_config"].update(llm_int8_skip_modules=["visual"]),
        "skip-list",
        "model.visual.blocks.0.attn.qkv",
        "missing from",
    ),
    "empty list": (
        lambda c: c["quantization_config"].update(llm_int8_skip_modules=[]),
        "skip-list",
        "lm_head",
        "lm_head",
    ),
    "packed layer listed": (
        lambda c: c["quantization_config"]["llm_int8_skip_modules"].append("up_proj"),
        "skip-list",
        f"{LAYER}.0.mlp.up_proj",
        "packed, but",
    ),
    "double quantization denied": (
        lambda c: c["quantization_config"].update(bnb_4bit_use_double_quant=False),
        "quantization-config",
        QKV,
        "doubly quantized",
    ),
    "another type": (
        lambda c: c["quantization_config"].update(bnb_4bit_quant_type="fp4"),
        "quantization-config",
        "config.json",
        "bnb_4bit_quant_type",
    ),
    "eight bits": (
        lambda c: c["quantization_config"].update(load_in_4bit=False),
        "quantization-config",
        "config.json",
        "load_in_4bit is False, expected True",
    ),
    "another layer count": (
        lambda c: c["text_config"].update(
            num_hidden_layers=3, layer_types=["linear_attention"] * 3
        ),
        "tensors",
        f"{LAYER}.3.input_layernorm.weight",
        "no place",
    ),
    "another width": (
        lambda c: c["text_config"].update(hidden_size=128),
        "tensors",
        "model.language_model.embed_tokens.weight",
        "by config.json",
    ),
    "MTP denied": (
        lambda c: c["text_config"].update(mtp_num_hidden_layers=0),
        "tensors",
        "mtp.layers.0.input_layernorm.weight",
        "no place",
    ),
    "head untied": (
        lambda c: c.update(tie_word_embeddings=False),
        "tensors",
        "lm_head.weight",
        "missing",
    ),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_planted_fault_in_the_config_is_named(fault: str, broken_nf4: Path) -> None:
    change, name, subject, words = CONFIG_FAULTS[fault]
    edit_config(broken_nf4, change)
    verdict = check(broken_nf4)
    assert not verdict.passed
    found = [f for f in verdict.findings if (f.check, f.subject) == (name, subject)]
    assert found, verdict.findings
    assert any(words in finding.message for finding in found), found


def test_mtp_promised_and_absent_is_named(broken_nf4: Path) -> None:
    """In our output it is a fault; transformers leaves such a promise whenever it saves."""
    manifest = json.loads((broken_nf4 / "qwen35.json").read_text())
    rewrite(broken_nf4, lambda t: [t.pop(k) for k in list(t) if k.startswith("mtp.")])
    verdict = check(broken_nf4)
    assert verdict.findings == ()
    assert any("mtp_num_hidden_layers is 1, but there is no" in note for note in verdict.notes)
    manifest["tensors"] = {file: {} for file in manifest["tensors"]}
    (broken_nf4 / "qwen35.json").write_text(json.dumps(manifest))
    assert "mtp" in {finding.check for finding in check(broken_nf4).findings}


def test_packed_promise_without_packing_is_named(
    dense: Path, nf4_artifact: Path, tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "in", read_config(nf4_artifact), load_all(dense))
    messages = [finding.message for finding in check(folder).findings]
    assert "promises NF4, but nothing is packed" in messages


def test_tensors_other_than_planned_are_named(broken_nf4: Path) -> None:
    rewrite(broken_nf4, lambda t: t.pop("mtp.norm.weight"), forget=False)
    findings = {(f.check, f.subject) for f in check(broken_nf4).findings}
    assert ("plan", "mtp.norm.weight") in findings
    rewrite(broken_nf4, lambda t: t.update({QKV: t[QKV].reshape(-1)}), forget=False)
    findings = {(f.check, f.subject) for f in check(broken_nf4).findings}
    assert ("plan", QKV) in findings


@pytest.mark.parametrize("skip", ["lm_head", 5, [5], {"a": 1}])
def test_a_malformed_skip_list_is_a_finding(broken_nf4: Path, skip: object) -> None:
    edit_config(broken_nf4, lambda c: c["quantization_config"].update(llm_int8_skip_modules=skip))
    findings = [(f.check, f.message) for f in check(broken_nf4).findings]
    assert findings == [("skip-list", "llm_int8_skip_modules is not a list of names")]


def test_a_skip_list_that_no_pattern_can_be_is_survived(broken_nf4: Path) -> None:
    edit_config(
        broken_nf4,
        lambda c: c["quantization_config"]["llm_int8_skip_modules"].append("a{99999999999}"),
    )
    assert check(broken_nf4).findings == ()


@pytest.mark.parametrize("blob", [b'{"shape": [1e999]}', b'{"nested_offset": 1' + b"0" * 400])
def test_a_hostile_blob_is_a_finding(broken_nf4: Path, blob: bytes) -> None:
    text = blob if blob.endswith(b"}") else blob + b"}"
    packed = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rewrite(broken_nf4, lambda t: t.update({f"{QKV}.{STATE}": packed}))
    verdict = verify(open_artifact(str(broken_nf4)), depth="numbers", threads=1)
    assert [(f.check, f.subject) for f in verdict.findings] == [("decode", QKV)]


def test_any_flipped_bit_of_a_scale_is_found(
    nf4_artifact: Path, dense: Path, tmp_path: Path
) -> None:
    missed = []
    for bit in range(8):
        folder = Path(shutil.copytree(nf4_artifact, tmp_path / str(bit)))
        at = 7 * bit

        def flip_bit(tensors: Tensors, at: int = at, bit: int = bit) -> None:
            tensors[f"{QKV}.absmax"][at] ^= 1 << bit

        rewrite(folder, flip_bit)
        found = [(f.check, f.subject) for f in check(folder, dense).findings]
        if ("absmax", QKV) not in found:
            missed.append(bit)
    assert missed == []


def test_another_offset_spoils_all_scales(broken_nf4: Path, dense: Path) -> None:
    def shift(tensors: Tensors) -> None:
        name = f"{QKV}.{STATE}"
        state = json.loads(bytes(tensors[name].tolist()))
        state["nested_offset"] *= 1.001
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    blocks = load_all(dense)[QKV].numel() // 64
    rewrite(broken_nf4, shift)
    [finding] = check(broken_nf4, dense).findings
    assert finding.check == "absmax"
    assert finding.message.startswith(f"{blocks} of {blocks} scales")


def test_the_stored_offset_is_the_one_of_the_file(
    nf4_artifact: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets: list[float] = []

    def judged(
        codes: object, nested: object, offset: float, true: object, *, searched: bool
    ) -> int:
        offsets.append(offset)
        return 0

    monkeypatch.setattr("qwen35.codecs.nf4.judge.wrong_scales", judged)
    assert check(nf4_artifact, dense).passed
    blobs = [t for name, t in load_all(nf4_artifact).items() if name.endswith(STATE)]
    states = [json.loads(bytes(blob.tolist())) for blob in blobs]
    assert sorted(offsets) == sorted(state["nested_offset"] for state in states)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_number_that_is_none_is_found_without_a_source(
    packed: bool, value: float, dense: Path, tmp_path: Path
) -> None:
    out = run(dense, tmp_path / "out", "fp8" if packed else "text").out
    scale = f"{LAYER}.0.mlp.up_proj.weight_scale_inv"
    name = scale if packed else f"{LAYER}.0.mlp.up_proj.weight".replace("language_model.", "")

    def break_it(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    rewrite(out, break_it)
    verdict = verify(open_artifact(str(out)), depth="numbers", threads=1)
    assert [(f.check, f.subject) for f in verdict.findings] == [("decode", name)]


@pytest.mark.usefixtures("small_pieces")
def test_faults_of_every_piece_are_counted(dense: Path, broken_nf4: Path) -> None:
    def flip_some(tensors: Tensors) -> None:
        codes = tensors[QKV].view(-1)
        for piece in (0, 1, 3):
            codes[piece * PIECE // 2 + 5] ^= 0x88
        norm = tensors[f"{LAYER}.0.linear_attn.conv1d.weight"].view(-1)
        norm[0] += 1
        embedding = tensors["model.language_model.embed_tokens.weight"].view(-1)
        embedding[[1, PIECE + 1, 4 * PIECE + 1]] += 1

    rewrite(broken_nf4, flip_some)
    verdict = check(broken_nf4, dense)
    messages = {f.subject: f.message for f in verdict.findings}
    assert messages[QKV] == "6 of 131072 codes are not the nearest level"
    assert messages["model.language_model.embed_tokens.weight"].endswith(
        "bytes differ from the source"
    )
    rows = {row.role: (row.squared, row.norm) for row in verdict.errors}
    squared, norm = rows["embed_tokens"]
    assert squared == pytest.approx(3, rel=0.1)
    original = load_all(dense)["model.language_model.embed_tokens.weight"].double()
    assert norm == pytest.approx(float(original.square().sum()))


def test_what_transformers_does_not_load_is_found(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of another kind of answer, in a stand-in for transformers."""
    asker = SimpleNamespace(
        missing=["a.weight"],
        vision=False,
        decoded=True,
        settled=7,
        notes=(),
        model=SimpleNamespace(device=SimpleNamespace(type="cpu")),
    )
    asked: list[bool] = []

    def ask(_: object, *, image: bool) -> list[Answer]:
        asked.append(image)
        return []

    monkeypatch.setattr("qwen35.verification.asking_engines.Asker", lambda _: asker)
    monkeypatch.setattr("qwen35.verification.asking_engines.ask", ask)
    verdict = verify(open_artifact(str(dense)), depth="behaviour", threads=1)
    assert [(f.check, f.subject, f.message) for f in verdict.findings] == [
        ("load", "a.weight", "missing or unexpected when transformers loads it")
    ]
    assert verdict.notes == (
        "decoded by qwen35, then asked in transformers, on the cpu",
        "7 layers kept off bitsandbytes' AVX512-BF16 path, which fails on them",
    )
    assert asked == [False]


def test_every_tensor_of_a_file_is_in_its_plan(broken_nf4: Path) -> None:
    manifest = json.loads((broken_nf4 / "qwen35.json").read_text())
    table = manifest["tensors"]["model.safetensors"]
    table["model.more.weight"] = "BF16 [1]"
    del table[UP]
    (broken_nf4 / "qwen35.json").write_text(json.dumps(manifest))
    assert [(f.check, f.subject, f.message) for f in check(broken_nf4).findings] == [
        (
            "plan",
            "model.more.weight",
            "planned for model.safetensors as BF16 [1], but missing",
        ),
        ("plan", UP, "not in the plan"),
    ]


def test_packed_data_of_another_form_is_named(broken_nf4: Path) -> None:
    def flatten(tensors: Tensors) -> None:
        tensors[QKV] = tensors[QKV].reshape(-1)

    rewrite(broken_nf4, flatten)
    assert [(f.check, f.subject, f.message) for f in check(broken_nf4).findings] == [
        ("companions", QKV, "U8 [65536], expected U8 [65536, 1]")
    ]


def test_two_packings_in_one_checkpoint_are_named(dense: Path, tmp_path: Path) -> None:
    tensors = load_all(dense)
    name = f"{LAYER}.0.mlp.up_proj.weight"
    tensors[f"{name}_scale_inv"] = torch.ones(4, 2, dtype=torch.bfloat16)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    folder = write_checkpoint(tmp_path / "in", read_config(dense), tensors)
    messages = [f.message for f in check(folder).findings]
    assert messages == ["quant_method is None, but 1 weights are packed fp8"]
