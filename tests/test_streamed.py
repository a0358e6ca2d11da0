"""Evaluation layer by layer: the figures of models in memory, resumed, chosen, refused, bounded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import ASSET, layout_of, tiny_config, write_checkpoint
from evaluating import CHUNKS, gguf, measure
from gguf_models import exact_tensors, make_variant, rewrite_gguf, sidecars
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.ggml.types import GGML_TYPES
from qwen35.codecs.input_quantizers import eight_bits
from qwen35.codecs.registry import CODECS
from qwen35.display import bytes_of
from qwen35.engines.simulated_inputs import llama_inputs
from qwen35.engines.torch_model import TorchModel, torch_and_transformers
from qwen35.errors import InputError, OutputError, Qwen35Error, TensorError, UsageError
from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
from qwen35.evaluation.evaluation_run import evaluate
from qwen35.evaluation.evaluation_table import notes
from qwen35.evaluation.models import open_base
from qwen35.evaluation.streamed_models import streamed_models, streaming_folder
from qwen35.evaluation.text_chunks import tokenizer_of
from qwen35.model.model_config import parse_config
from qwen35.model.roles import expected_tensors
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.planning.sources import open_source
from qwen35.planning.transforms import TileValueColumns
from qwen35.progress import Silent
from qwen35.reporting.report_files import write_report
from qwen35.writing.write import write
from running import run

TEXT = ASSET.parent.parent / "LICENSE"

pytestmark = pytest.mark.filterwarnings("ignore:.*FP8.*", "ignore:.*is deprecated.*")


# --- the same figures


@pytest.mark.parametrize("variant", ["three-to-one", "moe", "moe-per-expert"])
def test_logits_are_those_of_the_whole_model(variant: str, tmp_path: Path) -> None:
    """Also of a GGUF file in F32: heads, norms and decays are put back as they were."""
    source = make_variant(tmp_path, variant)
    written = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("F32",))
    file = str(write(written, tmp_path / "gguf", threads=1).out / written.files[0].name)
    asked = EvaluationRequest(str(source), (file,), TEXT, context=32, chunks=3, streamed=True)
    job = prepare(asked)
    assert job.stream is not None
    chunks, whole = job.chunks, TorchModel(source, exact=True)
    running = [job.base, *job.candidates]
    # Experts are read with their layer, and one by one.
    for wide in (0, 2) if "moe" in variant else (0,):
        plan = replace(job.stream, sizes=replace(job.stream.sizes, wide=wide))
        with streamed_models(plan, running, chunks, "cpu", None, Silent()) as models:
            for index in (2, 0, 1):
                expected = whole.logits(chunks.inputs(index), chunks.first)
                scale = np.abs(expected).max()
                for model in running:
                    got = models(model).logits(chunks, index)
                    assert np.abs(got - expected).max() < 2e-6 * scale, model.name


def test_experts_of_every_format(tmp_path: Path) -> None:
    source = make_variant(tmp_path, "moe-per-expert")
    run(source, tmp_path / "fp8", "fp8")
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("Q8_0",))
    out = write(plan, tmp_path / "gguf", threads=1).out
    both = (tmp_path / "fp8", out)
    options: dict[str, Any] = {"chunks": 2, "context": 64, "threads": 1, "device": "cpu"}
    there = evaluate(source, both, TEXT, **options)
    here = evaluate(source, both, TEXT, streamed=True, llama_inputs=True, **options)
    klds = [row.comparison.kld.value for row in (*here.candidates, *here.simulations)]
    fp8, eight, fp8_inputs, eight_inputs = klds
    expected, llama = (row.comparison.kld.value for row in there.candidates)
    assert fp8 == pytest.approx(expected, rel=1e-3)
    assert fp8_inputs == pytest.approx(there.simulations[0].comparison.kld.value, rel=1e-3)
    assert eight_inputs == pytest.approx(llama, rel=0.05)
    assert 0 < eight < eight_inputs


@pytest.mark.parametrize("kind", GGML_TYPES)
def test_inputs_are_rounded_by_blocks(kind: str) -> None:
    """To 127 steps on either side of zero, or as floats of that size."""
    made = CODECS[f"ggml:{kind}"].input_quantizer(None, None)  # type: ignore[arg-type]
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    x[1] = 0
    y, row = made(x), GGML_TYPES[kind]
    assert y.dtype == torch.float32
    assert (y[1] == 0).all()
    if row.block > 1:
        size = 256 if row.block == 256 else 32
        largest = x.unflatten(-1, (-1, size)).abs().amax(-1, keepdim=True)
        off = (y - x).unflatten(-1, (-1, size)).abs() / largest.where(largest > 0, 1)
        assert 0.4 / 127 < off.max() < 0.6 / 127
    elif kind in ("f16", "bf16"):
        assert torch.equal(y, x.to({"f16": torch.float16, "bf16": torch.bfloat16}[kind]).float())
    elif kind == "f32":
        assert torch.equal(y, x)


def test_inputs_are_rounded_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Value heads lie in another order there, and blocks of 256 columns hold four of them."""
    config = tiny_config(text_only=True, layers=4, mtp=0) | {"linear_num_value_heads": 8}
    tensors = exact_tensors(config, layout_of(config), seed=1)
    source = write_checkpoint(tmp_path / "source", config, tensors, sidecars=sidecars())
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("Q4_K_M",))
    out = write(plan, tmp_path / "gguf", threads=1).out
    checkpoint = open_source(out / plan.files[0].name)
    rows = TileValueColumns(config["linear_value_head_dim"], config["linear_num_key_heads"])
    quantizers = {
        role.name: one for role, one in llama_inputs(checkpoint).items() if role.layer == 0
    }
    columns = config["linear_value_head_dim"] * config["linear_num_value_heads"]
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)) ** 3
    there, _ = rows.apply(x.numpy(), "F32")
    rounded = eight_bits(torch.from_numpy(there), block=256, half=False).numpy()
    back, _ = rows.inverse((1, columns)).apply(rounded, "F32")
    got = quantizers["linear_attn.out_proj"](x).numpy()
    assert np.array_equal(got, back)
    assert not np.array_equal(got, eight_bits(x, block=256, half=False).numpy())


