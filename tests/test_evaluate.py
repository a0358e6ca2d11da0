"""Evaluations of the embedded checkpoint in every format: figures, refusals, resuming, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import ASSET
from evaluating import CHUNKS, Interrupting, gguf, measure
from gguf_models import make_variant
from qwen35.checkpoint.gguf_header import read_container
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.codecs.registry import CODECS
from qwen35.engines.llama import Llama
from qwen35.engines.torch_model import TorchModel
from qwen35.errors import InputError, OutputError, UsageError
from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
from qwen35.evaluation.evaluation_report import EvaluationReport
from qwen35.evaluation.evaluation_run import evaluate
from qwen35.evaluation.evaluation_table import notes, report_text
from qwen35.planning.output_plan import make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.sinks.staging import locked
from qwen35.writing.write import write
from running import run

TEXT = ASSET.parent.parent / "LICENSE"

pytestmark = pytest.mark.filterwarnings("ignore:.*FP8.*", "ignore:.*is deprecated.*")


@pytest.fixture(scope="module")
def everything(formats: Path) -> EvaluationReport:
    """The checkpoint against all its formats."""
    others = (str(formats / name) for name in ("nf4", "fp8", "text"))
    return measure(formats, str(ASSET), *others, gguf(formats, "Q8_0"), gguf(formats, "Q4_K_M"))


def means(report: EvaluationReport) -> dict[str, float]:
    return {row.model.name: row.comparison.kld.value for row in report.candidates}


def test_every_format_in_one_table(everything: EvaluationReport) -> None:
    kld = means(everything)
    assert list(kld) == ["nf4", "fp8", "text", f"{ASSET.name}-Q8_0", f"{ASSET.name}-Q4_K_M"]
    assert kld["text"] == 0.0  # the same weights in the same engine
    assert 1e-5 < kld[f"{ASSET.name}-Q8_0"] < kld["fp8"] < kld[f"{ASSET.name}-Q4_K_M"] < 0.1
    assert kld["fp8"] < kld["nf4"] < 0.1
    for row in everything.candidates:
        assert row.comparison.base_perplexity == everything.base_perplexity
        assert sum(row.distribution) == CHUNKS * 255


def test_streamed_figures_are_those_in_memory(formats: Path, everything: EvaluationReport) -> None:
    """Of GGUF files, with llama.cpp's inputs; without them, divergences are far lower."""
    others = (str(formats / name) for name in ("nf4", "fp8", "text"))
    files = (gguf(formats, "Q8_0"), gguf(formats, "Q4_K_M"))
    report = measure(formats, str(ASSET), *others, *files, streamed=True, llama_inputs=True)
    assert report.floors == []
    assert report.base_perplexity.value == pytest.approx(everything.base_perplexity.value, rel=1e-6)
    here, there = means(report), means(everything)
    for name in ("nf4", "fp8"):
        assert here[name] == pytest.approx(there[name], rel=1e-4)
    assert here["text"] < 1e-12
    simulated = {row.model.name: row.comparison.kld.value for row in report.simulations}
    (fp8,) = everything.simulations
    assert simulated.pop(fp8.model.name) == pytest.approx(fp8.comparison.kld.value, rel=1e-3)
    assert len(simulated) == 2
    for name, value in simulated.items():
        plain = name.removesuffix(" (inputs quantized)")
        assert value == pytest.approx(there[plain], rel=0.05)
        assert here[plain] < 0.8 * value


