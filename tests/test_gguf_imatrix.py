"""Importance matrices: both forms, what they lack, and whose they are."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gguf_models import make_variant
from imatrices import UP, gguf_file, ones
from llama import quantize
from qwen35.checkpoint.gguf_header import GgufHeader, read_container
from qwen35.checkpoint.source import open_folder
from qwen35.errors import InputError, TensorError, UsageError
from qwen35.planning.gguf_files.imatrix import Imatrix, open_imatrix, read_imatrix
from qwen35.planning.gguf_files.type_patterns import pattern_rules
from qwen35.planning.output_plan import Plan, make_plan
from qwen35.planning.recipe import load_recipe
from qwen35.writing.write import write


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(tmp_path_factory.mktemp("imatrix"), "dense")


def plan_of(source: Path, imatrix: Imatrix, *types: str, rules: Sequence[str] = ()) -> Plan:
    recipe = load_recipe("mix", "gguf").preceded(pattern_rules(rules, []))
    return make_plan(open_folder(source), recipe, types=types or ("Q4_K_M",), imatrix=imatrix)


def dat_file(
    path: Path, entries: Mapping[str, tuple[int, npt.NDArray[Any]]], *, trailer: bool = True
) -> Path:
    """Write the older form: name to calls and values."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        text = name.encode()
        data += struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, values.size)
        data += values.astype("<f4").tobytes()
    if trailer:
        data += struct.pack("<ii", 40, 5) + b"a.txt"
    path.write_bytes(data)
    return path


def data_of(container: GgufHeader, name: str) -> bytes:
    entry = container.tensors[name]
    return container.path.read_bytes()[entry.begin : entry.begin + entry.nbytes]


