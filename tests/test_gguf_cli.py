"""The verb `qwen35 gguf`: files, dry run, export, refusals; nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gguf_models import make_variant
from qwen35.api.plan_api import plan
from qwen35.cli.main import main
from qwen35.codecs.ggml import library, quantizers


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("cli"), "dense")


def gguf(source: Path, out: Path, *more: str) -> int:
    return main(["gguf", str(source), str(out), "--quiet", *more])


def test_files_names_manifest_and_sizes(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "Tiny-GGUF"
    asked = ("--types", "Q4_K_M,F16", "--mmproj", "--threads", "2", "--json")
    assert gguf(source, out, *asked, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert gguf(source, out, *asked) == 0
    written = json.loads(capsys.readouterr().out)
    names = {path.name: path.stat().st_size for path in out.iterdir()}
    assert names == planned["files"]
    assert set(names) == {
        "Tiny-dense-1B-Q4_K_M.gguf",
        "Tiny-dense-1B-F16.gguf",
        "mmproj-Tiny-dense-1B-F16.gguf",
        "qwen35.json",
    }
    manifest = json.loads((out / "qwen35.json").read_text())
    assert manifest["plan"] == planned["digest"]
    assert written["bytes"] == sum(names.values())
    assert {n: row["sha256"] for n, row in manifest["files"].items()} == written["sha256"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--mmproj", "--drop-mtp"],
        ["--mmproj", "q8_0", "--mtp", "separate"],
        ["--recipe", "q8-gates-plus"],
        ["--tensor-type", "ffn_down=q8_0", "--upstream-counters"],
    ],
    ids=" ".join,
)
def test_plan_tells_what_would_be_written(
    source: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--types", "F16,Q4_K_M", *flags]
    for form in ([], ["--json"]):
        assert gguf(source, tmp_path / "out", *asked, "--dry-run", *form) == 0
        dry = capsys.readouterr().out
        assert main(["plan", str(source), *asked, *form]) == 0
        assert capsys.readouterr().out == dry
    planned = json.loads(dry)
    assert gguf(source, tmp_path / "out", *asked) == 0
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert written == planned["files"]
    made = plan(source, types="F16,Q4_K_M")
    assert made.nbytes == sum(file.nbytes for file in made.files)
    assert made.total_bytes == sum(dict(made.all_sizes()).values()) > made.nbytes


@pytest.mark.parametrize("model", ["Qwen3.5-0.8B", "Qwen3.5-35B-A3B", "Qwen3.5-397B-A17B"])
def test_published_sizes_are_planned(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--types", "Q4_K_M,Q8_0", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    q4, q8, manifest = (planned["files"][name] for name in planned["files"])
    assert manifest < q4 < q8
    assert any("are unknown and not counted" in note for note in planned["notes"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--types", "Q8_0", "--keep", "self_attn"], "--keep: has no effect with --types"),
        (["--types", "Q8_0", "--keep-prefix"], "--keep-prefix: has no effect with --types"),
        (["--mmproj"], "--mmproj: has no effect without --types; add"),
        (["--imatrix", "x.gguf"], "--imatrix: has no effect without --types"),
        (["--types", "Q9"], "Q9"),
        (["--types", "Q8_0", "--recipe", "nf4"], "it is one of `qwen35 convert`"),
        (["--recipe", "q8-gates"], "it is one of `qwen35 gguf`"),
        (["--roles", "--types", "Q8_0"], "regardless of --types"),
    ],
)
def test_what_plan_cannot_mean_is_refused(
    source: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--roles" in flags else [str(source)]
    assert main(["plan", *model, *flags]) == 2
    assert words in capsys.readouterr().err


def test_default_types(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gguf(source, tmp_path / "x", "--dry-run", "--json") == 0
    files = json.loads(capsys.readouterr().out)["files"]
    kinds = [name.removeprefix("Tiny-dense-1B-") for name in files if name.endswith(".gguf")]
    assert kinds == ["F16.gguf", "Q8_0.gguf", "Q6_K.gguf", "Q5_K_M.gguf", "Q4_K_M.gguf"]


def test_threads_do_not_change_bytes(source: Path, tmp_path: Path) -> None:
    for threads in ("1", "3"):
        more = ("--types", "Q5_K_M", "--threads", threads)
        assert gguf(source, tmp_path / threads, *more) == 0
    one, three = (tmp_path / t / "Tiny-dense-1B-Q5_K_M.gguf" for t in ("1", "3"))
    assert one.read_bytes() == three.read_bytes()


def test_the_plan_as_text(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--types", "Q4_K_M", "--recipe", "q8-gates", "--dry-run")
    assert gguf(source, Path("/nowhere/x"), *more) == 0
    text = capsys.readouterr().out
    assert "blk.N.attn_gate.weight" in text
    assert "q8-gates *" in text
    assert "reads" in text


def test_export_for_stock_llama_quantize(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    more = ("--types", "Q4_K_M", "--recipe", "q8-gates-plus", "--export", str(path))
    assert gguf(source, tmp_path / "out", *more) == 0
    lines = path.read_text().splitlines()
    assert r"^blk\.0\.attn_gate\.weight$=q8_0" in lines
    assert r"^blk\.1\.ssm_alpha\.weight$=f32" in lines
    assert not any("norm" in line for line in lines)
    assert not (tmp_path / "out").exists()
    assert gguf(source, tmp_path / "out", "--types", "F16", "--export", str(path)) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--types", "Q4_K_X"), "--types: 'Q4_K_X' is unknown"),
        (("--types", ","), "--types: empty"),
        (("--recipe", "q8"), "not a built-in recipe for GGUF"),
        (("--tensor-type", "nothing=q8_0"), "is left for it"),
        (("--tensor-type-file", "/nowhere/types.txt"), "cannot be read"),
        (("--imatrix", "/nowhere/imatrix.gguf"), "cannot be read"),
        (("--imatrix", "hf:owner"), "malformed"),
        (("--memory", "1MB"), "too little"),
    ],
)
def test_refusals_before_any_work(
    more: tuple[str, ...],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gguf(source, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_of_types(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text("\n")
    assert gguf(source, tmp_path / "out", "--tensor-type-file", str(path)) == 2


def test_outputs_are_not_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert gguf(source, out, "--types", "Q8_0") == 0
    assert gguf(source, out, "--types", "F16") == 2
    assert gguf(source, out, "--types", "F16", "--overwrite") == 0
    assert {path.suffix for path in out.iterdir()} == {".gguf", ".json"}
    assert not (out / "Tiny-dense-1B-Q8_0.gguf").exists()


def damaged(source: Path, tmp_path: Path, name: str, value: float) -> Path:
    """Copy a checkpoint with one value of one weight changed."""
    copy = Path(shutil.copytree(source, tmp_path / "damaged"))
    (path,) = copy.glob("*.safetensors")
    tensors = load_file(path)
    tensors[name][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return copy


UP = "model.language_model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (float("nan"), "Q8_0", "holds NaN or infinity"),
        (float("inf"), "F32", "holds NaN or infinity"),
        (1e6, "F16", "a value beyond the range of f16"),
        (3e38, "Q4_K_M", "a value beyond the range of q4_K"),
    ],
)
def test_values_that_cannot_be_written(
    value: float,
    kind: str,
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = damaged(source, tmp_path, UP, value)
    assert gguf(copy, tmp_path / "out", "--types", kind) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_without_llama_cpp_all_but_rare_types_are_written(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = (library.open_library, quantizers.differs)
    for cached in known:
        cached.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    try:
        assert gguf(source, tmp_path / "f", "--types", "F16,BF16,F32,Q8_0,Q4_K_M", "--mmproj") == 0
        assert gguf(source, tmp_path / "q", "--tensor-type", "ffn_up=iq3_s") == 2
    finally:
        for cached in known:
            cached.cache_clear()
    said = capsys.readouterr().err
    assert "iq3_s needs llama-cpp-python, which is not installed" in said
    assert "pip install '.[llama-cpp]'" in said
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_packed_source_is_decoded(source: Path, tmp_path: Path) -> None:
    """NF4 in, GGUF out: the same as by way of the restored bf16 checkpoint."""
    recipe = tmp_path / "bf16.toml"
    recipe.write_text('format = "stored"\n[[rules]]\nmatch = "*"\naction = "plain"\n')
    packed, restored = tmp_path / "a" / "Model", tmp_path / "b" / "Model"
    assert main(["convert", str(source), str(packed), "--recipe", "nf4", "--quiet"]) == 0
    more = ("--recipe", str(recipe), "--quiet")
    assert main(["convert", str(packed), str(restored), *more]) == 0
    files = []
    for folder in (packed, restored):
        out = folder.with_name("gguf")
        assert gguf(folder, out, "--types", "Q4_K_M", "--recipe", "q8-gates") == 0
        files.append((out / "Model-Q4_K_M.gguf").read_bytes())
    assert files[0] == files[1]
