"""NVFP4 with its scales, MXFP4 and Q2_0 in GGUF: bytes, values, llama.cpp, faults."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter

from checkpoints import ASSET
from gguf_models import make_variant, rewrite_gguf
from qwen35.array_types import F32, U8
from qwen35.checkpoint.gguf_header import read_container, weights_of
from qwen35.checkpoint.locations import LocalFolder
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import FolderReader, open_folder
from qwen35.cli.main import main
from qwen35.codecs.ggml.library import find_library, open_library
from qwen35.codecs.ggml.quantizers import encode
from qwen35.codecs.ggml.scaled import scale_of
from qwen35.codecs.ggml.stored import decode
from qwen35.codecs.ggml.types import ENCODABLE, GGML_TYPES
from qwen35.codecs.registry import codec_of
from qwen35.engines.llama import Llama
from qwen35.errors import TensorError, UsageError
from qwen35.planning.gguf_files.gguf_plan import files_of
from qwen35.planning.gguf_files.type_patterns import pattern_rules
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.tensors import TensorSpec
from qwen35.tuning.space import ChoiceSpace
from qwen35.verification.opening import open_artifact
from qwen35.verification.verdict import Verdict, verify
from qwen35.writing.write import write

pytestmark = pytest.mark.sentences

ALL = ("token_embd=f32", "weight=nvfp4")


def plan_of(source: Path, *lines: str, types: tuple[str, ...] = ("Q4_K_M",)) -> Plan:
    rules = pattern_rules(lines, [])
    recipe = load_recipe("mix", "gguf").preceded(rules)
    return make_plan(open_folder(source), recipe, types=types)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a mixture whose experts differ in size: 1, 2, 4 and 8 times."""
    from safetensors.torch import load_file, save_file

    folder = make_variant(tmp_path_factory.mktemp("scaled"), "moe")
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".mlp.experts." in name and tensor.ndim == 3:
            tensor *= (2 ** torch.arange(len(tensor)))[:, None, None]
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def files(moe: Path) -> dict[str, Path]:
    """Return the folders of a dense model and a mixture, in F32 and almost all in NVFP4."""
    out = moe.parent
    return {
        name: write(plan_of(source, *ALL, types=("F32", "Q4_K_M")), out / name, threads=2).out
        for name, source in (("dense", ASSET), ("moe", moe))
    }