def test_quantized_inputs_are_a_column_of_their_own(everything: EvaluationReport) -> None:
    """Servers round the inputs of FP8 too; on an NVIDIA H200 that doubled the divergence."""
    (simulated,) = everything.simulations
    weights = means(everything)["fp8"]
    assert simulated.model.name == "fp8 (inputs quantized)"
    assert 1.5 * weights < simulated.comparison.kld.value < 3 * weights
    assert everything.table[0][1:5] == ["nf4", "fp8", "fp8 (inputs quantized)", "text"]
    name, *cells = everything.table[1][0]
    assert name == "Mean KLD"
    assert cells[1].startswith(f"{weights:.6f}")
    assert cells[2].startswith(f"{simulated.comparison.kld.value:.6f}")
    assert "(inputs quantized): simulates servers" in report_text(everything)
    assert not simulated.front
    value = everything.to_json()
    assert [row["inputs"] for row in value["simulations"]] == ["E4M3, each token in groups of 128"]
    assert {row["inputs"] for row in value["candidates"] + value["noise_floor"]} == {""}


def test_weights_alone_where_that_is_asked(formats: Path) -> None:
    asked = EvaluationRequest(str(ASSET), (str(formats / "fp8"),), formats / "text.txt")
    job, alone = prepare(asked), prepare(replace(asked, simulate=False))
    assert [model.name for model in job.simulations] == ["fp8 (inputs quantized)"]
    assert alone.simulations == ()
    assert job.results - alone.results == 4 * job.chunks.count * job.chunks.scored * 8
    [model], [simulated] = job.candidates, job.simulations
    assert model.identity() != simulated.identity()  # no state of one is taken for the other


def test_the_noise_floor_is_measured_and_small(everything: EvaluationReport) -> None:
    """The checkpoint itself as F16 in llama.cpp; F16 rounds activations too."""
    (floor,) = everything.floors
    assert floor.model.engine == "llama.cpp"
    assert floor.model.stored == "F16"
    assert 0 < floor.comparison.kld.value < 1e-5
    assert floor.comparison.kld.value < means(everything)[f"{ASSET.name}-Q8_0"] / 30
    assert "noise floor: the unquantized model in llama.cpp (F16)" in report_text(everything)


def test_what_lies_in_the_noise_is_said(formats: Path) -> None:
    report = measure(formats, str(ASSET), gguf(formats, "F16"))
    assert any("within 3 times the noise floor" in note for note in notes(report))
    assert means(report)[f"{ASSET.name}-F16"] == pytest.approx(report.floor)


def test_perplexity_of_the_base_alone(formats: Path, everything: EvaluationReport) -> None:
    report = measure(formats, str(ASSET))
    assert report.candidates == report.floors == []
    assert report.base_perplexity == everything.base_perplexity
    assert "PPL" in report_text(report)


def test_perplexity_agrees_with_the_model_asked_directly(
    formats: Path, everything: EvaluationReport
) -> None:
    import torch

    ids = torch.from_numpy(everything.chunks.ids.astype(np.int64))
    model = TorchModel(ASSET, exact=True).model
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 256:-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 257:].flatten())
    assert everything.base_perplexity.value == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_gguf_base_with_candidates_of_both_engines(
    formats: Path, everything: EvaluationReport
) -> None:
    base, nf4 = gguf(formats, "F16"), str(formats / "nf4")
    with pytest.raises(UsageError, match="give --unquantized CHECKPOINT"):
        measure(formats, base, nf4)
    report = measure(formats, base, nf4, gguf(formats, "Q8_0"), unquantized=str(ASSET))
    assert report.floors[0].model.engine == "transformers"
    assert 0 < report.floor < 1e-5
    assert means(report)["nf4"] == pytest.approx(means(everything)["nf4"], rel=1e-2)


def test_gguf_pairs_have_no_noise_between_engines(formats: Path) -> None:
    report = measure(formats, gguf(formats, "F16"), gguf(formats, "F16"), gguf(formats, "Q8_0"))
    same = report.candidates[0].comparison
    assert same.kld.value == same.maximum == 0.0
    assert same.same_top.value == 1.0
    assert report.floors == []
    assert any("none between engines" in note for note in notes(report))


