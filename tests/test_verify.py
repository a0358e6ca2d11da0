"""The verifier is silent on good artifacts and sources of every recipe, in pieces or whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints import random_tensors, write_checkpoint
from loading import quantize_with_transformers
from qwen35.checkpoint.source import open_folder
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import verify
from qwen35.writing.write import write
from running import load_all, read_config, run
from verifying import check

pytestmark = pytest.mark.sentences

LAYER = "model.language_model.layers"
QKV = f"{LAYER}.0.linear_attn.in_proj_qkv.weight"
NORM = "model.language_model.norm.weight"


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
    assert {finding.check for finding in verdict.findings} <= {"values"}
    assert sum("there is no mtp tensor, as after transformers'" in n for n in verdict.notes) == 1
    lost = {f.subject.rpartition(".")[0] for f in verdict.findings if f.check == "values"}
    assert all(name.endswith(("linear_attn.norm", "linear_attn")) for name in lost)


def test_structure_needs_no_torch_and_no_numpy_arrays_of_weights(nf4_artifact: Path) -> None:
    script = (
        "import sys; from qwen35.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print(sorted({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    for verb in ("verify", "inspect"):
        done = subprocess.run(
            [sys.executable, "-c", script, verb, str(nf4_artifact), "--quiet"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_the_same_values_in_another_type_are_the_same(dense: Path, tmp_path: Path) -> None:
    tensors = load_all(dense)
    wider = {**tensors, NORM: tensors[NORM].float()}
    made = write_checkpoint(tmp_path / "wider", read_config(dense), wider)
    assert check(made, dense).findings == ()
    wider[NORM][0] += 1
    made = write_checkpoint(tmp_path / "other", read_config(dense), wider)
    [finding] = check(made, dense).findings
    assert (finding.check, finding.subject) == ("values", NORM)


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


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("recipe", ["nf4", "fp8", "text"])
def test_good_artifacts_pass_piece_by_piece(recipe: str, dense: Path, tmp_path: Path) -> None:
    out = run(dense, tmp_path / "out", recipe).out
    assert check(out, dense).findings == ()
    assert verify(open_artifact(str(out)), depth="numbers", threads=1).findings == ()


@pytest.mark.parametrize(("first", "second"), [("fp8", "nf4"), ("nf4", "fp8")])
def test_what_was_packed_already_is_compared_with_what_that_decodes_to(
    first: str, second: str, dense: Path, tmp_path: Path
) -> None:
    middle = run(dense, tmp_path / first, first).out
    out = run(middle, tmp_path / second, second).out
    assert check(out, middle).findings == ()


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


def test_restored_fp8_weights_of_any_width_are_compared(tmp_path: Path) -> None:
    """A weight of more than one piece, whose rows do not divide a piece."""
    from checkpoints import tiny_config
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
