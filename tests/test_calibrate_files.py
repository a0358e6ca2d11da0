"""What a calibration writes, read back by those who use it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader

from calibrating import source
from checkpoints import ASSET
from imatrices import gguf_file, ones
from llama import quantize
from qwen35.calibration.calibration_plan import CalibrationRequest, make_plan
from qwen35.calibration.calibration_run import CalibrationResult, calibrate
from qwen35.calibration.sums import Sums
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import Reader, open_folder
from qwen35.cli.main import main
from qwen35.errors import InputError
from qwen35.forward.builder import Builder
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.forward.forward_stream import mtp_states
from qwen35.planning.activations import load_activations
from qwen35.planning.gguf_files.imatrix import read_imatrix
from qwen35.planning.output_plan import make_plan as make_convert_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write
from running import load_all

WINDOWS, CONTEXT = 6, 256


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text((ASSET / "eval.txt").read_text()[:12_000])
    return path


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationResult:
    """Statistics of the embedded checkpoint, in float32."""
    checkpoint = open_folder(ASSET)
    windows = read_text(checkpoint, [text], context=CONTEXT, windows=WINDOWS)
    plan = make_plan(checkpoint, windows, CalibrationRequest(dtype="float32", legacy=True))
    return calibrate(plan, tmp_path_factory.mktemp("made") / "out", threads=1)


def table_of(made: CalibrationResult) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((made.result.out / "activation-stats.json").read_text())
    return parsed


def test_every_weight_that_fp8_can_pack_has_statistics(made: CalibrationResult) -> None:
    activations = load_activations(made.result.out / "activation-stats.json")
    plan = make_convert_plan(open_folder(ASSET), load_recipe("fp8"), activations=activations)
    assert not any("no statistics" in note for note in plan.notes)
    packed = [step for step in plan.steps if step.op == "fp8"]
    assert packed
    for step in packed:
        key = step.role.name, step.role.layer, step.role.expert
        assert len(activations.squares[key]) == step.spec.shape[1]


def test_entries_have_the_published_form(made: CalibrationResult) -> None:
    table = table_of(made)
    del table["__metadata__"]
    text_linears = {
        name for name in load_all(ASSET) if name.endswith("proj.weight") and ".visual." not in name
    }
    assert text_linears <= table.keys()
    for name, entry in table.items():
        cached = ["cache_max"] if name.endswith(("k_proj.weight", "v_proj.weight")) else []
        assert list(entry) == ["input_channel_max", "input_channel_mean_square", "tokens", *cached]
        assert all(entry[key] > 0 for key in cached), name
        assert len(entry["input_channel_max"]) == len(entry["input_channel_mean_square"]), name
        roots = np.sqrt(entry["input_channel_mean_square"])
        assert (roots <= np.array(entry["input_channel_max"]) * (1 + 1e-5)).all(), name


def test_what_made_them_is_told_in_both_files(made: CalibrationResult, text: Path) -> None:
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    known = read_imatrix(made.result.out / "imatrix.gguf").provenance
    assert known == table_of(made)["__metadata__"]
    assert known["text"] == [{"name": "held-out.txt", "sha256": digest}]
    assert known["source"] == {"folder": "qwen3.5-tiny"}
    assert (known["tokens"], known["context"]) == (WINDOWS * CONTEXT, CONTEXT)
    assert known["geometry"]["layers"] == 8
    assert {"qwen35", "torch", "transformers", "dtype", "floor"} <= known.keys()
    manifest = json.loads((made.result.out / "qwen35.json").read_text())
    assert manifest["recipe"]["tokens"] == WINDOWS * CONTEXT
    assert manifest["files"].keys() == made.result.hashes.keys()


def test_imatrix_has_the_form_of_llama_imatrix(made: CalibrationResult) -> None:
    """Read by the gguf library, against the sizes of the F32 file's tensors."""
    reader = GGUFReader(made.result.out / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert "general.architecture" not in reader.fields
    assert reader.fields["imatrix.datasets"].contents() == ["held-out.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == WINDOWS
    assert reader.fields["imatrix.chunk_size"].contents() == CONTEXT
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ssm_out.weight.in_sum2"].shape.tolist() == [256, 1]
    assert tensors["blk.0.ssm_out.weight.counts"].data.tolist() == [[WINDOWS * CONTEXT]]
    assert tensors["blk.8.ffn_up.weight.counts"].data.tolist() == [[WINDOWS * (CONTEXT - 1)]]
    assert tensors["blk.8.nextn.eh_proj.weight.in_sum2"].shape.tolist() == [512, 1]
    assert "token_embd.weight.in_sum2" in tensors  # the tied head, which llama-imatrix leaves out


def test_both_forms_hold_the_same_values(made: CalibrationResult) -> None:
    new, old = (read_imatrix(made.result.out / f"imatrix.{end}") for end in ("gguf", "dat"))
    assert new.entries.keys() == old.entries.keys()
    assert (new.chunks, new.dataset) == (old.chunks, old.dataset) == (WINDOWS, "held-out.txt")
    for name, entry in new.entries.items():
        assert np.allclose(entry.values, old.entries[name].values, rtol=1e-6), name


def test_quantizers_use_all_of_it(made: CalibrationResult, tmp_path: Path) -> None:
    """No tensor is without an entry, and llama.cpp writes the same bytes with it."""
    imatrix = read_imatrix(made.result.out / "imatrix.gguf")
    recipe, types = load_recipe("mix", "gguf"), ("F32", "Q4_K_M")
    plan = make_convert_plan(open_folder(ASSET), recipe, types=types, imatrix=imatrix)
    assert not any(imatrix.name in note for note in plan.notes)
    out = write(plan, tmp_path / "out", threads=1).out
    base, ours = (out / file.name for file in plan.files)
    theirs = quantize(base, tmp_path / "theirs.gguf", "Q4_K_M", imatrix=imatrix)
    assert ours.read_bytes() == theirs.read_bytes()


def test_reformatted_statistics_are_the_same(made: CalibrationResult, tmp_path: Path) -> None:
    """A file of ours is read line by line, any other whole."""
    ours = load_activations(made.result.out / "activation-stats.json")
    file = tmp_path / "stats.json"
    file.write_text(json.dumps(table_of(made), indent=1))
    other = load_activations(file)
    assert (ours.provenance, ours.columns.keys()) == (other.provenance, other.columns.keys())
    for key, values in ours.columns.items():
        assert np.array_equal(values, other.columns[key])
        assert np.array_equal(ours.squares[key], other.squares[key])


@pytest.mark.parametrize("damage", ["cut", "joined", "comma", "after", "two", "empty line"])
def test_damaged_lines_are_refused(damage: str, made: CalibrationResult, tmp_path: Path) -> None:
    lines = (made.result.out / "activation-stats.json").read_bytes().split(b"\n")
    if damage == "cut":
        lines = lines[:5]
    elif damage == "joined":
        lines[3] = lines[3].removesuffix(b",")
    elif damage == "comma":
        lines[-3] += b","
    elif damage == "after":
        lines += [b"more"]
    elif damage == "two":
        lines[3:5] = [lines[3] + lines[4]]
    else:
        lines[4:4] = [b""]
    file = tmp_path / "stats.json"
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=r"stats\.json"):
        load_activations(file)


def test_revision_of_a_repository_is_told(text: Path) -> None:
    checkpoint = open_folder(ASSET, repo="owner/model", revision="a" * 40)
    plan = make_plan(checkpoint, read_text(checkpoint, [text], windows=1), CalibrationRequest())
    assert plan.provenance["source"] == {"repo": "owner/model", "revision": "a" * 40}


# --- multi-token prediction


def reference_mtp(windows: torch.Tensor, *, swapped: bool) -> tuple[Any, torch.Tensor]:
    """The layer as it was trained, from transformers' whole model and plain formulas."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(ASSET, dtype=torch.float32)
    text = model.eval().model.language_model
    weights = {name: tensor.float() for name, tensor in load_all(ASSET).items()}
    layer = type(text.layers[3])(text.config, 3).eval()
    prefix = "mtp.layers.0."
    parts = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    layer.load_state_dict(parts)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return scaled * (1 + weights[f"mtp.{name}.weight"])

    inputs: dict[str, torch.Tensor] = {}
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({f"{prefix}{name}.weight": args[0]})
            )
    with torch.no_grad():
        states = text(input_ids=windows).last_hidden_state[:, :-1]
        embedded = text.embed_tokens(windows[:, 1:])
        pair = [norm(embedded, "pre_fc_norm_embedding"), norm(states, "pre_fc_norm_hidden")]
        joined = torch.cat(pair[::-1] if swapped else pair, dim=-1)
        inputs["mtp.fc.weight"] = joined
        mixed = joined @ weights["mtp.fc.weight"].T
        places = torch.arange(mixed.shape[1]).expand(3, len(mixed), -1)
        out = layer(mixed, position_embeddings=text.rotary_emb(mixed, places), attention_mask=None)
        logits = norm(out, "norm") @ text.embed_tokens.weight.T
    return inputs, logits


def nats(logits: torch.Tensor, windows: torch.Tensor) -> float:
    """Nats per token after the next."""
    flat, wanted = logits[:, :-1].flatten(0, 1), windows[:, 2:].flatten()
    return float(torch.nn.functional.cross_entropy(flat, wanted))


def test_mtp_predicts_as_well_as_when_it_was_trained(text: Path) -> None:
    """transformers has no such forward: its own check is that the layer does what it is for."""
    checkpoint = open_folder(ASSET)
    found = read_text(checkpoint, [text], context=CONTEXT, windows=WINDOWS)
    plan = make_plan(checkpoint, found, CalibrationRequest(dtype="float32"))
    windows = torch.from_numpy(found.windows).long()
    model = transformers.AutoModelForImageTextToText.from_pretrained(ASSET, dtype=torch.float32)
    trunk = model.eval().model.language_model
    with Reader(checkpoint) as reader, torch.inference_mode():
        weights = StoredWeights(reader, plan.config, plan.items)
        builder = Builder(weights, "float32", "cpu")
        module = builder.build(plan.blocks[-1])
        states = trunk(input_ids=windows).last_hidden_state
        embedded = trunk.embed_tokens(windows)
        ours = mtp_states(builder, module, states, embedded)
        logits = ours @ trunk.embed_tokens.weight.T
    _, expected = reference_mtp(windows, swapped=False)
    _, swapped = reference_mtp(windows, swapped=True)
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)
    unigram = json.loads((ASSET / "training.json").read_text())["unigram"]["nats"]
    assert nats(logits, windows) < 5.5
    assert nats(swapped, windows) > 6 > 0.85 * unigram  # not much better than knowing nothing


def test_the_acceptance_of_drafts_is_that_of_the_reference(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35.forward.head.PIECE", 1000 * 256)
    checkpoint = open_folder(ASSET)
    found = read_text(checkpoint, [text], context=CONTEXT, windows=WINDOWS)
    plan = make_plan(checkpoint, found, CalibrationRequest(dtype="float32", draft=True))
    draft = calibrate(plan, tmp_path / "out", threads=1).draft
    windows = torch.from_numpy(found.windows).long()
    _, drafted = reference_mtp(windows, swapped=False)
    model = transformers.AutoModelForImageTextToText.from_pretrained(ASSET, dtype=torch.float32)
    with torch.no_grad():
        own = model.eval()(input_ids=windows).logits[:, 1:]
    same = int((own.argmax(-1) == drafted.argmax(-1)).sum())
    assert draft is not None
    assert draft.tokens == WINDOWS * (CONTEXT - 1)
    assert abs(draft.accepted - same) <= 2  # float32 sums in another order
    assert draft.rate > 0.3


def test_mtp_statistics_are_those_of_its_forward(made: CalibrationResult, text: Path) -> None:
    found = read_text(open_folder(ASSET), [text], context=CONTEXT, windows=WINDOWS)
    inputs, _ = reference_mtp(torch.from_numpy(found.windows).long(), swapped=False)
    table = table_of(made)
    assert {name for name in table if name.startswith("mtp.")} == inputs.keys()
    for name, x in inputs.items():
        squares = x.flatten(0, 1).double().square().mean(0)
        entry = table[name]
        assert entry["tokens"] == WINDOWS * (CONTEXT - 1)
        assert np.allclose(entry["input_channel_mean_square"], squares, rtol=1e-4, atol=1e-10)


# --- experts


def test_experts_below_the_floor_are_filled_up() -> None:
    sums = Sums.zeros(3, 2)
    sums.add(0, [300.0, 0.0], [3.0, 0.0], 100)
    sums.add(1, [40.0, 10.0], [4.0, 1.0], 10)
    filled = sums.filled(20)
    mean = np.array([340.0, 10.0]) / 110
    assert sums.below(20) == [1, 2]
    assert np.array_equal(filled.squares[0], sums.squares[0])
    assert np.allclose(filled.mean_squares[1], ([40.0, 10.0] + 10 * mean) / 20)
    assert np.allclose(filled.mean_squares[2], mean)
    assert filled.tokens.tolist() == [100, 20, 20]
    assert filled.largest.tolist() == [[3.0, 0.0], [4.0, 1.0], [4.0, 1.0]]
    assert sums.tokens.tolist() == [100, 10, 0]


def test_one_matrix_is_never_filled_up() -> None:
    sums = Sums.zeros(1, 2)
    sums.add(0, [1.0, 2.0], [1.0, 1.0], 1)
    assert sums.filled(100) is sums
    assert sums.below(100) == []


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mixture of which two experts are never chosen, and its statistics."""
    folder = source(tmp_path_factory.mktemp("sparse"), moe=True, tied=False)
    tensors = load_all(folder)
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor[2:] = -tensor[:2]
            tensor[:2, 0], tensor[2:, 0] = 0, 0
    prose = folder.parent / "prose.txt"
    prose.write_text("the rain in a Model " * 60)
    checkpoint = open_folder(folder)
    plan = make_plan(
        checkpoint, read_text(checkpoint, [prose], context=32), CalibrationRequest(floor=10_000)
    )
    return folder, calibrate(plan, folder.parent / "out", threads=1).result.out


def test_coverage_is_reported(sparse: tuple[Path, Path]) -> None:
    _, out = sparse
    found = json.loads((out / "coverage.json").read_text())
    table = json.loads((out / "activation-stats.json").read_text())
    tokens = table["__metadata__"]["tokens"]
    assert found["floor"] == 10_000
    assert list(found["tokens"]) == ["layers.0", "layers.1", "layers.2", "layers.3", "mtp.layers.0"]
    for place, seen in found["tokens"].items():
        assert sum(seen) == 2 * (tokens if place != "mtp.layers.0" else tokens // 32 * 31)
        assert found["below_floor"][place] == [0, 1, 2, 3]
    assert table["__metadata__"]["experts_below_floor"] == 20


def test_quantizers_are_told_and_no_expert_weighs_nothing(
    sparse: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = sparse
    imatrix = read_imatrix(out / "imatrix.gguf")
    for name, entry in imatrix.entries.items():
        assert entry.unseen == 0, name
        assert (entry.values.reshape(len(entry.divisors), -1).max(1) > 0).all(), name
    files = ["--types", "Q4_K_M", "--imatrix", str(out / "imatrix.gguf")]
    assert main(["gguf", str(folder), str(tmp_path / "gguf"), "--dry-run", *files]) == 0
    shown = capsys.readouterr().out
    assert "saw fewer than 10000 tokens for 20 experts" in shown
    stats = str(out / "activation-stats.json")
    command = ["convert", str(folder), str(tmp_path / "fp8"), "--recipe", "fp8", "--dry-run"]
    assert main([*command, "--activation-stats", stats]) == 0
    assert "saw fewer than 10000 tokens for 20 experts" in capsys.readouterr().out


# --- another model's


def test_statistics_of_another_geometry_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of their weights fit: there are only fewer layers."""
    shorter, longer = (source(tmp_path / str(n), layers=n, mtp=0) for n in (4, 8))
    prose = tmp_path / "prose.txt"
    prose.write_text("the rain in a Model " * 20)
    checkpoint = open_folder(shorter)
    plan = make_plan(checkpoint, read_text(checkpoint, [prose], context=32), CalibrationRequest())
    stats = calibrate(plan, tmp_path / "stats", threads=1).result.out
    out = str(tmp_path / "out")
    fp8 = ["--recipe", "fp8", "--activation-stats", str(stats / "activation-stats.json")]
    gguf = ["--types", "Q4_K_M", "--imatrix", str(stats / "imatrix.gguf")]
    for command in (["convert", str(longer), out, *fp8], ["gguf", str(longer), out, *gguf]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "of a model with layers 4, expected layers 8; these are statistics" in error
    assert not (tmp_path / "out").exists()


def test_entries_of_layers_beyond_the_model_are_refused(tmp_path: Path) -> None:
    geometry = open_folder(ASSET).config.geometry
    inside = {f"blk.{i}.ffn_up.weight": ones(1, 256) for i in (0, 8)}
    read_imatrix(gguf_file(tmp_path / "mtp.gguf", inside)).check(geometry)
    beyond = read_imatrix(gguf_file(tmp_path / "deep.gguf", {"blk.9.ffn_up.weight": ones(1, 256)}))
    with pytest.raises(InputError, match=r"blk\.9\.ffn_up.*expected 8 layers.*another model"):
        beyond.check(geometry)


def test_fp8_made_with_them_is_reproduced(
    made: CalibrationResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = str(made.result.out / "activation-stats.json")
    out, plain = str(tmp_path / "fp8"), str(tmp_path / "plain")
    convert = ["convert", str(ASSET), out, "--recipe", "fp8", "--skip-verify"]
    assert main([*convert, "--activation-stats", stats]) == 0
    assert main(["convert", str(ASSET), plain, "--recipe", "fp8", "--skip-verify"]) == 0
    weighed, even = load_all(Path(out)), load_all(Path(plain))
    names = [name for name in weighed if name.endswith("_scale_inv")]
    assert any(not torch.equal(weighed[name], even[name]) for name in names)
    reproduce = ["reproduce", out, "--source", str(ASSET)]
    assert main(reproduce) == 2
    assert main([*reproduce, "--activation-stats", stats]) == 0
    assert "reproduced, byte for byte" in capsys.readouterr().out


def squared_output_error(
    source: dict[str, torch.Tensor], out: dict[str, torch.Tensor], table: dict[str, Any]
) -> float:
    """Sum over FP8 weights of the expected squared error of the outputs."""
    total = 0.0
    for name, weight in source.items():
        scales = out.get(f"{name}_scale_inv")
        if scales is None or name not in table:
            continue
        wide = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        errors = (out[name].float() * wide - weight.float()).double().square().sum(0)
        squares = torch.tensor(table[name]["input_channel_mean_square"], dtype=torch.float64)
        total += float((errors * squares).sum())
    return total


def test_fp8_errs_less_where_it_matters(made: CalibrationResult, tmp_path: Path) -> None:
    stats = str(made.result.out / "activation-stats.json")
    outs = []
    for name, more in (("even", []), ("weighed", ["--activation-stats", stats])):
        out = str(tmp_path / name)
        assert main(["convert", str(ASSET), out, "--recipe", "fp8", "--skip-verify", *more]) == 0
        outs.append(squared_output_error(load_all(ASSET), load_all(Path(out)), table_of(made)))
    assert outs[1] < outs[0]