def test_a_mixture_of_experts_in_every_format(tmp_path: Path) -> None:
    source = make_variant(tmp_path, "moe-per-expert")
    for recipe in ("nf4", "fp8", "text-fp8"):
        run(source, tmp_path / recipe, recipe)
    plan = make_plan(open_folder(source), load_recipe("mix", "gguf"), types=("Q8_0",))
    out = write(plan, tmp_path / "gguf").out
    folders = [tmp_path / "nf4", tmp_path / "fp8", tmp_path / "text-fp8", out]
    report = evaluate(source, folders, TEXT, chunks=2, threads=1, device="cpu")
    kld = list(means(report).values())
    assert kld[1] == kld[2]
    inputs = [row.comparison.kld.value for row in report.simulations]
    assert inputs[0] == inputs[1] > kld[1]
    assert all(report.floor < value < 0.01 for value in kld)
    assert report.floor < 1e-6


def test_two_runs_cannot_share_a_state(formats: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with locked(state), pytest.raises(OutputError, match="another run is writing it"):
        measure(formats, gguf(formats, "F16"), gguf(formats, "Q8_0"), state=state)


def test_a_folder_of_gguf_files_is_as_many_candidates(formats: Path) -> None:
    asked = EvaluationRequest(gguf(formats, "F16"), (str(formats / "gguf"),), formats / "text.txt")
    names = [model.name for model in prepare(asked).candidates]
    assert names == [f"{ASSET.name}-{kind}" for kind in ("F16", "Q4_K_M", "Q8_0")]


def test_what_transformers_does_not_load_is_decoded(
    formats: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The decoded weights are in memory alone when it has loaded them."""
    packed = open_folder(formats / "fp8")
    wide = replace(packed, config=replace(packed.config, dtype="F32"))
    decoded = write(make_plan(wide, load_recipe("bf16")), tmp_path / "bf16")
    ids = list(range(1, 9))
    whole = TorchModel(decoded.out, exact=True)
    assert not whole.decoded
    expected = whole.logits(ids)
    monkeypatch.setattr(CODECS["fp8"], "loads", False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "bf16"))
    before = sorted(decoded.out.iterdir())
    model = TorchModel(formats / "fp8", exact=True)
    assert model.decoded
    assert model.missing == []
    assert (model.logits(ids) == expected).all()
    assert sorted(decoded.out.iterdir()) == before


def test_transformers_computes_in_float32(formats: Path) -> None:
    for name, kept in (("nf4", {"torch.uint8"}), ("fp8", set())):
        model = TorchModel(formats / name, exact=True).model
        dtypes = {str(part.dtype) for part in model.parameters()}
        assert dtypes - kept == {"torch.float32"}
        layers = [m for m in model.modules() if hasattr(m, "compute_dtype")]
        assert all(str(layer.compute_dtype) == "torch.float32" for layer in layers)
        assert bool(layers) == (name == "nf4")


def test_tokens_are_those_of_llama_cpp(formats: Path, tmp_path: Path) -> None:
    text = tmp_path / "special.txt"
    text.write_text((formats / "text.txt").read_text() + "<|im_end|> <think> wörld\n\n")
    chunks = {
        base: prepare(EvaluationRequest(base, text=text, context=64)).chunks.ids.tolist()
        for base in (str(ASSET), gguf(formats, "F16"))
    }
    first, second = chunks.values()
    assert first == second
    with Llama(Path(gguf(formats, "F16")), vocabulary_only=True) as llama:
        whole = llama.encode(text.read_text()[:-1], special=False)  # one newline is dropped
    assert list(chain(*first)) == whole[: len(whole) // 64 * 64]


@pytest.mark.parametrize("place", [0, 700, 4025])
def test_other_tokens_are_refused(formats: Path, tmp_path: Path, place: int) -> None:
    changed = Path(shutil.copytree(formats / "nf4", tmp_path / "changed"))
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    added = tokenizer["added_tokens"]
    if place < len(vocabulary):
        name = next(token for token, i in vocabulary.items() if i == place)
        vocabulary[f"{name}x"] = vocabulary.pop(name)
    else:
        added[-1]["content"] = "<|other|>"
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"token \d+ is .* as in qwen3.5-tiny; only models with"):
        prepare(EvaluationRequest(str(ASSET), (str(changed),), formats / "text.txt"))


def test_names_of_candidates_and_simulations_are_distinct(formats: Path, tmp_path: Path) -> None:
    """Whatever folders are called; what config.json says of inputs otherwise has no column."""
    first = Path(shutil.copytree(formats / "fp8", tmp_path / "a" / "m"))
    folders = [first, tmp_path / "a" / "m (inputs quantized)", tmp_path / "b" / "m"]
    for folder in folders[1:]:
        shutil.copytree(first, folder)
    request = EvaluationRequest(str(ASSET), tuple(map(str, folders)), formats / "text.txt")
    job = prepare(request)
    names = [model.name for model in job.candidates]
    assert names == ["a/m", "m (inputs quantized)", "b/m"]
    names += [model.name for model in job.simulations]
    assert len(set(names)) == 6
    job = prepare(replace(request, candidates=tuple(map(str, folders[:2]))))
    assert [model.name for model in job.candidates] == ["m", "a/m (inputs quantized)"]
    unknown = replace(job.candidates[0], unknown_inputs=True)
    assert replace(job, candidates=(unknown,)).simulations == ()


def test_any_artifact_alone_has_its_perplexity(everything: EvaluationReport, formats: Path) -> None:
    """The same as in the table with the original, and a sentence on what that does not say."""
    found = {row.model.path: row.comparison.perplexity for row in everything.candidates}
    for path in (formats / "fp8", Path(gguf(formats, "Q4_K_M"))):
        report = measure(formats, str(path))
        assert report.base_perplexity == found[path]
        assert [row[0] for row in report.table[1]] == ["PPL", "Bytes"]
        assert sum("perplexity only" in note for note in notes(report)) == 1
        assert any("inputs of its layers" in note for note in notes(report)) == ("fp8" in str(path))
    assert not any("alone" in note for note in notes(measure(formats, gguf(formats, "F16"))))


def test_another_vocabulary_is_refused(formats: Path, tmp_path: Path) -> None:
    other = make_variant(tmp_path, "dense")
    with pytest.raises(InputError, match="a vocabulary of 512, expected 4096 as in qwen3.5-tiny"):
        prepare(EvaluationRequest(str(ASSET), (str(other),), formats / "text.txt"))


@pytest.mark.parametrize(
    ("base", "candidates", "options", "message"),
    [
        ("nf4", ("text",), {}, "stored as NF4, expected a checkpoint in bf16"),
        ("gguf/qwen3.5-tiny-Q8_0.gguf", ("text",), {}, "stored as Q8_0"),
        ("nf4", (), {"cache": Path("a")}, "stored as NF4"),
        ("gguf", (), {}, "3 models in it"),
        ("text", ("nf4", "nf4"), {}, "given twice"),
        ("text", ("nowhere",), {}, "no such folder"),
        ("text", (), {"text": None}, "--text: missing"),
        ("text", (), {"text": Path("/nowhere.txt")}, "cannot be read"),
        ("text", (), {"context": 100_000}, "tokens, expected at least 200000, two chunks"),
        ("text", ("nf4",), {"unquantized": "text"}, "leave it out"),
        ("text", ("nf4",), {"memory": 10**6}, "--memory 1.00 MB: too little, expected at least"),
        ("text", (), {"cache": Path("a"), "kld_file": Path("b")}, "one of them is enough"),
    ],
)
def test_refusals(
    formats: Path,
    base: str,
    candidates: tuple[str, ...],
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(formats)
    before = sorted(formats.rglob("*"))
    asked = {"text": formats / "text.txt", **options}
    with pytest.raises((InputError, UsageError)) as raised:
        prepare(EvaluationRequest(base, candidates, **asked))
    assert message in str(raised.value)
    assert sorted(formats.rglob("*")) == before


def test_text_that_is_no_text(formats: Path, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 3\)"):
        prepare(EvaluationRequest(str(ASSET), text=tmp_path / "x"))


@pytest.mark.parametrize(
    ("value", "count", "message"),
    [
        (np.nan, 4, "broken: computes NaN or infinity in chunk 1"),
        (1e3, None, r"broken: a mean loss of \S+ nats a token, expected"),
    ],
)
def test_a_candidate_that_computes_no_sound_loss_is_named(
    value: float, count: int | None, message: str, formats: Path, tmp_path: Path
) -> None:
    path = tmp_path / "broken.gguf"
    shutil.copy(gguf(formats, "F16"), path)
    entry = read_container(path).tensors["output_norm.weight"]
    with path.open("r+b") as file:
        file.seek(entry.begin)
        file.write(np.full(count or entry.shape, value, "<f4").tobytes())
    with pytest.raises(InputError, match=message):
        measure(formats, gguf(formats, "F16"), str(path))


KINDS = [{}, {"kld_file": "kept.kld"}, {"cache": "kept.cache"}]


@pytest.mark.parametrize("kept", KINDS, ids=["plain", "kld", "cache"])
def test_an_interrupted_run_goes_on_where_it_was(
    formats: Path, tmp_path: Path, kept: dict[str, str]
) -> None:
    base, candidate, state = gguf(formats, "F16"), gguf(formats, "Q4_K_M"), tmp_path / "state"

    def go(folder: str, watched: Interrupting, state: Path | None) -> EvaluationReport:
        (tmp_path / folder).mkdir(exist_ok=True)
        files = {key: tmp_path / folder / name for key, name in kept.items()}
        return measure(formats, base, candidate, chunks=4, state=state, progress=watched, **files)

    whole = go("whole", Interrupting(), None)
    with pytest.raises(KeyboardInterrupt):
        go("parts", Interrupting(3), state)
    assert state.exists()
    assert not any(tmp_path.glob("parts/[!.]*"))
    state.write_bytes(state.read_bytes()[:-100])  # the third chunk was not whole on the disk
    rest = Interrupting()
    resumed = go("parts", rest, state)
    assert rest.run == ["chunk 3", "chunk 4"]
    assert resumed.to_json() == whole.to_json()
    assert not state.exists()
    for name in kept.values():
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == sorted(kept.values())


def test_a_state_of_another_run_is_not_used(formats: Path, tmp_path: Path) -> None:
    base, state = gguf(formats, "F16"), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        measure(formats, base, gguf(formats, "Q4_K_M"), progress=Interrupting(1), state=state)
    watched = Interrupting()
    report = measure(formats, base, gguf(formats, "Q8_0"), progress=watched, state=state)
    assert len(watched.run) == CHUNKS
    assert means(report)[f"{ASSET.name}-Q8_0"] < 1e-3


def test_the_file_of_the_noise_floor_is_removed(
    formats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    models, state = (str(ASSET), gguf(formats, "Q8_0")), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        measure(formats, *models, progress=Interrupting(1), state=state)
    assert not list(tmp_path.glob("qwen35-*"))
    assert state.exists()
    rest = Interrupting()
    report = measure(formats, *models, progress=rest, state=state)
    assert rest.run == ["chunk 2"]
    assert report.floors[0].comparison.kld.value < 1e-5
    assert not list(tmp_path.glob("qwen35-*"))
    assert not state.exists()


def test_speed_against_the_unquantized_file(formats: Path) -> None:
    report = measure(formats, gguf(formats, "F16"), gguf(formats, "Q8_0"), chunks=1, speed=True)
    speed = report.candidates[0].speed
    assert speed is not None
    assert min(speed.prompt, speed.generation, speed.prompt_ratio, speed.generation_ratio) > 0
    assert "Prompt, tokens/s" in report_text(report)
    with pytest.raises(UsageError, match="no candidate is a GGUF file"):
        measure(formats, str(ASSET), str(formats / "nf4"), chunks=1, speed=True)


_PEAK = """
import sys
from pathlib import Path
from qwen35.evaluation.evaluation_run import run
from qwen35.evaluation.evaluation_job import EvaluationRequest, prepare
base, text, *candidates = sys.argv[1:]
job = prepare(EvaluationRequest(base, tuple(candidates), Path(text), threads=1, chunks=2))
run(job)
status = Path("/proc/self/status").read_text()
print(job.memory, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.parametrize("base", ["gguf", "checkpoint"])
def test_peak_memory_is_what_is_stated(formats: Path, base: str) -> None:
    candidates = [gguf(formats, "Q4_K_M"), gguf(formats, "Q8_0")]
    given = gguf(formats, "F16") if base == "gguf" else str(ASSET)
    if base == "checkpoint":
        candidates.append(str(formats / "nf4"))
    command = [sys.executable, "-W", "ignore", "-c", _PEAK, given, str(formats / "text.txt")]
    done = subprocess.run([*command, *candidates], capture_output=True, text=True, check=True)
    stated, peak = map(int, done.stdout.split()[-2:])
    assert peak <= stated < 4 * peak


def evaluate_cli(*more: str) -> int:
    return main(["evaluate", "--threads", "1", "--device", "cpu", "--quiet", *more])


def test_the_verb(formats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [gguf(formats, "F16"), gguf(formats, "Q8_0"), "--text", str(formats / "text.txt")]
    assert evaluate_cli(*shared, "--chunks", "2") == 0
    text = capsys.readouterr().out
    for name in ("Mean KLD", "Maximum KLD", "99.9% KLD", "Median KLD", "0.1% KLD", "RMS Δp"):
        assert f"\n{name}" in text
    assert evaluate_cli(*shared, "--chunks", "2", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["tokens"]["scored"] == 510
    assert value["candidates"][0]["figures"]["kld"]["value"] > 0
    assert value["base"]["plan"] == json.loads((formats / "gguf/qwen35.json").read_text())["plan"]


def test_a_dry_run_touches_nothing(
    formats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [str(ASSET), gguf(formats, "Q8_0"), "--text", str(formats / "text.txt"), "--dry-run"]
    files = ["--kl-divergence-base", str(tmp_path / "x.kld"), "--resume", str(tmp_path / "state")]
    assert evaluate_cli(*shared, *files, "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["chunks"] > 10
    rows = planned["chunks"] * 255
    expected = 20 + planned["chunks"] * 512 * 4 + rows * (4096 + 4) * 2
    assert planned["writes"] == {str(tmp_path / "x.kld"): expected}
    assert planned["temporary_bytes"] > 0
    assert evaluate_cli(*shared, *files) == 0
    assert "peak memory at most about" in capsys.readouterr().out
    assert planned["simulations"] == []
    assert evaluate_cli(shared[0], str(formats / "fp8"), *shared[2:]) == 0
    line = "  fp8 (inputs quantized): simulated, E4M3, each token in groups of 128\n"
    assert line in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for more in ([], shared[-1:]):
        assert evaluate_cli(*shared[:-1], *more, "--resume", str(formats / "text.txt")) == 2
        assert "text.txt: not a file of this kind" in capsys.readouterr().err


def test_progress_counts_chunks(formats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [gguf(formats, "F16"), "--text", str(formats / "text.txt"), "--chunks", "2"]
    assert main(["evaluate", *shared, "--threads", "1"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if not line.startswith("compiling")] == ["evaluating: 2 chunks"]


def test_refusals_are_sentences(formats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = str(formats / "nf4"), str(formats / "text")
    assert evaluate_cli(*models, "--text", str(formats / "text.txt")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nf4: stored as NF4")
    assert error.count("\n") == 1