def file(folder: Path, kind: str) -> Path:
    return next(folder.glob(f"*-{kind}.gguf"))


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def by_formula(data: U8, scales: F32) -> F32:
    """Decode NVFP4 [..., row bytes] with torch's E4M3; one scale, or one for each expert."""
    blocks = data.reshape(-1, 36)
    fine = torch.from_numpy(blocks[:, :4].copy()).view(torch.float8_e4m3fn).float().numpy()
    packed = blocks[:, 4:].reshape(-1, 4, 8)
    codes = np.concatenate([packed & 15, packed >> 4], axis=2)
    values = _E2M1[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))
    values = (values * fine[:, :, None]).reshape(len(scales), -1)
    decoded: F32 = values * scales[:, None]
    return decoded


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_blocks_are_ggmls_of_the_weights_over_their_scale(
    name: str, files: dict[str, Path]
) -> None:
    stored, exact = (tensors(file(files[name], kind)) for kind in ("Q4_K_M", "F32"))
    container = read_container(file(files[name], "Q4_K_M"))
    packed = [tensor for tensor in container.tensors.values() if tensor.kind.name == "nvfp4"]
    assert len(packed) > 40
    assert ("output.weight" in exact) == ("output.scale" in stored)
    with FolderReader(files[name], LocalFolder(files[name]).stamps()) as reader:
        held = {weight.name: weight for weight in weights_of(container)}
        for tensor in packed:
            experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
            weights = exact[tensor.name].reshape(experts, -1)
            scales = stored[scale_name(tensor.name)]
            expected = np.abs(weights).max(axis=1) / np.float32(2688)
            assert np.array_equal(scales, expected)
            rows = (weights / scales[:, None]).reshape(-1, tensor.shape[-1])
            data = stored[tensor.name]
            assert np.array_equal(data.reshape(-1), open_library().quantize(rows, "nvfp4", None))
            assert (
                data.reshape(experts, -1, 36)[:, :, :4].max(axis=(1, 2)).tolist()
                == [0x7E] * experts
            )
            found = np.empty(weights.size, np.float32)
            weight = held[tensor.name]
            spec = TensorSpec(tensor.name, "F32", tensor.shape)
            codec_of(weight).open(reader, weight, spec).read_into(0, found)
            assert np.array_equal(found, by_formula(data, scales).reshape(-1))
            assert np.abs(found - weights.reshape(-1)).mean() < 0.13 * np.abs(weights).mean()
            part = np.empty(weights.size // 2, np.float32)  # of three experts
            begin = weights.size // 4 + 7
            codec_of(weight).open(reader, weight, spec).read_into(begin, part)
            assert np.array_equal(part, found[begin : begin + part.size])


def test_a_scale_of_nothing_and_of_next_to_nothing() -> None:
    assert scale_of(np.float32(0)) == 1
    assert scale_of(np.float32(2688)) == 1
    assert scale_of(np.float32(1e-44)) == np.finfo(np.float32).tiny


@pytest.mark.parametrize("kind", ["q1_0", "q2_0", "mxfp4", "nvfp4"])
def test_blocks_decode_as_in_ggml(kind: str) -> None:
    size = GGML_TYPES[kind]
    data = np.random.default_rng(1).integers(0, 256, (500, size.nbytes)).astype(np.uint8)
    if kind in ("q1_0", "q2_0"):
        data[:, 1] &= 0xBB  # no infinity
    elif kind == "mxfp4":
        data[:, 0] %= 250
    expected = np.empty(500 * size.block, np.float32)
    path = find_library()
    assert path is not None
    function = getattr(ctypes.CDLL(str(path)), f"dequantize_row_{kind}")
    function.argtypes, function.restype = [ctypes.c_void_p] * 2 + [ctypes.c_int64], None
    function(data.ctypes.data, expected.ctypes.data, expected.size)
    assert np.isfinite(expected).all()
    assert np.array_equal(decode(data, size).reshape(-1), expected)


def logits(path: Path, ids: list[int]) -> torch.Tensor:
    model = Llama(path)
    try:
        return torch.from_numpy(model.logits(ids))
    finally:
        model.close()


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence, in nats a token."""
    p, q = (torch.log_softmax(x.double(), dim=-1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_llama_computes_with_what_we_decode(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """What is left is the rounding of activations to 8 bits."""
    packed, exact = (file(files[name], kind) for kind in ("Q4_K_M", "F32"))
    ids = torch.randint(0, 250, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    reference = logits(decoded(packed, exact, tmp_path), ids)
    assert 0 < divergence(reference, logits(packed, ids)) < 2e-3
    expert = read_container(packed).tensors[
        "blk.0.ffn_down_exps.scale" if name == "moe" else "blk.3.ffn_down.scale"
    ]
    broken = Path(shutil.copy(packed, tmp_path / "broken.gguf"))
    with broken.open("r+b") as stream:
        stream.seek(expert.begin)
        scales = np.frombuffer(stream.read(expert.nbytes), np.float32) / 2
        stream.seek(expert.begin)
        stream.write(scales.tobytes())
    assert divergence(reference, logits(broken, ids)) > 1e-2


def decoded(packed: Path, exact: Path, folder: Path) -> Path:
    """Write the F32 file with what a packed file decodes to."""
    out = Path(shutil.copy(exact, folder / "decoded.gguf"))
    container, places = read_container(packed), read_container(out).tensors
    with (
        FolderReader(packed.parent, LocalFolder(packed.parent).stamps()) as reader,
        out.open("r+b") as stream,
    ):
        for weight in weights_of(container):
            spec = TensorSpec(weight.name, "F32", weight.main.spec.shape)
            values = np.empty(spec.numel, np.float32)
            codec_of(weight).open(reader, weight, spec).read_into(0, values)
            stream.seek(places[weight.name].begin)
            stream.write(values.tobytes())
    return out


def test_every_type_that_is_written_is_read() -> None:
    for kind in map(GGML_TYPES.__getitem__, ENCODABLE):
        assert decode(np.zeros(2 * kind.nbytes, np.uint8), kind).size == 2 * kind.block, kind.name


@pytest.mark.parametrize("kind", ["mxfp4", "q2_0"])
def test_llama_loads_a_model_all_in_one_type(kind: str, tmp_path: Path) -> None:
    plan = plan_of(ASSET, f"weight={kind}", types=("F32", "Q3_K_M"))
    out = write(plan, tmp_path / "out", threads=2).out
    kinds = {tensor.kind.name for tensor in read_container(file(out, "Q3_K_M")).tensors.values()}
    assert kinds == {kind, "f32"}
    ids = list(range(64))
    reference = logits(decoded(file(out, "Q3_K_M"), file(out, "F32"), tmp_path), ids)
    assert 0 < divergence(reference, logits(file(out, "Q3_K_M"), ids)) < 1e-2
    verdict = verified(out, ASSET)
    assert verdict.findings == ()


# --- the plan


def test_what_llama_reads_no_scale_for_keeps_its_type() -> None:
    plan = plan_of(ASSET, "weight=nvfp4")
    [planned] = files_of(plan)
    other = {name: kind for name, kind in planned.kinds.items() if kind not in ("f32", "nvfp4")}
    plain = files_of(plan_of(ASSET))[0].kinds
    assert other == {name: plain[name] for name in other}
    assert {name for name in other if not name.startswith("blk.8.")} == {"token_embd.weight"}
    assert [note for note in plan.notes if "scale" in note] == [
        "nvfp4 needs scales, which llama.cpp does not read for token_embd.weight, "
        "blk.8.nextn.eh_proj.weight, blk.8.ffn_down.weight, blk.8.ffn_gate.weight and 5 more: they "
        "get the type that they would have without that rule"
    ]
    later = files_of(plan_of(ASSET, "weight=nvfp4", "token_embd=q8_0"))[0].kinds
    assert later["token_embd.weight"] == "q8_0"


def test_a_rule_for_what_llama_reads_no_scale_for_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        plan_of(ASSET, "token_embd=nvfp4")
    assert str(caught.value) == (
        "--tensor-type token_embd=nvfp4: token_embd.weight: nvfp4 needs a scale, which llama.cpp "
        "does not read for it, expected another type"
    )


def test_sizes_are_planned_with_scales(moe: Path) -> None:
    """Also those of types that another plan would choose, as `tune` asks for them."""
    for source in (ASSET, moe):
        scaled, plain = (files_of(plan_of(source, *lines))[0] for lines in (ALL, ()))
        assert plain.size_with(scaled.kinds) == scaled.nbytes
        assert scaled.size_with(plain.kinds) == plain.nbytes
        assert scaled.size_with(scaled.kinds) == scaled.nbytes


def test_tuning_knows_where_the_type_may_be(tmp_path: Path) -> None:
    space = ChoiceSpace(fetch(str(ASSET)), "gguf", ("q4_K", "nvfp4", "f16"))
    sizes = {unit.name: unit.sizes for unit in space.units}
    assert [name for name, row in sizes.items() if "nvfp4" not in row] == ["embed_tokens"]
    assert sizes["mlp.up_proj@0"]["nvfp4"] == 512 * 256 // 64 * 36 + 32
    chosen = {name: list(row)[1] for name, row in sizes.items()}
    made = space.make(chosen, tmp_path / "made", threads=2)
    assert space.size(chosen) == file(Path(made), "Q4_K_M").stat().st_size


def test_bytes_do_not_depend_on_pieces_and_threads(
    moe: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen35.codecs.pieces.PIECE", 37 * 256)
    again = write(plan_of(moe, *ALL), tmp_path / "out", threads=1).out
    assert file(again, "Q4_K_M").read_bytes() == file(files["moe"], "Q4_K_M").read_bytes()


def test_it_is_reproduced_and_inspected(
    moe: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", str(files["moe"]), "--source", str(moe), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(files["moe"]), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["parameters"] == second["parameters"]  # scales are none


# --- faults


def verified(folder: Path, source: Path | None = None) -> Verdict:
    checkpoint = open_folder(source) if source else None
    artifact = open_artifact(str(folder), "numbers")
    return verify(artifact, source=checkpoint, depth="numbers", threads=1)


def test_sound_files_pass(moe: Path, files: dict[str, Path]) -> None:
    verdict = verified(files["moe"], moe)
    assert verdict.findings == ()
    errors = [row.relative for row in verdict.errors if row.storage == "nvfp4"]
    assert len(errors) > 10
    assert 0.09 < min(errors) <= max(errors) < 0.12
    counted = sum(
        name.endswith(".scale") for name in read_container(file(files["moe"], "Q4_K_M")).tensors
    )
    assert counted > 40


def faulty(folder: Path, files: dict[str, Path], change: Callable[[GGUFWriter], object]) -> Path:
    """Return a folder with the packed file alone, changed and without its manifest."""
    source = file(files["moe"], "Q4_K_M")
    rewrite_gguf(source, folder / "x-Q4_K_M.gguf", "qwen35moe", change)
    return folder


def found(verdict: Verdict) -> list[tuple[str, str, str]]:
    return [
        (f.check, f.subject.removeprefix("x-Q4_K_M.gguf: "), f.message) for f in verdict.findings
    ]


def test_a_lost_scale_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        del writer.tensors[0]["blk.1.ffn_up_exps.scale"]

    message = "missing, but other nvfp4 tensors have theirs"
    assert found(verified(faulty(tmp_path, files, change))) == [
        ("tensors", "blk.1.ffn_up_exps.scale", message)
    ]


def test_without_any_scale_weights_are_wrong(
    moe: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    def change(writer: GGUFWriter) -> None:
        for name in [name for name in writer.tensors[0] if name.endswith(".scale")]:
            del writer.tensors[0][name]

    folder = faulty(tmp_path, files, change)
    assert found(verified(folder)) == []  # llama.cpp has no objection either
    verdict = verified(folder, moe)
    assert {finding.check for finding in verdict.findings} == {"bound"}
    assert len(verdict.findings) > 40


@pytest.mark.parametrize("factor", [0.5, 2, 0, -1])
def test_the_scale_of_one_expert_is_another(
    factor: float, moe: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    def change(writer: GGUFWriter) -> None:
        scales = writer.tensors[0]["blk.1.ffn_up_exps.scale"].tensor
        assert scales is not None
        scales[0] *= factor  # the smallest of four: a 64th of the squares

    [finding] = verified(faulty(tmp_path, files, change), moe).findings
    assert (finding.check, finding.subject) == ("bound", "x-Q4_K_M.gguf: blk.1.ffn_up_exps.weight")


def test_scales_of_another_shape_or_not_finite(files: dict[str, Path], tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        table = writer.tensors[0]
        scales = table.pop("blk.1.ffn_up_exps.scale").tensor
        assert scales is not None
        writer.add_tensor("blk.1.ffn_up_exps.scale", scales[:2])
        writer.add_tensor("token_embd.scale", scales[:1])
        broken = table["blk.2.ffn_up_exps.scale"].tensor
        assert broken is not None
        broken[3] = np.inf

    assert sorted(found(verified(faulty(tmp_path, files, change)))) == [
        ("decode", "blk.1.ffn_up_exps.scale", "f32 [2], expected f32 [4]"),
        ("decode", "blk.2.ffn_up_exps.weight", "a scale or weight is not finite"),
        ("tensors", "blk.1.ffn_up_exps.scale", "f32 [2], expected f32 [4]"),
        ("tensors", "token_embd.scale", "not a tensor that the keys imply"),
    ]


def test_a_file_of_another_tool_passes(moe: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """The converter writes a scale for activations as well."""

    def change(writer: GGUFWriter) -> None:
        writer.add_tensor("blk.1.ffn_up_exps.input_scale", np.ones(4, np.float32))

    assert found(verified(faulty(tmp_path, files, change), moe)) == []


def test_values_beyond_the_type_are_refused() -> None:
    with pytest.raises(TensorError, match="a value beyond the range of q2_0"):
        encode("a.weight", np.full((1, 64), 7e4, np.float32), "q2_0", None)
