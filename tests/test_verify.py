"""The verifier: silent on good artifacts, and every planted fault is found and named."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoints import Tensors, make_checkpoint, random_tensors, write_checkpoint
from loading import quantize_with_transformers
from qwen35.checkpoint.open import describe, fetch
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.comparison import WeightComparison
from qwen35.codecs.fp8.error_sums import ErrorSums
from qwen35.codecs.nf4.config import is_skipped
from qwen35.errors import Finding, UsageError
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.tensors import TensorSpec, Weight
from qwen35.verification.asking_transformers import Question
from qwen35.verification.bands import WORST_ERROR
from qwen35.verification.behaviour import NOT_ASKED, Answer
from qwen35.verification.numbers_check import NumbersResult
from qwen35.verification.opening import open_artifact
from qwen35.verification.role_errors import RoleError, by_role
from qwen35.verification.subject import HeldWeight
from qwen35.verification.verdict import Verdict, verify
from qwen35.verification.verdict_display import verdict_text
from qwen35.writing.write import write
from running import load_all, read_config, run
from watching import Watching, watched_pools

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
UP = f"{LAYER}.1.mlp.up_proj.weight"
STATE = "quant_state.bitsandbytes__nf4"
NORM = "model.language_model.norm.weight"


def check(artifact: Path, source: Path | None = None) -> Verdict:
    opened = open_artifact(str(artifact))
    if source is None:
        return verify(opened)
    return verify(opened, source=fetch(str(source)), depth="numbers", threads=1)


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(dense, tmp_path_factory.mktemp("packed") / "nf4").out


@pytest.fixture
def broken(packed: Path, tmp_path: Path) -> Path:
    """A copy of a good artifact, to be broken."""
    return Path(shutil.copytree(packed, tmp_path / "broken"))


def rewrite(folder: Path, change: Callable[[Tensors], object], *, forget: bool = True) -> None:
    """Change the tensors of an artifact; without its manifest unless told."""
    tensors = load_all(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if forget:
        (folder / "qwen35.json").unlink()


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = read_config(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "qwen35.json").unlink()


@pytest.mark.parametrize("recipe", ["nf4", "text", "text-nf4"])
@pytest.mark.parametrize("source", ["dense", "moe", "moe_per_expert"])
def test_good_artifacts_pass_at_every_depth(
    recipe: str, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(source)
    out = run(folder, tmp_path / "out", recipe).out
    for verdict in (check(out), check(out, folder)):
        assert verdict.findings == ()
        assert verdict.passed
    (out / "qwen35.json").unlink()
    assert check(out).findings == ()


def test_sources_pass_as_they_are(dense: Path, moe_per_expert: Path) -> None:
    for folder in (dense, moe_per_expert):
        assert check(folder).findings == ()
        assert check(folder, folder).findings == ()


def test_what_transformers_quantized_passes_but_for_what_it_lost(
    dense: Path, tmp_path: Path
) -> None:
    quantize_with_transformers(dense, tmp_path / "theirs")
    verdict = check(tmp_path / "theirs", dense)
    assert {finding.check for finding in verdict.findings} <= {"mtp", "values"}
    assert [f.check for f in verdict.findings].count("mtp") == 1
    lost = {f.subject.rpartition(".")[0] for f in verdict.findings if f.check == "values"}
    assert all(name.endswith(("linear_attn.norm", "linear_attn")) for name in lost)


def test_relative_errors_are_those_of_the_decoded_weights(packed: Path, dense: Path) -> None:
    rows = {row.role: row for row in check(packed, dense).errors}
    assert rows["embed_tokens"].relative == 0
    assert rows["linear_attn.in_proj_qkv"].count == 3
    assert 0.08 < rows["linear_attn.in_proj_qkv"].relative < 0.1
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors, total, norm = load_all(packed), 0.0, 0.0
    for i in range(3):
        name = f"{LAYER}.{i}.linear_attn.in_proj_qkv.weight"
        parts = {k: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = torch.float32
        original = load_all(dense)[name].double()
        total += float((dequantize_4bit(tensors[name], state).double() - original).square().sum())
        norm += float(original.square().sum())
    assert rows["linear_attn.in_proj_qkv"].relative == pytest.approx(
        (total / norm) ** 0.5, rel=1e-5
    )


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
def test_planted_fault_in_the_tensors_is_named(fault: str, broken: Path, dense: Path) -> None:
    planted = TENSOR_FAULTS[fault]
    rewrite(broken, planted.change)
    verdict = check(broken, dense if planted.needs_source else None)
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
    "no list": (
        lambda c: c["quantization_config"].pop("llm_int8_skip_modules"),
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
def test_planted_fault_in_the_config_is_named(fault: str, broken: Path) -> None:
    change, name, subject, words = CONFIG_FAULTS[fault]
    edit_config(broken, change)
    verdict = check(broken)
    assert not verdict.passed
    found = [f for f in verdict.findings if (f.check, f.subject) == (name, subject)]
    assert found, verdict.findings
    assert any(words in finding.message for finding in found), found


def test_mtp_promised_and_absent_is_named(broken: Path) -> None:
    rewrite(broken, lambda t: [t.pop(k) for k in list(t) if k.startswith("mtp.")])
    assert [f.check for f in check(broken).findings] == ["mtp"]


def test_packed_promise_without_packing_is_named(dense: Path, packed: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", read_config(packed), load_all(dense))
    messages = [finding.message for finding in check(folder).findings]
    assert "promises NF4, but nothing is packed" in messages


@pytest.mark.parametrize(
    ("name", "check_name"),
    [("model.safetensors", "hash"), ("config.json", "hash")],
)
def test_a_flipped_byte_is_found_by_its_hash(
    name: str, check_name: str, broken: Path, packed: Path
) -> None:
    data = bytearray((broken / name).read_bytes())
    at = data.index(b"hidden") if name == "config.json" else len(data) - 10
    data[at] ^= 1
    (broken / name).write_bytes(data)
    opened = open_artifact(str(broken))
    verdict = verify(opened, depth="numbers", threads=1)
    assert (check_name, name) in [(f.check, f.subject) for f in verdict.findings]


@pytest.mark.parametrize(
    ("metadata", "size"),
    [({}, "missing"), ([], "missing"), (None, "missing"), ({"total_size": 1}, 1)],
)
def test_an_index_without_the_size_is_named(metadata: object, size: object, broken: Path) -> None:
    weight_map = dict.fromkeys(load_all(broken), "model.safetensors")
    index = {"metadata": metadata, "weight_map": weight_map}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    [finding] = [f for f in check(broken).findings if f.check == "index"]
    assert finding.message.startswith(f"total_size is {size}, the tensors have ")


def test_files_missing_added_or_resized_are_named(broken: Path) -> None:
    (broken / "config.json").write_text((broken / "config.json").read_text() + "\n")
    shutil.copy(broken / "model.safetensors", broken / "extra.safetensors")
    (broken / "model.safetensors.index.json").write_text(
        json.dumps(
            {
                "metadata": {"total_size": 1},
                "weight_map": dict.fromkeys(load_all(broken), "model.safetensors"),
            }
        )
    )
    findings = {(f.check, f.subject) for f in check(broken).findings}
    assert findings == {
        ("files", "config.json"),
        ("files", "extra.safetensors"),
        ("index", "model.safetensors.index.json"),
    }


def test_a_listed_file_that_is_gone_is_named(dense: Path, tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "in", read_config(dense), load_all(dense), sidecars={"merges.txt": "a b"}
    )
    out = run(source, tmp_path / "out").out
    (out / "merges.txt").unlink()
    assert [(f.check, f.subject) for f in check(out).findings] == [("files", "merges.txt")]


def test_a_stale_index_and_swapped_shards_are_named(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen35.planning.safetensors_files.safetensors_options.MAX_SHARD_BYTES", 1_500_000
    )
    out = run(dense, tmp_path / "out").out
    first, second = sorted(out.glob("*.safetensors"))[:2]
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    (out / "qwen35.json").unlink()
    findings = check(out).findings
    assert findings
    assert {finding.check for finding in findings} == {"packing"}
    assert all("by model.safetensors.index.json" in f.message for f in findings)


def test_tensors_other_than_planned_are_named(broken: Path) -> None:
    rewrite(broken, lambda t: t.pop("mtp.norm.weight"), forget=False)
    findings = {(f.check, f.subject) for f in check(broken).findings}
    assert ("plan", "mtp.norm.weight") in findings
    rewrite(broken, lambda t: t.update({QKV: t[QKV].reshape(-1)}), forget=False)
    findings = {(f.check, f.subject) for f in check(broken).findings}
    assert ("plan", QKV) in findings


def test_a_broken_manifest_and_template_are_named(broken: Path) -> None:
    (broken / "qwen35.json").write_text("{}")
    (broken / "chat_template.jinja").write_text("{% if %}")
    assert {f.check for f in check(broken).findings} == {"manifest", "template"}


def test_another_models_source_is_seen(packed: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=7)
    checks = {finding.check for finding in check(packed, other).findings}
    assert {"bytes", "codes"} <= checks
    larger = make_checkpoint(tmp_path / "larger", layers=8)
    findings = check(packed, larger).findings
    assert any(f.message == "in the source, but not here" for f in findings)


def test_a_source_of_other_sizes_is_seen(dense: Path, tmp_path: Path) -> None:
    config = read_config(dense)
    config["text_config"]["intermediate_size"] *= 2
    wider = write_checkpoint(tmp_path / "wider", config, random_tensors(config))
    found = {f.subject: f for f in check(dense, wider).findings}
    assert (found[UP].check, found[UP].message) == (
        "source",
        "shape [512, 256], the source has [1024, 256]",
    )


def test_a_source_that_is_not_finite_is_just_another(
    packed: Path, dense: Path, tmp_path: Path
) -> None:
    tensors = load_all(dense)
    tensors[NORM][3] = float("nan")
    other = write_checkpoint(tmp_path / "other", read_config(dense), tensors)
    [finding] = check(packed, other).findings
    assert (finding.check, finding.subject) == ("bytes", NORM)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 0), (["--depth", "numbers"], 0), (["--json"], 0)],
)
def test_exit_code_zero_on_a_good_artifact(
    arguments: list[str], code: int, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(packed), "--quiet", *arguments]) == code
    out = capsys.readouterr().out
    if "--json" in arguments:
        assert json.loads(out)["passed"] is True
    else:
        assert out.endswith("passed: nothing found\n")


def test_exit_code_one_and_two(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(broken, lambda t: t.pop(f"{QKV}.absmax"))
    assert main(["verify", str(broken), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert findings[0]["subject"] == QKV
    (broken / "model.safetensors").write_bytes(b"short")
    assert main(["verify", str(broken)]) == 1
    assert "FAILED: 1 finding\n" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert main(["verify", "Qwen3.5-0.8B"]) == 2


def test_structure_needs_no_torch_and_no_numpy_arrays_of_weights(packed: Path) -> None:
    script = (
        "import sys; from qwen35.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print(sorted({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    for verb in ("verify", "inspect"):
        done = subprocess.run(
            [sys.executable, "-c", script, verb, str(packed), "--quiet"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_skip_rule_is_that_of_transformers() -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    modules = [
        "lm_head",
        "model.visual.blocks.0.attn.qkv",
        "model.language_model.layers.1.mlp.up_proj",
        "model.language_model.layers.11.linear_attn.in_proj_a",
        "mtp.fc",
    ]
    lists = [
        ["lm_head"],
        ["visual"],
        ["model.visual"],
        ["in_proj_a"],
        ["layers.1"],
        ["up_proj", "mtp"],
        ["model.language_model.layers.1"],
        ["model.language_model.layers.*"],
        [],
        ["mlp.up"],
    ]
    for module in modules:
        for skip in lists:
            assert is_skipped(module, skip) == (not should_convert_module(module, skip))


@given(st.text("abl.1_", max_size=8), st.text("abl.1_", max_size=12))
def test_skip_rule_is_that_of_transformers_on_any_name(entry: str, module: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert is_skipped(module, [entry]) == (not should_convert_module(module, [entry]))


def test_inspect_counts_what_is_there(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    tensors = load_all(packed)
    assert summary["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(row["tensors"] for row in summary["prefixes"].values()) == len(tensors)
    visual = [t for name, t in tensors.items() if name.startswith("model.visual.")]
    assert summary["prefixes"]["model.visual"] == {
        "tensors": len(visual),
        "bytes": sum(t.numel() * t.element_size() for t in visual),
    }
    assert "NF4 (31 of" in summary["format"]
    assert main(["inspect", str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 shard(s)"
    assert max(map(len, lines[:8])) <= 80


def test_inspect_counts_parameters_once(dense: Path, packed: Path) -> None:
    from qwen35.checkpoint.checkpoint_summary import summarize

    total = sum(t.numel() for t in load_all(dense).values())
    assert summarize(describe(str(dense)))["parameters"] == total
    assert summarize(describe(str(packed)))["parameters"] == total
    assert summarize(describe("Qwen3.5-27B"))["parameters"] == 27_781_427_952


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        '{"manifest": 1}',
        '{"manifest": 99, "files": {}, "tensors": {}}',
        '{"manifest": 1, "files": {"config.json": 5}, "tensors": {}}',
        '{"manifest": 1, "files": {"config.json": {}}, "tensors": {}}',
        '{"manifest": 1, "files": {}, "tensors": {"a": []}}',
    ],
)
def test_a_malformed_manifest_is_a_finding(broken: Path, manifest: str) -> None:
    (broken / "qwen35.json").write_text(manifest)
    opened = open_artifact(str(broken))
    verdict = verify(opened, depth="numbers", threads=1)
    assert {finding.check for finding in verdict.findings} == {"manifest"}


@pytest.mark.parametrize("skip", ["lm_head", 5, [5], {"a": 1}])
def test_a_malformed_skip_list_is_a_finding(broken: Path, skip: object) -> None:
    edit_config(broken, lambda c: c["quantization_config"].update(llm_int8_skip_modules=skip))
    findings = [(f.check, f.message) for f in check(broken).findings]
    assert findings == [("skip-list", "llm_int8_skip_modules is not a list of names")]


def test_a_skip_list_that_no_pattern_can_be_is_survived(broken: Path) -> None:
    edit_config(
        broken,
        lambda c: c["quantization_config"]["llm_int8_skip_modules"].append("a{99999999999}"),
    )
    assert check(broken).findings == ()


@pytest.mark.parametrize("blob", [b'{"shape": [1e999]}', b'{"nested_offset": 1' + b"0" * 400])
def test_a_hostile_blob_is_a_finding(broken: Path, blob: bytes) -> None:
    text = blob if blob.endswith(b"}") else blob + b"}"
    packed = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rewrite(broken, lambda t: t.update({f"{QKV}.{STATE}": packed}))
    verdict = verify(open_artifact(str(broken)), depth="numbers", threads=1)
    assert [(f.check, f.subject) for f in verdict.findings] == [("decode", QKV)]


def test_any_flipped_bit_of_a_scale_is_found(packed: Path, dense: Path, tmp_path: Path) -> None:
    missed = []
    for bit in range(8):
        folder = Path(shutil.copytree(packed, tmp_path / str(bit)))
        at = 7 * bit

        def flip_bit(tensors: Tensors, at: int = at, bit: int = bit) -> None:
            tensors[f"{QKV}.absmax"][at] ^= 1 << bit

        rewrite(folder, flip_bit)
        found = [(f.check, f.subject) for f in check(folder, dense).findings]
        if ("absmax", QKV) not in found:
            missed.append(bit)
    assert missed == []


def test_another_offset_spoils_all_scales(broken: Path, dense: Path) -> None:
    def shift(tensors: Tensors) -> None:
        name = f"{QKV}.{STATE}"
        state = json.loads(bytes(tensors[name].tolist()))
        state["nested_offset"] *= 1.001
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    blocks = load_all(dense)[QKV].numel() // 64
    rewrite(broken, shift)
    [finding] = check(broken, dense).findings
    assert finding.check == "absmax"
    assert finding.message.startswith(f"{blocks} of {blocks} scales")


def test_the_same_values_in_another_type_are_the_same(dense: Path, tmp_path: Path) -> None:
    tensors = load_all(dense)
    wider = {**tensors, NORM: tensors[NORM].float()}
    made = write_checkpoint(tmp_path / "wider", read_config(dense), wider)
    assert check(made, dense).findings == ()
    wider[NORM][0] += 1
    made = write_checkpoint(tmp_path / "other", read_config(dense), wider)
    [finding] = check(made, dense).findings
    assert (finding.check, finding.subject) == ("values", NORM)


def test_the_stored_offset_is_the_one_of_the_file(
    packed: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets: list[float] = []

    def judged(codes: object, nested: object, offset: float, true: object) -> int:
        offsets.append(offset)
        return 0

    monkeypatch.setattr("qwen35.codecs.nf4.judge.wrong_scales", judged)
    assert check(packed, dense).passed
    blobs = [t for name, t in load_all(packed).items() if name.endswith(STATE)]
    states = [json.loads(bytes(blob.tolist())) for blob in blobs]
    assert sorted(offsets) == sorted(state["nested_offset"] for state in states)


def test_weights_quantized_once_are_compared_scale_by_scale(dense: Path, tmp_path: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    original = load_all(dense)
    weight = original.pop(QKV)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    parts = {f"{QKV}.{key}": value for key, value in state.as_dict(packed=True).items()}
    config = read_config(dense) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    parts[f"{QKV}.absmax"][[3, 77]] *= 2
    made = write_checkpoint(tmp_path / "once", config, {**original, QKV: codes, **parts})
    messages = {f.subject: f.message for f in check(made, dense).findings if f.check == "absmax"}
    assert messages == {QKV: f"2 of {weight.numel() // 64} scales are not those of the source"}


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


PIECE = 64 * 256


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read in several pieces, as those of true size are."""
    monkeypatch.setattr("qwen35.codecs.pieces.PIECE", PIECE)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("recipe", ["nf4", "fp8", "text"])
