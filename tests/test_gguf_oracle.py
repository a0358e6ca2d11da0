"""Every quantized file, byte for byte as llama.cpp writes it from our own F32 or F16 file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from gguf_models import VARIANTS, make_variant
from llama import chosen_types, quantize
from qwen35.checkpoint.open import describe
from qwen35.checkpoint.source import open_folder
from qwen35.planning.gguf_files.gguf_options import GgufOptions
from qwen35.planning.gguf_files.gguf_plan import chooser_of, files_of
from qwen35.planning.gguf_files.imatrix import Imatrix, read_imatrix
from qwen35.planning.gguf_files.mixes import FILE_TYPES, quantizable
from qwen35.planning.gguf_files.type_patterns import exported, pattern_rules
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.rules import Rule
from qwen35.writing.write import write

QUANTIZED = tuple(name for name, row in FILE_TYPES.items() if row.quantized)
NEED_IMATRIX = (
    *("IQ3_XS", "IQ3_XXS", "Q2_K_S"),
    *("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
COMMON = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S"),
    *("Q3_K_M", "IQ4_XS", "IQ4_NL"),
)
RARE = ("Q5_0", "Q4_1", "MXFP4_MOE", "Q3_K_L", "Q2_K", "TQ2_0", "Q2_0")
LOW = ("Q4_0", "Q2_K_S", "IQ2_XXS")
SEED = r".*\.attn_gate\.weight$=q8_0 .*\.attn_qkv\.weight$=q8_0 .*\.ssm_out\.weight$=q8_0"
"""The lines of the override file that started the q8-gates recipe."""

Make = Callable[[str], Path]


def written(name: str) -> list[str]:
    """Return the file types that llama-quantize writes of a variant.

    Q1_0 has no fallback there for rows that it does not fit; ours are F16, with a note.
    """
    return [one for one in QUANTIZED if (name, one) != ("odd-rows", "Q1_0")]


@pytest.fixture(scope="session")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that makes a checkpoint once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_variant(tmp_path_factory.mktemp("gguf"), name)
        return made[name]

    return make


def plan_of(
    source: Path,
    types: tuple[str, ...],
    recipe: str = "mix",
    *,
    rules: Sequence[Rule] = (),
    **asked: Any,
) -> Plan:
    rows = load_recipe(recipe, "gguf").preceded(rules)
    return make_plan(open_folder(source), rows, types=types, **asked)


def same(ours: Path, theirs: Path) -> bool:
    return ours.read_bytes() == theirs.read_bytes()


def check(
    plan: Plan,
    tmp_path: Path,
    *,
    base: str = "F32",
    overrides: tuple[tuple[str, str], ...] = (),
) -> None:
    """Write the plan's files; compare each quantized one with llama_model_quantize's."""
    out = write(plan, tmp_path / "out", threads=2).out
    assert isinstance(plan.options, GgufOptions)
    sizes = dict(plan.file_sizes())
    source = next(file for file in files_of(plan) if file.file_type.name == base)
    for file in files_of(plan):
        path = out / file.name
        assert path.stat().st_size == sizes[file.name]
        if file.file_type.quantized:
            theirs = quantize(
                out / source.name,
                tmp_path / "theirs.gguf",
                file.file_type.name,
                overrides=overrides,
                imatrix=plan.options.imatrix,
            )
            assert same(path, theirs), file.name


def write_imatrix(path: Path, plan: Plan, *, seed: int = 3, skip: str = "blk.4.") -> Imatrix:
    """Write a random importance matrix as llama-imatrix does, for all tensors but `skip`."""
    generator = np.random.default_rng(seed)
    writer = GGUFWriter(path, "", use_temp_file=False)
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some/text.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor in files_of(plan)[0].tensors:
        name = tensor.name
        if not quantizable(name, tensor.shape) or name.startswith((skip, "token_embd", "output")):
            continue
        slices = len(tensor.rows.slabs)
        counts = np.full(slices, 3584, np.float32)
        if slices > 1:
            counts[1] = 0  # an expert that no token reached
        sums = generator.exponential(size=(slices, tensor.row)).astype(np.float32) * 3584
        writer.add_tensor(f"{name}.in_sum2", sums * (counts[:, None] > 0))
        writer.add_tensor(f"{name}.counts", counts[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_imatrix(path, name="some/imatrix.gguf")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_type_equals_llama_quantize(name: str, variant: Make, tmp_path: Path) -> None:
    """Each of two variants in the common types, the others in a third of them each."""
    number = VARIANTS.index(name) % 3
    types = COMMON if name in ("dense", "moe") else COMMON[number::3]
    check(plan_of(variant(name), ("F32", *types)), tmp_path)


def test_rare_types(variant: Make, tmp_path: Path) -> None:
    check(plan_of(variant("moe"), ("F32", *RARE)), tmp_path)


def test_types_of_few_bits(variant: Make, tmp_path: Path) -> None:
    source, path = variant("moe"), tmp_path / "imatrix.gguf"
    imatrix = write_imatrix(path, plan_of(source, ("F32",)), skip="none")
    check(plan_of(source, ("F32", *LOW), imatrix=imatrix), tmp_path)


@pytest.mark.parametrize("with_imatrix", [False, True])
@pytest.mark.parametrize("name", ["Qwen3.5-0.8B", "Qwen3.5-9B", "Qwen3.5-35B-A3B", *VARIANTS])
def test_the_types_of_all_tensors_in_every_file_type(
    name: str, with_imatrix: bool, variant: Make, tmp_path: Path
) -> None:
    """Headers alone: llama-quantize chooses from a file whose weights are a hole."""
    source = describe(str(variant(name)) if name in VARIANTS else name)
    plan = make_plan(source, load_recipe("mix", "gguf"), types=("F32",))
    (file,), chooser = files_of(plan), chooser_of(plan, imatrix=with_imatrix)
    path = tmp_path / "hole.gguf"
    with path.open("wb") as hole:
        hole.write(file.head)
        hole.truncate(file.nbytes)
    for type_name in written(name):
        kinds, _ = chooser.kinds(FILE_TYPES[type_name], checked=False)
        assert chosen_types(path, type_name, imatrix=with_imatrix) == kinds, type_name


@pytest.mark.heavy
@pytest.mark.parametrize("with_imatrix", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_type_of_every_variant_equals_llama_quantize(
    name: str, with_imatrix: bool, variant: Make, tmp_path: Path
) -> None:
    source, types, imatrix = variant(name), written(name), None
    if with_imatrix:
        path = tmp_path / "imatrix.gguf"
        imatrix = write_imatrix(path, plan_of(source, ("F32",)), skip="none")
    else:
        types = [type_name for type_name in types if type_name not in NEED_IMATRIX]
    check(plan_of(source, ("F32", *types), imatrix=imatrix), tmp_path)


@pytest.mark.parametrize("name", ["dense", "grouped", "moe", "moe-8", "odd-rows"])
def test_with_an_imatrix(name: str, variant: Make, tmp_path: Path) -> None:
    source = variant(name)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", plan_of(source, ("F32",)))
    types = ("F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M", "IQ4_XS", "IQ4_NL")
    check(plan_of(source, types, imatrix=imatrix), tmp_path)


@pytest.mark.parametrize("name", ["dense", "deep", "moe"])
@pytest.mark.parametrize("with_imatrix", [False, True])
def test_upstream_counters_with_the_override_file(
    name: str, with_imatrix: bool, variant: Make, tmp_path: Path
) -> None:
    source = variant(name)
    lines = SEED.split()
    path = tmp_path / "tensor_types.txt"
    path.write_text(SEED.replace(" ", "\n") + "\n")
    imatrix = None
    if with_imatrix:
        imatrix = write_imatrix(tmp_path / "imatrix.gguf", plan_of(source, ("F32",)))
    plan = plan_of(
        source,
        ("F32", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"),
        rules=pattern_rules([], [path]),
        imatrix=imatrix,
        upstream_counters=True,
    )
    pairs = tuple((line.partition("=")[0], line.partition("=")[2]) for line in lines)
    check(plan, tmp_path, overrides=pairs)


@pytest.mark.parametrize("recipe", ["q8-gates", "q8-gates-plus"])
def test_an_exported_recipe_gives_llama_quantize_the_same_file(
    recipe: str, variant: Make, tmp_path: Path
) -> None:
    plan = plan_of(variant("deep"), ("F32", "Q4_K_M"), recipe)
    file = files_of(plan)[1]
    wanted = {t.name: file.kinds[t.name] for t in file.tensors if quantizable(t.name, t.shape)}
    path = tmp_path / "types.txt"
    path.write_text("\n".join(exported(wanted)))
    rules = pattern_rules([], [path])
    pairs = tuple((line.rpartition("=")[0], line.rpartition("=")[2]) for line in exported(wanted))
    check(plan, tmp_path, overrides=pairs)
    again = plan_of(variant("deep"), ("F32", "Q4_K_M"), rules=rules, upstream_counters=True)
    assert files_of(again)[1].kinds == file.kinds


def test_default_counters_keep_the_mix_of_tensors_that_no_rule_names(
    variant: Make, tmp_path: Path
) -> None:
    rules = pattern_rules(SEED.split(), [])
    source = variant("deep")
    plain = files_of(plan_of(source, ("Q4_K_M",)))[0].kinds
    ours = files_of(plan_of(source, ("Q4_K_M",), rules=rules))[0].kinds
    theirs = files_of(plan_of(source, ("Q4_K_M",), rules=rules, upstream_counters=True))[0].kinds
    unnamed = [name for name in plain if not any(rule.pattern.search(name) for rule in rules)]  # type: ignore[union-attr]
    assert all(ours[name] == plain[name] for name in unnamed)
    assert any(theirs[name] != plain[name] for name in unnamed)


def test_from_an_f16_file(variant: Make, tmp_path: Path) -> None:
    check(plan_of(variant("f16"), ("F16", "Q8_0", "Q4_K_M", "Q3_K_M")), tmp_path, base="F16")


ANY = (
    *("q2_K", "q3_K", "iq3_s", "iq4_xs", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q1_0", "q2_0", "tq1_0", "tq2_0", "mxfp4", "bf16", "f16", "f32"),
)
"""Not NVFP4: llama-quantize writes no scales for it (`tests/test_gguf_scaled.py`)."""


@pytest.mark.parametrize("kind", ANY)
def test_any_type_may_be_given_to_a_tensor(kind: str, variant: Make, tmp_path: Path) -> None:
    rules = pattern_rules([rf"ffn_(up|down)\.weight={kind}"], [])
    plan = plan_of(variant("dense"), ("F32", "Q4_K_M"), rules=rules, upstream_counters=True)
    check(plan, tmp_path, overrides=((r"ffn_(up|down)\.weight", kind),))


@pytest.mark.parametrize("kind", ["iq2_xxs", "iq2_s", "iq3_xxs", "iq1_m", "iq1_s"])
def test_types_that_need_an_imatrix(kind: str, variant: Make, tmp_path: Path) -> None:
    source = variant("dense")
    rules = pattern_rules([rf"blk\.1\.ffn_up={kind}"], [])
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", plan_of(source, ("F32",)))
    plan = plan_of(source, ("F32", "Q4_K_M"), rules=rules, imatrix=imatrix, upstream_counters=True)
    check(plan, tmp_path, overrides=((r"blk\.1\.ffn_up", kind),))


def test_dropped_mtp_layers(variant: Make, tmp_path: Path) -> None:
    check(plan_of(variant("dense"), ("F32", "Q4_K_M"), drop_mtp=True), tmp_path)


@pytest.mark.parametrize("name", ["three-to-one", "moe", "moe-per-expert"])
def test_where_strips_are_cut_does_not_change_bytes(
    name: str, variant: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strips end within heads, between experts, and before the value heads begin."""
    plan = plan_of(variant(name), ("F16", "Q4_K_M"))
    whole = write(plan, tmp_path / "whole", threads=1)
    monkeypatch.setattr("qwen35.codecs.pieces.PIECE", 37 * 256)
    cut = write(plan, tmp_path / "cut", threads=2)
    assert cut.hashes == whole.hashes