def test_values_are_means_of_squares(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sums = generator.exponential(size=(3, 64)).astype(np.float32)
    counts = np.array([3, 0, 7], np.float32)
    entry = read_imatrix(gguf_file(tmp_path / "i.gguf", {UP: (sums, counts)})).entries[UP]
    values = entry.values.reshape(3, 64)
    assert np.array_equal(values[0], sums[0] / np.float32(3))
    assert np.array_equal(values[1], np.ones(64, np.float32))
    assert np.array_equal(values[2], sums[2] / np.float32(7))
    assert (entry.unseen, len(entry.divisors)) == (1, 3)


def test_inputs_that_were_all_zero_weigh_their_channels_evenly(dense: Path, tmp_path: Path) -> None:
    """With an importance of zero throughout, encoders would make zeros of the weight."""
    sums, counts = ones(1, 512)
    made = []
    for factor in (0, 0.5):  # half of the sums is the counts
        entries = {"blk.0.ffn_down.weight": (sums * np.float32(factor), counts)}
        imatrix = read_imatrix(gguf_file(tmp_path / "i.gguf", entries), name="i")
        np.testing.assert_array_equal(imatrix.entries["blk.0.ffn_down.weight"].values, np.ones(512))
        out = write(plan_of(dense, imatrix, "Q4_K_S"), tmp_path / f"out-{factor}").out
        made.append(next(out.glob("*.gguf")).read_bytes())
    assert made[0] == made[1]


def test_keys_are_those_of_llama_quantize(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "i.gguf", {UP: ones(1, 256)})
    name = "hf:owner/" + "long" * 40 + "/é"
    keys = read_imatrix(path, name=name).keys()
    assert list(keys) == [
        "quantize.imatrix.file",
        "quantize.imatrix.dataset",
        "quantize.imatrix.entries_count",
        "quantize.imatrix.chunks_count",
    ]
    assert keys["quantize.imatrix.file"] == name[:127]
    assert list(keys.values())[1:] == ["a.txt", 1, 5]


def test_the_older_form_gives_the_same_file_as_llama_quantize(dense: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    entries = {}
    for block in range(4):
        for leaf, width in (("ffn_up", 256), ("ffn_down", 512), ("ffn_gate", 256)):
            values = generator.exponential(size=width).astype(np.float32) * 17
            entries[f"blk.{block}.{leaf}.weight"] = (17, values)
    head = generator.exponential(size=256).astype(np.float32)
    entries["token_embd.weight"] = (3, head)  # a tied head's
    imatrix = read_imatrix(dat_file(tmp_path / "i.dat", entries))
    assert (imatrix.dataset, imatrix.chunks) == ("a.txt", 40)
    plan = plan_of(dense, imatrix, "F32", "Q4_K_M")
    out = write(plan, tmp_path / "out", threads=1).out
    base, ours = (out / file.name for file in plan.files)
    theirs = quantize(base, tmp_path / "theirs.gguf", "Q4_K_M", imatrix=imatrix)
    assert ours.read_bytes() == theirs.read_bytes()
    plain = write(
        make_plan(open_folder(dense), load_recipe("mix", "gguf"), types=("Q4_K_M",)),
        tmp_path / "plain",
    )
    unlike, like = (read_container(folder / ours.name) for folder in (plain.out, out))
    for name in entries:
        assert data_of(unlike, name) != data_of(like, name)


def test_the_older_form_of_a_stack_of_experts(tmp_path: Path) -> None:
    source = make_variant(tmp_path, "moe-8")
    generator = np.random.default_rng(2)
    entries = {
        f"blk.{i}.ffn_{leaf}_exps.weight": (9, generator.exponential(size=8 * 256))
        for i in range(4)
        for leaf in ("up", "down")
    }
    imatrix = read_imatrix(dat_file(tmp_path / "i.dat", entries))
    plan = plan_of(source, imatrix, "F32", "Q4_K_S")
    out = write(plan, tmp_path / "out", threads=1).out
    base, ours = (out / file.name for file in plan.files)
    theirs = quantize(base, tmp_path / "theirs.gguf", "Q4_K_S", imatrix=imatrix)
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_older_form_without_a_trailer(tmp_path: Path) -> None:
    path = dat_file(tmp_path / "i.dat", {UP: (0, np.ones(4, np.float32))}, trailer=False)
    imatrix = read_imatrix(path)
    assert (imatrix.dataset, imatrix.chunks) == ("", 0)
    assert list(imatrix.keys()) == ["quantize.imatrix.file", "quantize.imatrix.entries_count"]


def test_what_is_missing_extra_or_unseen_is_told(tmp_path: Path) -> None:
    source = make_variant(tmp_path, "moe")
    sums, counts = ones(4, 256)
    counts[2] = 0
    entries = {
        "blk.0.ffn_up_exps.weight": (sums, counts),
        "blk.0.attn_q.weight": ones(1, 256),
    }
    notes = plan_of(source, read_imatrix(gguf_file(tmp_path / "i.gguf", entries))).notes
    missing = [note for note in notes if "has no entry for" in note]
    assert len(missing) == 1
    assert "output.weight" in missing[0]
    assert "blk.0.ffn_up_exps" not in missing[0]
    assert any("tensors not in this model: blk.0.attn_q.weight" in note for note in notes)
    assert any("saw no token for 1 experts" in note for note in notes)


def test_another_models_file_is_refused(dense: Path, tmp_path: Path) -> None:
    wide = read_imatrix(gguf_file(tmp_path / "wide.gguf", {UP: ones(1, 512)}))
    with pytest.raises(TensorError, match=r"512 values for blk\.0\.ffn_up.*256.*another model"):
        plan_of(dense, wide)
    alien = read_imatrix(gguf_file(tmp_path / "alien.gguf", {"blk.0.attn_x.weight": ones(1, 256)}))
    with pytest.raises(TensorError, match="no entry for any tensor"):
        plan_of(dense, alien)


def test_files_of_a_model_with_more_mtp_layers_than_one_are_its_own(
    dense: Path, tmp_path: Path
) -> None:
    geometry = open_folder(dense).config.geometry
    second = f"blk.{geometry['layers'] + 1}.ffn_up.weight"
    imatrix = read_imatrix(gguf_file(tmp_path / "i.gguf", {second: ones(1, 256)}))
    with pytest.raises(InputError, match=f"an entry {second}, expected 4 layers"):
        imatrix.check(geometry)
    replace(imatrix, provenance={"geometry": dict(geometry)}).check(geometry)


def test_types_that_need_one_are_refused_where_it_is_silent(dense: Path, tmp_path: Path) -> None:
    imatrix = read_imatrix(gguf_file(tmp_path / "i.gguf", {UP: ones(1, 256)}))
    assert plan_of(dense, imatrix, rules=(r"blk\.0\.ffn_up=iq2_s",)).files
    with pytest.raises(UsageError, match=r"blk\.1\.ffn_up\.weight: iq2_s without an importance"):
        plan_of(dense, imatrix, rules=("ffn_up=iq2_s",))


BAD: dict[str, bytes] = {
    "empty": b"",
    "short": b"\1\0",
    "no entries": struct.pack("<i", 0),
    "negative count": struct.pack("<i", -1),
    "a count beyond the file": struct.pack("<i", 2**30),
    "a name beyond the file": struct.pack("<ii", 1, 4000),
    "values beyond the file": struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**28),
    "text": b"this is not an importance matrix",
    "cut": struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2) + bytes(4),
    "NaN": struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, float("nan")),
    "negative": struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, -1.0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(BAD[name])
    with pytest.raises(InputError, match=r"bad\.dat"):
        read_imatrix(path)


@pytest.mark.parametrize("drop", ["imatrix.datasets", "counts"])
def test_gguf_files_that_are_no_importance_matrix(drop: str, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "i.gguf", {UP: ones(1, 256)}, drop=drop)
    with pytest.raises(InputError, match=drop):
        read_imatrix(path)


def test_the_folder_of_calibrate_is_the_file_in_it(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "imatrix.gguf", {UP: ones(1, 256)})
    file, folder = open_imatrix(str(path)), open_imatrix(f"{tmp_path}/")
    assert (folder.path, folder.digest) == (path, file.digest)
    assert folder.keys() == file.keys()  # they go into the output
    path.rename(tmp_path / "other.gguf")
    with pytest.raises(InputError, match=r"a folder without imatrix\.gguf, expected an importance"):
        open_imatrix(str(tmp_path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_imatrix(tmp_path / "none.gguf")