def test_good_artifacts_pass_piece_by_piece(recipe: str, dense: Path, tmp_path: Path) -> None:
    out = run(dense, tmp_path / "out", recipe).out
    assert check(out, dense).findings == ()
    assert verify(open_artifact(str(out)), depth="numbers", threads=1).findings == ()


@pytest.mark.usefixtures("pieces")
def test_faults_of_every_piece_are_counted(dense: Path, broken: Path) -> None:
    def flip_some(tensors: Tensors) -> None:
        codes = tensors[QKV].view(-1)
        for piece in (0, 1, 3):
            codes[piece * PIECE // 2 + 5] ^= 0x88
        norm = tensors[f"{LAYER}.0.linear_attn.conv1d.weight"].view(-1)
        norm[0] += 1
        embedding = tensors["model.language_model.embed_tokens.weight"].view(-1)
        embedding[[1, PIECE + 1, 4 * PIECE + 1]] += 1

    rewrite(broken, flip_some)
    verdict = check(broken, dense)
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


@pytest.mark.usefixtures("pieces")
def test_errors_of_every_piece_are_summed(packed: Path, dense: Path) -> None:
    small = {row.role: (row.squared, row.norm) for row in check(packed, dense).errors}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen35.codecs.pieces.PIECE", 2**19)
        large = {row.role: (row.squared, row.norm) for row in check(packed, dense).errors}
    assert small.keys() == large.keys()
    for role, pair in small.items():
        assert pair == pytest.approx(large[role], rel=1e-9)
    assert large["linear_attn.in_proj_qkv"][0] > 0


@pytest.mark.usefixtures("pieces")
def test_restored_values_of_every_piece_are_counted(
    packed: Path, dense: Path, tmp_path: Path
) -> None:
    """bf16 made from NF4, beside the NF4: other values in the first, the second, the last piece."""
    out = run(packed, tmp_path / "out", "bf16").out

    def change(tensors: Tensors) -> None:
        tensors[QKV].view(-1)[[0, 7, PIECE, -1]] += 1

    rewrite(out, change)
    found = {f.subject: f.message for f in check(out, packed).findings}
    assert found == {QKV: "4 of 131072 values differ"}


@pytest.mark.parametrize(("first", "second"), [("fp8", "nf4"), ("nf4", "fp8")])
def test_what_was_packed_already_is_compared_with_what_that_decodes_to(
    first: str, second: str, dense: Path, tmp_path: Path
) -> None:
    middle = run(dense, tmp_path / first, first).out
    out = run(middle, tmp_path / second, second).out
    assert check(out, middle).findings == ()


def test_files_that_the_manifest_does_not_list_are_named_and_the_others_hashed(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen35.planning.safetensors_files.safetensors_options.MAX_SHARD_BYTES", 1_500_000
    )
    out = run(dense, tmp_path / "out", "text").out
    first, *_, last = sorted(path.name for path in out.glob("*.safetensors"))
    manifest = json.loads((out / "qwen35.json").read_text())
    del manifest["files"][first]
    manifest["files"][last]["sha256"] = "0" * 64
    (out / "qwen35.json").write_text(json.dumps(manifest))
    verdict = verify(open_artifact(str(out)), depth="numbers", threads=1)
    found = {f.subject: f.message for f in verdict.findings if f.check == "hash"}
    assert found.keys() == {first, last}
    assert found[first] == "not listed in qwen35.json"
    assert found[last].endswith("..., written as 000000000000...")


def test_a_weight_quantized_once_among_others_is_named(broken: Path) -> None:
    def lose(tensors: Tensors) -> None:
        for part in ("nested_absmax", "nested_quant_map"):
            del tensors[f"{UP}.{part}"]
        tensors[f"{UP}.absmax"] = tensors[f"{UP}.absmax"].float()

    rewrite(broken, lose)
    found = {(f.check, f.subject): f.message for f in check(broken).findings}
    assert found == {
        ("quantization-config", UP): "quantized once, but bnb_4bit_use_double_quant is True"
    }


def test_what_transformers_does_not_load_is_found(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of another kind of answer, in a stand-in for transformers."""
    asker = SimpleNamespace(
        missing=["a.weight"],
        vision=False,
        settled=7,
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
        "asked in transformers, on the cpu",
        "7 layers kept off bitsandbytes' AVX512-BF16 path, which fails on them",
    )
    assert asked == [False]


def test_errors_of_a_role_are_summed_and_the_worst_is_kept() -> None:
    rows = by_role(
        [
            ("up", "nf4", WeightComparison(squared=1.0, norm=4.0)),
            ("norm", "plain", WeightComparison(squared=0.0, norm=0.0)),
            ("up", "nf4", WeightComparison(squared=2.0, norm=32.0)),
            ("up", "plain", WeightComparison(squared=0.0, norm=9.0)),
            ("down", "nf4", WeightComparison(squared=1.0, norm=0.0)),
        ]
    )
    assert [(r.role, r.storage, r.count, r.squared, r.norm, r.worst) for r in rows] == [
        ("up", "nf4", 2, 3.0, 36.0, 0.5),
        ("norm", "plain", 1, 0.0, 0.0, 0.0),
        ("up", "plain", 1, 0.0, 9.0, 0.0),
        ("down", "nf4", 1, 1.0, 0.0, math.inf),
    ]
    assert [row.relative for row in rows] == [(3 / 36) ** 0.5, 0.0, 0.0, math.inf]


def test_what_saturates_too_much_is_too_far() -> None:
    """An error that rounding could explain, or that a code astray explains, is no more to say."""
    sound = ErrorSums(count=4, squared=4 * WORST_ERROR**2, norm=4.0, clipped=2)
    beyond = replace(sound, squared=4 * 0.07**2, clipped=3)
    fp8 = {"a": sound, "b": beyond, "c": replace(beyond, misplaced=1)}
    compared = [
        (
            HeldWeight(Weight(name, "fp8", ()), TensorSpec(name, "BF16", (2, 2)), name, "fp8"),
            WeightComparison(name, errors=asdict(errors)),
        )
        for name, errors in fp8.items()
    ]
    assert list(NumbersResult((), compared, ()).too_far()) == [
        Finding("error", "b", "relative error 0.0700, expected at most 0.0625 (3 weights saturate)")
    ]


class Spoken:
    """What stands in for a model in an engine: it answers everything with one word."""

    missing: tuple[str, ...] = ()
    vision = False
    settled = 0
    model = SimpleNamespace(device=SimpleNamespace(type="cpu"))

    def __init__(self, folder: Path, **more: object) -> None:
        self.folder, self.more = folder, more

    def ask(self, question: Question, *, repetition_penalty: float = 1.0) -> str:
        return "no"


def test_a_model_is_asked_when_nothing_was_found(
    packed: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qwen35.verification.asking_engines.Asker", Spoken)
    verdict = verify(
        open_artifact(str(packed)), source=fetch(str(dense)), depth="behaviour", threads=1
    )
    assert (verdict.name, verdict.kind, verdict.depth) == (str(packed), "nf4", "behaviour")
    assert verdict.counts == {"weights": 103, "packed": 31, "files": 1}
    assert {row.storage for row in verdict.errors} == {"plain", "nf4"}
    assert len(verdict.answers) == len(verdict.findings) == 10
    assert {finding.check for finding in verdict.findings} == {"behaviour"}
    assert verdict.notes == ("asked in transformers, on the cpu",)
    broken = Path(shutil.copytree(packed, tmp_path / "broken"))
    (broken / "config.json").write_text((broken / "config.json").read_text() + " ")
    found = verify(open_artifact(str(broken)), depth="behaviour", threads=1)
    assert found.answers == ()
    assert [finding.check for finding in found.findings] != ["behaviour"]
    assert found.notes == (NOT_ASKED,)


def test_vllm_is_asked_when_asked_for(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Spoken] = []

    def asker(folder: Path, **more: object) -> Spoken:
        made.append(Spoken(folder, **more))
        return made[-1]

    monkeypatch.setattr("qwen35.verification.asking_engines.check_vllm", lambda: None)
    monkeypatch.setattr("qwen35.verification.asking_engines.VllmAsker", asker)
    opened = open_artifact(str(dense))
    verdict = verify(opened, depth="behaviour", engine="vllm", threads=1)
    assert verdict.notes == ("asked in vLLM",)
    assert (made[0].folder, made[0].more) == (dense, {"vision": True})
    assert any(answer.question.image for answer in verdict.answers)

    def refuse() -> None:
        raise UsageError("--engine vllm", "not here")

    monkeypatch.setattr("qwen35.verification.asking_engines.check_vllm", refuse)
    assert verify(opened).passed
    with pytest.raises(UsageError, match="not here"):
        verify(opened, engine="vllm")


def test_all_of_a_check_is_told(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, progress and the memo reach the numbers; what is told comes back."""
    asked = watched_pools(monkeypatch, "qwen35.verification.numbers_check")
    progress = Watching()
    opened = fetch(str(packed))
    subject = open_artifact(str(packed), "numbers")
    verdict = verify(subject, depth="numbers", threads=3, progress=progress)
    assert (verdict.passed, verdict.errors) == (True, ())
    assert asked == [3]
    assert sorted(progress.steps) == sorted((w.nbytes, w.name) for w in opened.weights)
    assert progress.title == f"checking {packed}"
    assert progress.done == progress.total


def test_a_verdict_is_plain_in_json() -> None:
    question = Question("2 + 2?", "4")
    verdict = Verdict(
        "some/model",
        "nf4",
        "behaviour",
        {"weights": 9},
        (RoleError("mlp.up_proj", "nf4", 4, 0.04, 4.0, 0.25),),
        (Finding("files", "b", "missing"),),
        (Answer(question, "4"),),
        ("a note",),
    )
    assert verdict.to_json() == {
        "artifact": "some/model",
        "kind": "nf4",
        "depth": "behaviour",
        "passed": False,
        "counts": {"weights": 9},
        "relative_error": [
            {
                "role": "mlp.up_proj",
                "storage": "nf4",
                "weights": 4,
                "relative": pytest.approx(0.1),
                "worst": 0.25,
            }
        ],
        "answers": [Answer(question, "4").to_json()],
        "findings": [{"check": "files", "subject": "b", "message": "missing"}],
        "notes": ["a note"],
    }


def test_weights_that_one_side_alone_has_are_named(
    packed: Path, dense: Path, tmp_path: Path
) -> None:
    """But for the tower and the MTP layer, which may be left out as a whole."""
    one, two = (make_checkpoint(tmp_path / str(n), layers=n) for n in (1, 2))
    layer = f"{LAYER}.1."
    for artifact, source, message in (
        (one, two, "in the source, but not here"),
        (two, one, "the source has no such weight"),
    ):
        found = [f for f in check(artifact, source).findings if f.check == "source"]
        assert {f.message for f in found} == {message}
        assert all(f.subject.startswith(layer) for f in found)
        assert len(found) == sum(name.startswith(layer) for name in load_all(two))
    text = run(dense, tmp_path / "text", "text").out
    assert check(text, dense).findings == ()
    without = make_checkpoint(tmp_path / "without", mtp=0)
    assert not any(f.check == "source" for f in check(without, dense).findings)


def test_the_skip_list_of_a_text_model_names_modules_as_transformers_does(
    dense: Path, tmp_path: Path
) -> None:
    """It has no ``language_model``, whatever prefix the tensors have; and it has no MTP layer."""
    plan = make_plan(open_folder(dense), load_recipe("text-nf4"), keep_prefix=True)
    out = write(plan, tmp_path / "out", threads=1).out
    (out / "qwen35.json").unlink()
    assert check(out).findings == ()
    config = read_config(out)
    skip = config["quantization_config"]["llm_int8_skip_modules"]
    skip[:] = [entry for entry in skip if "mtp" not in entry]
    (out / "config.json").write_text(json.dumps(config))
    assert check(out).findings == ()
    skip.append("model.layers.0.mlp.up_proj")
    (out / "config.json").write_text(json.dumps(config))
    assert [(f.check, f.subject) for f in check(out).findings] == [
        ("skip-list", "model.layers.0.mlp.up_proj")
    ]


def test_every_tensor_of_a_file_is_in_its_plan(broken: Path) -> None:
    manifest = json.loads((broken / "qwen35.json").read_text())
    table = manifest["tensors"]["model.safetensors"]
    table["model.more.weight"] = "BF16 [1]"
    del table[UP]
    (broken / "qwen35.json").write_text(json.dumps(manifest))
    assert [(f.check, f.subject, f.message) for f in check(broken).findings] == [
        (
            "plan",
            "model.more.weight",
            "planned for model.safetensors as BF16 [1], but not there",
        ),
        ("plan", UP, "not in the plan"),
    ]


def test_packed_data_of_another_form_is_named(broken: Path) -> None:
    def flatten(tensors: Tensors) -> None:
        tensors[QKV] = tensors[QKV].reshape(-1)

    rewrite(broken, flatten)
    assert [(f.check, f.subject, f.message) for f in check(broken).findings] == [
        ("companions", QKV, "U8 [65536], expected U8 [65536, 1]")
    ]


ASKED = Question("What is 2 + 2? " * 5, "4", thinking=True)


def test_a_verdict_is_shown_whole() -> None:
    verdict = Verdict(
        "some/model",
        "nf4",
        "behaviour",
        {"weights": 9, "packed": 5, "files": 2},
        (
            RoleError("norm", "plain", 3, 0.0, 1.0, 0.0),
            RoleError("lm_head", "plain", 2, 0.0, 1.0, 0.0),
            RoleError("mlp.up_proj", "nf4", 4, 0.04, 4.0, 0.25),
        ),
        (Finding("codes", "a.weight", "3 wrong"), Finding("files", "b", "missing")),
        (
            Answer(replace(ASKED, thinking=False), "4", "x.gguf"),
            Answer(ASKED, "so\n</think>\n\n4", "x.gguf"),
            Answer(ASKED, "no", "y.gguf"),
        ),
        ("a note",),
    )
    question = "What is 2 + 2? What is 2 + 2? What is 2 + 2? What is 2 + 2? "
    assert (
        verdict_text(verdict)
        == f"""\
some/model: nf4, 9 weights (5 packed) in 2 files, checked: behaviour
5 weights are exactly those of the source

  role                                 stored  count   rel. error        worst
  mlp.up_proj                             nf4      4     0.100000     0.250000

  asked                                                        thinking  answer
x.gguf
  {question}      off  right
  {question}       on  right
y.gguf
  {question}       on  WRONG

error: a.weight: 3 wrong [codes]
error: b: missing [files]
note: a note

FAILED: 2 findings"""
    )
    one = replace(verdict, findings=verdict.findings[:1], answers=(), errors=())
    assert verdict_text(one).splitlines()[1:] == [
        "",
        "error: a.weight: 3 wrong [codes]",
        "note: a note",
        "",
        "FAILED: 1 finding",
    ]
    alone = replace(one, findings=(), notes=(), answers=(Answer(ASKED, "no"),) * 2)
    assert verdict_text(alone).splitlines()[3:] == [
        f"  {question}       on  WRONG",
        f"  {question}       on  WRONG",
        "",
        "passed: nothing found",
    ]
    none = replace(one, findings=(), notes=(), errors=verdict.errors[:1])
    assert verdict_text(none).splitlines()[1:] == [
        "3 weights are exactly those of the source",
        "",
        "passed: nothing found",
    ]


def test_two_packings_in_one_checkpoint_are_named(dense: Path, tmp_path: Path) -> None:
    tensors = load_all(dense)
    name = f"{LAYER}.0.mlp.up_proj.weight"
    tensors[f"{name}_scale_inv"] = torch.ones(4, 2, dtype=torch.bfloat16)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    folder = write_checkpoint(tmp_path / "in", read_config(dense), tensors)
    messages = [f.message for f in check(folder).findings]
    assert messages == ["quant_method is None, but 1 weights are packed fp8"]


def test_restored_fp8_weights_of_any_width_are_compared(tmp_path: Path) -> None:
    """A weight of more than one piece, whose rows do not divide a piece."""
    from checkpoints import random_tensors, tiny_config
    from qwen35.checkpoint.source import open_folder
    from qwen35.planning.output_plan import make_plan
    from qwen35.planning.recipe import load_recipe
    from qwen35.writing.write import write

    config = tiny_config(layers=1, mtp=0)
    config["text_config"]["intermediate_size"] = 17408 + 128
    tensors = random_tensors(config)
    name = f"{LAYER}.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.full((2, 137), 0.5, dtype=torch.bfloat16)
    config["quantization_config"] = {"quant_method": "fp8"}
    source = write_checkpoint(tmp_path / "in", config, tensors)
    recipe = load_recipe("nf4").keeping(("mlp.down_proj",))
    write(make_plan(open_folder(source), recipe), tmp_path / "out")
    assert check(tmp_path / "out", source).findings == ()


def test_a_source_at_depth_structure_is_refused(
    packed: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(packed), "--source", str(dense), "--depth", "structure"]
    assert main(arguments) == 2
    assert "is not read at depth structure" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text('{"model_type": "qwen3_5"}'),
    ],
)
def test_what_cannot_be_opened_is_a_finding_and_not_a_usage_error(
    broken: Path, damage: Callable[[Path], object]
) -> None:
    damage(broken)
    assert main(["verify", str(broken)]) == 1
    verdict = verify(open_artifact(str(broken), "behaviour"), depth="behaviour")
    assert (verdict.kind, verdict.counts) == (
        "unreadable",
        {"weights": 0, "packed": 0, "files": 0},
    )
    assert [finding.check for finding in verdict.findings] == ["readable"]
    assert verdict.notes == (NOT_ASKED,)
