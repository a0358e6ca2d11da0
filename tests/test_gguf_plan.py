"""Plans of GGUF files: types, rules, refusals, sizes; no tensor is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import layout_of, random_tensors, write_checkpoint
from gguf_models import make_variant, sidecars, tokenizer, variant_config
from imatrices import gguf_file, ones
from qwen35.api.gguf_api import gguf
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.open import describe
from qwen35.codecs.ggml.types import ENCODABLE, GGML_TYPES, fallback, ggml_type
from qwen35.errors import ConfigError, TensorError, UsageError
from qwen35.planning.gguf_files.gguf_plan import chooser_of, files_of
from qwen35.planning.gguf_files.imatrix import read_imatrix
from qwen35.planning.gguf_files.mixes import FILE_TYPES, quantizable
from qwen35.planning.gguf_files.type_patterns import pattern_rules
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import built_in, load_recipe
from qwen35.verification.gguf_sense import sense_findings


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("plan"), "dense")


def plan_of(
    source: Path | str, *types: str, recipe: str = "mix", rules: tuple[str, ...] = (), **asked: Any
) -> Plan:
    rows = load_recipe(recipe, "gguf").preceded(pattern_rules(rules, []))
    return make_plan(describe(str(source)), rows, types=types, **asked)


def of_block(plan: Plan, leaf: str) -> dict[int, str]:
    kinds = files_of(plan)[0].kinds
    return {int(n.split(".")[1]): k for n, k in kinds.items() if n.endswith(f".{leaf}.weight")}


def changed(tmp_path: Path, files: dict[str, str] | None = None, *, mtp: bool = True) -> Path:
    """Write the dense variant with other sidecars; an empty text leaves a file out."""
    config = variant_config("dense")
    kept = {key: value for key, value in (sidecars() | (files or {})).items() if value}
    tensors = random_tensors(config, layout_of(config, mtp=mtp))
    return write_checkpoint(tmp_path / "changed", config, tensors, sidecars=kept)


# The layers below were read off files that llama-quantize wrote.


def test_which_layers_of_the_9b_get_more_bits() -> None:
    plan = plan_of("Qwen3.5-9B", "Q4_K_M")
    values = of_block(plan, "attn_v")
    assert {i for i, kind in values.items() if kind == "q6_K"} == {3, 15, 27, 31, 32}
    assert files_of(plan)[0].kinds["output.weight"] == "q6_K"
    assert files_of(plan)[0].kinds["token_embd.weight"] == "q4_K"


def test_rules_shift_the_mix_as_upstream_only_when_asked() -> None:
    seed = (r".*\.attn_gate\.weight$=q8_0", r".*\.attn_qkv\.weight$=q8_0")
    ours = of_block(plan_of("Qwen3.5-0.8B", "Q4_K_M", rules=seed), "attn_v")
    theirs = of_block(
        plan_of("Qwen3.5-0.8B", "Q4_K_M", rules=seed, upstream_counters=True), "attn_v"
    )
    assert {i for i, kind in ours.items() if kind == "q6_K"} == {11, 23, 24}
    assert {i for i, kind in theirs.items() if kind == "q6_K"} == {3, 7, 11, 23}


def test_few_key_value_heads_raise_iq4() -> None:
    kinds = of_block(plan_of("Qwen3.5-0.8B", "IQ4_XS"), "attn_v")
    assert set(kinds.values()) == {"q5_K"}


def test_types_are_those_of_the_library() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name in sorted(set(ENCODABLE) - {"q2_0"}):  # which the library does not know yet
        kind = GGMLQuantizationType[name.upper()]
        assert (GGML_TYPES[name].code, GGML_TYPES[name].block) == (
            int(kind),
            GGML_QUANT_SIZES[kind][0],
        )


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("q4_K", 736, "q5_0"),
        ("q5_K", 736, "q5_1"),
        ("q6_K", 736, "q8_0"),
        ("q3_K", 736, "q4_0"),
        ("q2_0", 736, "q4_0"),
        ("nvfp4", 736, "f16"),
        ("iq4_xs", 736, "iq4_nl"),
        ("q4_K", 744, "f16"),
        ("q8_0", 744, "f16"),
        ("q4_K", 768, "q4_K"),
    ],
)
def test_fallbacks_for_rows_that_do_not_fit(kind: str, row: int, expected: str) -> None:
    assert fallback(GGML_TYPES[kind], row).name == expected


@pytest.mark.parametrize("recipe", built_in("gguf"))
def test_built_in_recipes_fit_every_published_size(recipe: str) -> None:
    for name in ("Qwen3.5-0.8B", "Qwen3.5-4B", "Qwen3.5-27B", "Qwen3.5-35B-A3B"):
        plan = plan_of(name, "Q4_K_M", recipe=recipe)
        assert plan.comparison[recipe]["Q4_K_M"] == plan.files[0].nbytes


def test_projector_of_rows_that_do_not_fit_gets_f16_as_from_the_converter() -> None:
    plan = plan_of("Qwen3.5-27B", projector="Q8_0")
    (file,) = files_of(plan)
    assert file.name == "mmproj-Qwen3.5-27B-Q8_0.gguf"
    assert file.kinds["v.blk.3.ffn_down.weight"] == "f16"
    assert file.kinds["v.blk.3.ffn_up.weight"] == "q8_0"
    assert file.kinds["v.patch_embd.weight"] == "f32"
    assert [note for note in plan.notes if "4304" in note] == [
        "mmproj-Qwen3.5-27B-Q8_0.gguf: rows of 4304 do not fit q8_0, so 27 tensors get f16"
    ]
    assert not plan.comparison


def test_projector_of_an_unknown_type_is_refused(dense: Path) -> None:
    with pytest.raises(UsageError, match="--mmproj: 'Q4_K' is unknown, expected F32, F16, BF16, Q"):
        gguf(dense, "out", mmproj="Q4_K", dry_run=True)


def test_recipes_grow_in_this_order() -> None:
    sizes = [row["Q4_K_M"] for row in plan_of("Qwen3.5-0.8B", "Q4_K_M").comparison.values()]
    assert sizes == sorted(sizes)
    assert len(sizes) == len(built_in("gguf"))


def test_a_recipe_of_ones_own(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'format = "gguf"\nbase = "q8-gates"\n'
        '[[rules]]\nmatch = "linear_attn.in_proj_qkv"\naction = "mix"\n'
        '[[rules]]\nmatch = "mtp"\naction = "bf16"\n'
    )
    plan = plan_of(dense, "Q4_K_M", recipe=str(path))
    kinds = files_of(plan)[0].kinds
    assert kinds["blk.0.attn_gate.weight"] == "q8_0"
    assert kinds["blk.0.attn_qkv.weight"] in ("q4_K", "q6_K")
    assert kinds["blk.4.nextn.eh_proj.weight"] == "bf16"
    assert kinds["blk.4.nextn.enorm.weight"] == "f32"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('format = "nf4"', "format 'nf4'"),
        ("format = ", "not valid TOML"),
        ('format = "gguf"\nextra = 1', "unknown key"),
        ('format = "gguf"\nbase = "nf4"', "base 'nf4'"),
        ('format = "gguf"\n[[rules]]\nmatch = "x"', "malformed"),
        ('format = "gguf"\n[[rules]]\nmatch = "x"\naction = "q8_0"', "not a role"),
        ('format = "gguf"\n[[rules]]\nmatch = "mlp"\naction = "q9_0"', "type 'q9_0' is unknown"),
        ('format = "gguf"\n[[rules]]\nmatch = "visual"\naction = "q8_0"', "is left for it"),
    ],
)
def test_bad_recipes_are_refused(toml: str, message: str, dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    with pytest.raises(UsageError, match=message):
        plan_of(dense, "Q4_K_M", recipe=str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("attn_q", "malformed"),
        ("=q8_0", "malformed"),
        ("attn_q=", "malformed"),
        ("attn_q=q8", "type 'q8' is unknown"),
        ("attn_q=q8_K", "is unknown"),
        ("blk(=q8_0", "not a pattern"),
        ("(?<!a)b=q8_0", "not a pattern that llama-quantize"),
        ("[[:digit:]]=q8_0", "not a pattern that llama-quantize"),
        ("attn_w=q8_0", "is left for it"),
        ("attn_norm=q8_0", "is left for it"),
        ("v.blk=q8_0", "is left for it"),
        ("ffn_up=iq2_xxs", "without an importance matrix"),
    ],
)
def test_bad_tensor_types_are_refused(line: str, message: str, dense: Path) -> None:
    with pytest.raises(UsageError, match=message):
        plan_of(dense, "Q4_K_M", rules=(line,))


def test_a_rule_behind_one_that_takes_all_is_refused(dense: Path) -> None:
    with pytest.raises(UsageError, match="is left for it"):
        plan_of(dense, "Q4_K_M", rules=("attn=q8_0", r"attn_q\.=q6_K"))


def test_patterns_are_put_into_lower_case_as_llama_quantize_does(dense: Path) -> None:
    plan = plan_of(dense, "Q4_K_M", rules=(r"BLK\.0\.FFN_UP=Q8_0",))
    assert of_block(plan, "ffn_up")[0] == "q8_0"


def test_a_type_that_does_not_fit_is_refused_or_noted(tmp_path: Path) -> None:
    source = make_variant(tmp_path, "odd-rows")
    rule = (r"ffn_down\.weight=q4_K",)
    with pytest.raises(UsageError, match=r"rows of 520 do not fit q4_K.*f16"):
        plan_of(source, "Q4_K_M", rules=rule)
    plan = plan_of(source, "Q4_K_M", rules=rule, upstream_counters=True)
    assert any("rows of 520" in note for note in plan.notes)


def test_files_that_are_not_quantized_ignore_rules_and_say_so(dense: Path) -> None:
    plan = plan_of(dense, "F16", rules=("ffn_up=q8_0",))
    assert any("F16 is not quantized" in note for note in plan.notes)


# What is refused before any work.


def test_mtp_promised_and_absent(tmp_path: Path) -> None:
    source = changed(tmp_path, mtp=False)
    for drop in (False, True):
        plan = plan_of(source, "F16", drop_mtp=drop)
        assert not any("nextn" in name for name in files_of(plan)[0].kinds)
        assert any(note.startswith("config.json promises 1 mul") for note in plan.notes) != drop


def test_two_mtp_layers_which_llama_cpp_does_not_load(tmp_path: Path) -> None:
    config = variant_config("dense")
    config["text_config"]["mtp_num_hidden_layers"] = 2
    source = write_checkpoint(tmp_path / "m", config, random_tensors(config), sidecars=sidecars())
    plan = plan_of(source, "F16")
    assert not any("nextn" in name for name in files_of(plan)[0].kinds)
    assert any(note.startswith("2 multi-token-prediction layers are left") for note in plan.notes)


def test_mtp_present_and_not_promised(tmp_path: Path) -> None:
    source = changed(tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["text_config"].pop("mtp_num_hidden_layers")
    (source / "config.json").write_text(json.dumps(config))
    assert "blk.4.nextn.eh_proj.weight" in files_of(plan_of(source, "F16"))[0].kinds


WORD_LEVEL = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": ""}, r"tokenizer\.json: missing"),
        ({"tokenizer_config.json": ""}, r"tokenizer_config\.json: missing"),
        ({"tokenizer.json": "[]"}, "not a JSON object"),
        ({"tokenizer.json": WORD_LEVEL}, "not a BPE tokenizer"),
        ({"tokenizer.json": "split"}, "split pattern"),
        ({"tokenizer.json": "large"}, "token id 99999"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    other = tokenizer()
    if files.get("tokenizer.json") == "split":
        other["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
        files = {"tokenizer.json": json.dumps(other)}
    elif files.get("tokenizer.json") == "large":
        other["model"]["vocab"]["zzz"] = 99999
        files = {"tokenizer.json": json.dumps(other)}
    with pytest.raises(ConfigError, match=message):
        plan_of(changed(tmp_path, files), "F16")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", "---\na: [\n---\n", "README.md: front matter"),
        ("generation_config.json", '{"temperature": "hot"}', "a number"),
        ("chat_template.json", "{", "chat_template.json: not valid JSON"),
    ],
)
def test_malformed_side_cars_are_named(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    files = {"chat_template.jinja": "", name: content}
    with pytest.raises(ConfigError, match=message):
        plan_of(changed(tmp_path, files), "F16")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", "large"),
        ("mrope_section", [1, "2"]),
        ("partial_rotary_factor", None),
        ("mrope_section", [1] * 5),
    ],
)
def test_malformed_rope_is_named(key: str, value: object, tmp_path: Path) -> None:
    source = changed(tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["rope_parameters"][key] = value
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=key):
        plan_of(source, "F16")


def test_the_projector_needs_a_vision_tower_and_its_preprocessor(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no vision tower"):
        plan_of(make_variant(tmp_path, "text"), "F16", projector="F16")
    with pytest.raises(ConfigError, match="image_mean"):
        plan_of(changed(tmp_path, {"preprocessor_config.json": ""}), "F16", projector="F16")


def test_heads_that_llama_cpp_cannot_compute(tmp_path: Path) -> None:
    config = variant_config("dense")
    config["text_config"]["linear_value_head_dim"] = 32
    source = write_checkpoint(tmp_path / "m", config, random_tensors(config), sidecars=sidecars())
    with pytest.raises(TensorError, match="key heads of 64 and value heads of 32"):
        plan_of(source, "F16")


def test_planning_imports_neither_torch_nor_llama_cpp_nor_numba(dense: Path) -> None:
    program = (
        "import sys\n"
        "from qwen35.cli.main import main\n"
        f"main(['gguf', {str(dense)!r}, '/nowhere/x', '--dry-run', '--quiet', '--mmproj'])\n"
        "print(sorted({'torch', 'llama_cpp', 'numba', 'transformers'} & set(sys.modules)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.rstrip().endswith("[]")


def test_the_digest_is_of_the_bytes_not_of_the_place(dense: Path, tmp_path: Path) -> None:
    again = make_variant(tmp_path, "dense")
    assert plan_of(dense, "Q8_0").digest == plan_of(again, "Q8_0").digest
    assert plan_of(dense, "Q8_0").digest != plan_of(dense, "Q8_0", recipe="q8-gates-plus").digest


def test_every_file_type_has_a_mix() -> None:
    chooser = chooser_of(plan_of("Qwen3.5-0.8B", "F16"), imatrix=True)
    for file_type in FILE_TYPES.values():
        assert ggml_type(file_type.base, "test").name in ENCODABLE
        used = set(chooser.kinds(file_type, checked=False)[0].values())
        assert {file_type.base, "q8_0"} & used, file_type.name  # MXFP4 is for experts alone


@pytest.mark.parametrize("name", ["dense", "moe", "odd-rows"])
def test_verify_believes_the_file_type_of_every_file(name: str, tmp_path: Path) -> None:
    source = make_variant(tmp_path, name)
    tensors = files_of(plan_of(source, "F16"))[0].tensors
    matrix = gguf_file(
        tmp_path / "i.gguf", {t.name: ones(len(t.rows.slabs), t.row) for t in tensors}
    )
    for file in files_of(plan_of(source, *FILE_TYPES, imatrix=read_imatrix(matrix))):
        path = tmp_path / file.name
        with path.open("wb") as hole:
            hole.write(file.head)
            hole.truncate(file.nbytes)
        free = [tensor.name for tensor in tensors if quantizable(tensor.name, tensor.shape)]
        assert list(sense_findings(read_container(path), free)) == [], file.name


def test_types_of_few_bits_need_an_importance_matrix(dense: Path, tmp_path: Path) -> None:
    for name in ("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XXS", "IQ1_M", "IQ1_S"):
        with pytest.raises(UsageError, match=f"--types: {name} without an importance matrix"):
            plan_of(dense, name)
    for name in ("Q2_K", "IQ3_S", "IQ3_M", "TQ1_0", "Q1_0"):
        assert plan_of(dense, name).files
    entries = {
        tensor.name: ones(1, tensor.row)
        for tensor in files_of(plan_of(dense, "F16"))[0].tensors
        if "nextn" not in tensor.name and tensor.name != "token_embd.weight"
    }
    matrix = read_imatrix(gguf_file(tmp_path / "i.gguf", entries))
    for name in ("Q2_K_S", "IQ2_M"):  # llama-imatrix collects nothing for MTP layers
        with pytest.raises(UsageError, match=r"blk\.4\.nextn.*--tensor-type, or --drop-mtp"):
            plan_of(dense, name, imatrix=matrix)
        assert plan_of(dense, name, imatrix=matrix, drop_mtp=True).files
