"""The MTP layer kept, dropped, or in a GGUF file of its own; its bytes: test_gguf_converter."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import ASSET
from gguf_models import make_variant
from llama import quantize
from qwen35.api.convert_api import convert
from qwen35.api.gguf_api import gguf
from qwen35.api.plan_api import plan
from qwen35.api.verify_api import verify
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.locations import LocalFolder
from qwen35.cli.main import main
from qwen35.engines.llama import llama_cpp
from qwen35.errors import InputError, UsageError
from qwen35.evaluation.models import open_candidates
from qwen35.planning.gguf_files.gguf_container import GgufContainer
from qwen35.publishing.modelfile import gguf_models, modelfile_text
from qwen35.publishing.repo_documents import documents
from qwen35.verification.gguf_subject import container_findings

MAIN, DRAFT = "qwen3.5-tiny-Q8_0.gguf", "mtp-qwen3.5-tiny-BF16.gguf"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mtp") / "out"
    return gguf(ASSET, out, types="Q8_0", mtp="separate", mtp_type="bf16", threads=1).out


def test_files_and_what_is_in_them(made: Path, tmp_path: Path) -> None:
    assert {path.name for path in made.iterdir()} == {MAIN, DRAFT, "qwen35.json"}
    dropped = gguf(ASSET, tmp_path / "dropped", types="Q8_0", mtp="drop", threads=1).out
    assert (made / MAIN).read_bytes() == (dropped / MAIN).read_bytes()
    draft = read_container(made / DRAFT)
    assert draft.mtp_alone
    assert not read_container(made / MAIN).mtp_alone
    assert {name.partition(".blk")[0].split(".")[0] for name in draft.tensors} == {
        "token_embd",
        "output_norm",
        "blk",
    }
    assert {n.split(".")[1] for n in draft.tensors if n.startswith("blk.")} == {"8"}
    recipe = json.loads((made / "qwen35.json").read_text())["recipe"]
    assert (recipe["drop_mtp"], recipe["mtp_file"]) == (False, "BF16")
    recipe = json.loads((dropped / "qwen35.json").read_text())["recipe"]
    assert (recipe["drop_mtp"], "mtp_file" in recipe) == (True, False)


def test_default_type_is_q8_0_and_the_plan_says_so() -> None:
    planned = plan("Qwen3.6-35B-A3B", types="Q4_K_M", mtp="separate")
    assert [f.name for f in planned.files][1:] == ["mtp-Qwen3.6-35B-A3B-Q8_0.gguf"]
    whole = plan("Qwen3.6-35B-A3B", types="Q4_K_M")
    assert whole.files[0].nbytes > planned.files[0].nbytes


@pytest.mark.parametrize("model", ["asset", "moe", "odd-rows"])
def test_q4_0_is_that_of_llama_quantize_pure(model: str, tmp_path: Path) -> None:
    source = ASSET if model == "asset" else make_variant(tmp_path, model)
    files = {}
    for kind in ("F32", "Q4_0"):
        out = gguf(source, tmp_path / kind, types="F16", mtp="separate", mtp_type=kind, threads=1)
        (files[kind],) = out.out.glob("mtp-*.gguf")
    assert files["Q4_0"].name == f"mtp-{source.name}-Q4_0.gguf"
    theirs = quantize(files["F32"], tmp_path / "theirs.gguf", "Q4_0", pure=True)
    assert files["Q4_0"].read_bytes() == theirs.read_bytes()
    assert verify(files["Q4_0"].parent, source=source, threads=1).passed


def test_verified_against_the_source(made: Path) -> None:
    verdict = verify(made, source=ASSET, threads=1)
    assert verdict.findings == ()
    assert verdict.counts["weights"] == 125


def test_a_tensor_that_is_missing_is_named(made: Path) -> None:
    draft = read_container(made / DRAFT)
    name = "blk.8.ffn_up.weight"
    tensors = {key: tensor for key, tensor in draft.tensors.items() if key != name}
    (finding,) = container_findings(replace(draft, tensors=tensors))
    assert finding.subject == f"{DRAFT}: {name}"
    assert finding.message == "missing, but the keys imply it"
    assert not list(container_findings(draft))


def test_it_is_no_model_to_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.name for path in GgufContainer().models(made)] == [MAIN]
    assert gguf_models(LocalFolder(made)) == [MAIN]
    assert DRAFT not in modelfile_text(LocalFolder(made))
    card = documents(made, "me/x")["README.md"].decode()
    assert f"--spec-type draft-mtp --model-draft {DRAFT}" in card
    assert main(["inspect", str(made / DRAFT)]) == 0
    assert "the multi-token-prediction layer alone" in capsys.readouterr().out
    with pytest.raises(InputError, match="no language model in it"):
        open_candidates([str(made / DRAFT)])


def test_llama_cpp_loads_it_as_a_draft(made: Path) -> None:
    llama: Any = llama_cpp()
    params = llama.llama_model_default_params()
    params.load_mtp, params.n_gpu_layers = True, 0
    model = llama.llama_model_load_from_file(str(made / DRAFT).encode(), params)
    assert model
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 256, 64, 64
    settings.ctx_type = llama.LLAMA_CONTEXT_TYPE_MTP
    context = llama.llama_init_from_model(model, settings)
    assert ctypes.cast(context, ctypes.c_void_p).value
    llama.llama_free(context)
    llama.llama_model_free(model)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"mtp": "both"}, "--mtp: 'both' is unknown, expected keep, drop, separate"),
        ({"mtp": "keep", "drop_mtp": True}, "--drop-mtp: not with --mtp keep; leave one"),
        ({"mtp": "separate", "drop_mtp": True}, "--drop-mtp: not with --mtp separate"),
        ({"mtp_type": "F16"}, "--mtp-type: has no effect without --mtp separate"),
        ({"mtp": "separate", "mtp_type": "q4_K"}, "--mtp-type: 'q4_K' is unknown, expected F32"),
    ],
)
def test_what_does_not_go_together_is_refused(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        gguf(ASSET, "out", types="F16", dry_run=True, **asked)


def test_short_and_long_form_agree() -> None:
    both = plan(ASSET, types="Q8_0", mtp="drop", drop_mtp=True)
    assert both.digest == plan(ASSET, types="Q8_0", drop_mtp=True).digest
    assert both.digest != plan(ASSET, types="Q8_0", mtp="keep").digest
    dropped = plan(ASSET, recipe="bf16", mtp="drop")
    assert dropped.digest == plan(ASSET, recipe="bf16", drop_mtp=True).digest


def test_a_checkpoint_has_no_separate_file() -> None:
    for make in (lambda: plan(ASSET, mtp="separate"), lambda: convert(ASSET, "o", mtp="separate")):
        with pytest.raises(UsageError, match="--mtp separate: engines read .*; it is for GGUF"):
            make()


def test_a_model_without_the_layer_is_refused(tmp_path: Path) -> None:
    source = make_variant(tmp_path, "text")
    with pytest.raises(UsageError, match="has no MTP layers, expected one; leave it out"):
        plan(source, types="F16", mtp="separate")