def test_a_cache_is_the_same_either_way(formats: Path, tmp_path: Path) -> None:
    """Written by a streamed run or in memory, it serves both."""
    base, candidate = str(ASSET), str(formats / "nf4")
    figures = []
    for written in (True, False):
        options: dict[str, Any] = {"context": 32, "cache": tmp_path / f"kept-{written}"}
        measure(formats, base, streamed=written, **options)
        for streamed in (True, False)[: 2 if written else 1]:
            report = measure(formats, base, candidate, streamed=streamed, **options)
            assert report.reference == "compact file"
            figures.append(report.candidates[0].comparison.kld.value)
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-3)


def test_a_gguf_file_is_base(formats: Path) -> None:
    """Alone, or of any candidates: what is measured is as from the checkpoint."""
    options: dict[str, Any] = {"streamed": True, "context": 32}
    file, nf4 = gguf(formats, "F16"), str(formats / "nf4")
    expected = measure(formats, str(ASSET), nf4, **options)
    report = measure(formats, file, nf4, **options)
    ours, theirs = (one.candidates[0].comparison.kld.value for one in (report, expected))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert "F16: its weights alone, in float32; llama.cpp rounds inputs of layers too" in "\n".join(
        notes(report)
    )
    quantized = measure(formats, gguf(formats, "Q4_K_M"), **options)
    below = measure(formats, str(ASSET), gguf(formats, "Q4_K_M"), **options).candidates[0]
    assert quantized.base_perplexity.value == pytest.approx(below.comparison.perplexity.value)


def test_a_gguf_base_gives_the_tokens_of_llama_cpp_without_it(
    formats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys hold the whole tokenizer; text is not normalized."""
    model = open_base(gguf(formats, "F16"), alone=True)
    texts = [
        TEXT.read_text(),
        "cafe\u0301 \u212b<|im_start|> 12345  \n\n\t日本語 \U0001f389",
        " \n",
    ]
    encode, decode = tokenizer_of(model)
    expected = [list(encode(text)) for text in texts]
    shown = [decode(ids) for ids in expected]
    with monkeypatch.context() as patch:
        found = importlib.util.find_spec
        patch.setattr(
            "importlib.util.find_spec", lambda n, *a: None if n == "llama_cpp" else found(n, *a)
        )
        encode, decode = tokenizer_of(model)
    assert [list(encode(text)) for text in texts] == expected
    assert [decode(ids) for ids in expected] == shown


# --- resumed


class _Stopping(Silent):
    def __init__(self, block: str, *, left: int = 1) -> None:
        self.block, self.left, self.heard = block, left, list[str]()

    def advance(self, nbytes: int, item: str) -> None:
        self.heard.append(item)
        if item == self.block:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt


@pytest.mark.parametrize(("block", "left"), [("layers.6", 2), ("chunk 1", 1)])
def test_an_interrupted_run_goes_on_at_its_layer(
    formats: Path, tmp_path: Path, block: str, left: int
) -> None:
    models, state = (str(ASSET), gguf(formats, "Q4_K_M")), tmp_path / "state"
    options: dict[str, Any] = {"streamed": True, "context": 32}
    whole = measure(formats, *models, **options)
    stopping, watched = _Stopping(block, left=left), _Stopping("")
    with pytest.raises(KeyboardInterrupt):
        measure(formats, *models, state=state, progress=stopping, **options)
    assert len(list(streaming_folder(state).iterdir())) == 2
    resumed = measure(formats, *models, state=state, progress=watched, **options)
    assert watched.heard[-1] == f"chunk {CHUNKS}"
    assert resumed.to_json() == whole.to_json()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["state", "link", "states"])
def test_damaged_states_are_refused(formats: Path, tmp_path: Path, damage: str) -> None:
    state, options = tmp_path / "state", {"streamed": True, "context": 32}
    with pytest.raises(KeyboardInterrupt):
        measure(formats, str(ASSET), state=state, progress=_Stopping("layers.3"), **options)
    (folder,) = streaming_folder(state).iterdir()
    if damage == "state":
        (folder / "state.json").write_text('{"plan": 1}')
        message = "was not made by qwen35"
    elif damage == "link":
        shutil.move(folder, tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
        message = "is a link"
    else:
        os.truncate(folder / "plain-0.bin", 1000)
        message = "was changed by another process; remove it to start again"
    with pytest.raises(OutputError, match=message):
        measure(formats, str(ASSET), state=state, **options)


def test_states_of_other_models_are_not_used(formats: Path, tmp_path: Path) -> None:
    state, options = tmp_path / "state", {"streamed": True, "context": 32}
    with pytest.raises(KeyboardInterrupt):
        measure(formats, str(ASSET), state=state, progress=_Stopping("layers.3"), **options)
    watched = _Stopping("")
    base = str(formats / "text")
    report = measure(formats, base, state=state, progress=watched, **options)
    assert watched.heard.count("layers.0") == watched.heard.count("head") == 1
    assert report.to_json() == measure(formats, base, **options).to_json()


# --- chosen, said, refused


def test_models_that_do_not_fit_run_layer_by_layer(
    formats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = EvaluationRequest(
        str(ASSET), (gguf(formats, "Q8_0"),), formats / "text.txt", chunks=CHUNKS, context=64
    )
    in_memory = prepare(asked)
    assert in_memory.stream is None
    arguments = ["evaluate", asked.base, *asked.candidates, "--text", str(asked.text)]
    arguments += ["--chunks", "2", "--context", "64", "--threads", "1", "--device", "cpu"]
    arguments += ["--memory", str(in_memory.memory - 1)]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["peak_memory"] < in_memory.memory
    assert told["temporary_bytes"] == 0
    assert "--memory is" in told["streamed"]["why"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "layer by layer (in memory, models would take" in capsys.readouterr().out
    assert main([*arguments, "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "models ran layer by layer: in memory, models would take" in shown
    assert "Q8_0: its weights alone, in float32" in shown


@pytest.mark.parametrize(
    ("base", "more", "message"),
    [
        ("asset", {"memory": 10**8}, "too little, expected at least"),
        ("asset", {"unquantized": "gguf/qwen3.5-tiny-F16.gguf"}, "--unquantized: given, but all"),
        ("asset", {"llama_inputs": True}, "--simulate llama.cpp: no candidate is a GGUF file"),
        ("asset", {"llama_inputs": True, "streamed": False}, "hint: give --streamed"),
        ("asset", {"context": 100_000}, "expected at least 200000, two chunks"),
        ("asset", {"context": 2}, "--context: 2, expected 3 tokens at least"),
    ],
)
def test_refusals(
    formats: Path, base: str, more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(formats)
    given = str(ASSET) if base == "asset" else base
    floor = ("gguf/qwen3.5-tiny-Q8_0.gguf",) * ("unquantized" in more)
    options = {"text": formats / "text.txt", "streamed": True, **more}
    with pytest.raises(Qwen35Error) as raised:
        prepare(EvaluationRequest(given, floor, **options))
    assert message in str(raised.value) or message.removeprefix("hint: ") in str(raised.value)


@pytest.mark.parametrize(
    "verb", ["calibrate", "convert", "evaluate", "gguf", "merge", "plan", "run", "tune"]
)
def test_a_memory_that_makes_no_sense_is_refused(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ("0", "-1", "0GB", "-2GB", "1e400", "1e400GB", "nanGB", "GB", "1XB", ""):
        assert main([verb, str(ASSET), f"--memory={given}"]) == 2
        message = f"--memory: {given!r}, expected a size such as 400MB or 1.5GiB"
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_memory_that_is_named_is_enough(formats: Path) -> None:
    """Be it for a layer or for logits of one chunk."""
    for context in (16, 1024):
        asked = EvaluationRequest(
            str(ASSET), (), formats / "text.txt", context=context, streamed=True, memory=1000
        )
        with pytest.raises(UsageError, match=r"--memory 1.00 kB: too little, expected") as raised:
            prepare(asked)
        enough = bytes_of(str(raised.value.expected).removeprefix("at least "))
        job = prepare(replace(asked, memory=enough))
        assert job.memory <= enough


def test_layers_are_counted_as_layers(formats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["evaluate", str(ASSET), "--text", str(formats / "text.txt"), "--context", "32"]
    assert main([*asked, "--chunks", "3", "--streamed", "--threads", "1"]) == 0
    said = capsys.readouterr().err
    assert f"running {ASSET.name}: 8 layers" in said
    assert "evaluating: 3 chunks" in said


def test_reports_say_which_candidates_have_refined_codes(formats: Path, tmp_path: Path) -> None:
    plain = formats / "nf4"
    refined = shutil.copytree(plain, tmp_path / "ours")
    manifest = json.loads((refined / "qwen35.json").read_text())
    manifest["refined"] = {"model.safetensors": {"some.weight": "01"}}
    (refined / "qwen35.json").write_text(json.dumps(manifest))
    models = str(ASSET), str(plain), str(refined)
    report = measure(formats, *models, streamed=True, context=32)
    assert ["Codes", "plain", "refined"] in report.table[1]
    assert [row["codes"] for row in report.to_json()["candidates"]] == ["", "refined"]
    write_report(report, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("transformers (streamed), refined codes") == 1
    without = measure(formats, str(ASSET), str(plain), streamed=True, context=32)
    assert "Codes" not in [row[0] for row in without.table[1]]


def test_speed_is_refused(formats: Path) -> None:
    with pytest.raises(Qwen35Error, match="--speed: measures llama.cpp"):
        measure(formats, str(ASSET), gguf(formats, "Q8_0"), streamed=True, speed=True)


@pytest.mark.parametrize("change", ["other tensor", "missing tensor", "nan"])
def test_gguf_files_that_do_not_fit_are_refused(formats: Path, tmp_path: Path, change: str) -> None:
    path = tmp_path / "changed.gguf"

    def changed(writer: Any) -> None:
        tensors = writer.tensors[0]
        if change == "other tensor":
            writer.add_tensor("blk.1.extra.weight", np.zeros(4, np.float32))
        elif change == "missing tensor":
            del tensors["blk.1.ffn_up.weight"]
        else:
            tensors["output_norm.weight"].tensor[:] = np.nan

    rewrite_gguf(Path(gguf(formats, "F16")), path, "qwen35", changed)
    message = {
        "other tensor": "blk.1.extra.weight: not a tensor that the keys imply",
        "missing tensor": r"blk.1.ffn_up.weight: missing, expected \[512, 256\] by the keys",
        "nan": "output_norm.weight: a scale or weight is not finite",
    }[change]
    with pytest.raises((TensorError, InputError), match=message):
        measure(formats, str(ASSET), str(path), streamed=True, context=32)


# --- memory

LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
from qwen35.evaluation.evaluation_run import run

def job(folder):
    asked = {"chunks": 2, "context": 32, "threads": 1, "device": "cpu"}
    way = {"streamed": True} if sys.argv[4] == "stream" else {}
    return prepare(EvaluationRequest(folder, (), Path(sys.argv[3]), **way, **asked))

small, large = sys.argv[1:3]
run(job(small))
prepared = job(large)
lines = Path("/proc/self/status").read_text().splitlines()
held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
limit = held + 4 * 25_800_000 * 3 // 2
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
run(prepared)
"""


@pytest.mark.heavy
@pytest.mark.parametrize(("way", "fits"), [("stream", True), ("load", False)])
def test_a_layer_and_a_half_is_memory_enough(way: str, fits: bool, tmp_path: Path) -> None:
    """In float32 a layer has 103 MB, the model over 500."""
    folders = []
    for name, sizes in (("small", {}), ("large", {"intermediate_size": 32768})):
        config = tiny_config(text_only=True, mtp=0) | sizes | {"vocab_size": 100_000}
        tensors = {
            spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16)
            for spec in expected_tensors(parse_config(config), layout_of(config))
        }
        folders.append(write_checkpoint(tmp_path / name, config, tensors, sidecars=sidecars()))
    text = tmp_path / "text.txt"
    text.write_text("the rain in a Model, seven times; " * 20)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *folders, text, way],
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == fits, done.stderr[-2000:]
    if not fits:
        assert "memory" in done.stderr.casefold()


def test_gguf_files_run_without_llama_cpp(formats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And notes name what is simulated."""

    def missing() -> None:
        pytest.fail("llama.cpp was asked for")

    monkeypatch.setattr("qwen35.engines.llama.llama_cpp", missing)
    options = {"streamed": True, "context": 32, "llama_inputs": True}
    report = measure(formats, str(ASSET), gguf(formats, "Q8_0"), **options)
    said = "\n".join(notes(report))
    assert "(inputs quantized): simulates llama.cpp (8 bits in blocks of 32 or 256" in said
    assert "weights alone" not in said
    assert report.to_json()["simulations"][0]["engine"] == "transformers (streamed)"


def test_threads_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that spin on a busy machine took five times the processor time of one."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    torch_and_transformers("a test")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    torch_and_transformers("a test")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
