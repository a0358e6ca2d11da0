"""`calibrate --hessian`: the sums are those of the whole model's inputs, whatever the memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from calibrating import source
from checkpoints import layout_of, tiny_config, write_checkpoint
from deadly import dying
from gguf_models import sidecars
from here import Here
from hub_client import files_in
from qwen35.calibration import hessian_inputs, hessian_plan
from qwen35.calibration.calibration_plan import CalibrationPlan, CalibrationRequest, make_plan
from qwen35.calibration.calibration_run import calibrate
from qwen35.calibration.hessian_inputs import Matrix, PlannedInput, Tokens, assigned
from qwen35.calibration.hessian_record import GramSums
from qwen35.calibration.hessian_totals import (
    HessianTotals,
    triangles_in,
    triangles_of,
    write_triangles,
)
from qwen35.calibration.share_worker import MODULE
from qwen35.calibration.states import work_folder
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.errors import InputError, OutputError, UsageError
from qwen35.execution.process_pool import ProcessPool
from qwen35.model.model_config import parse_config
from qwen35.model.roles import expected_tensors
from qwen35.planning.hessians import InputHessian, MeasuredInput, open_hessians
from qwen35.progress import Silent

CONTEXT = 16
FEW = 0.55
"""Tokens a column: more than some experts of the test see, and fewer than others."""


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("the rain in a Model, seven times; " * 12)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("source"), moe=True, tied=False)


@pytest.fixture(autouse=True)
def few_tokens_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an expert have Hessians of its own from fewer tokens on."""
    monkeypatch.setattr(hessian_inputs, "OWN_TOKENS", FEW)
    monkeypatch.setattr(hessian_plan, "OWN_TOKENS", FEW)


def plan_for(folder: Path, text: Path, **asked: Any) -> CalibrationPlan:
    checkpoint = open_folder(folder)
    asked = {"dtype": "float32", "hessian": True, **asked}
    return make_plan(
        checkpoint, read_text(checkpoint, [text], context=CONTEXT), CalibrationRequest(**asked)
    )


@pytest.fixture(scope="module")
def made(folder: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hessians of a mixture of experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian_inputs, "OWN_TOKENS", FEW)
        patch.setattr(hessian_plan, "OWN_TOKENS", FEW)
        out = tmp_path_factory.mktemp("made") / "out"
        return calibrate(plan_for(folder, prose), out, threads=1).result.out


def inputs_of_the_whole_model(folder: Path, plan: CalibrationPlan) -> dict[str, Any]:
    """Return the inputs of every product by module name, fitting and held-out tokens apart."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    model.eval()
    seen: dict[str, Any] = {}
    part = 0

    def note(name: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).double()
        seen.setdefault(name, ([], []))[part].append(flat)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
    real = torch.nn.functional.linear
    stacks = [(name, stack) for name, stack in model.named_parameters() if "experts." in name]
    rows = {stack.data_ptr(): name for name, stack in stacks}
    experts = {
        stack[i].data_ptr(): f"{rows[stack.data_ptr()]}.{i}"
        for _, stack in stacks
        for i in range(len(stack))
    }
    routers = {
        p.data_ptr(): n for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")
    }

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        for names in (experts, routers):
            if weight.data_ptr() in names:
                note(names[weight.data_ptr()].removesuffix(".weight"), x)
        return real(x, weight, bias)

    torch.nn.functional.linear = linear
    try:
        with torch.inference_mode():
            for window, ids in enumerate(plan.text.windows):
                part = int(window % 5 == 4)
                model(input_ids=torch.from_numpy(ids[None]).long())
    finally:
        torch.nn.functional.linear = real
    return seen


def both(found: InputHessian | None) -> tuple[Any, Any, int, int]:
    assert found is not None
    return found.fit, found.held_out, found.tokens, found.held_out_tokens


def same(found: InputHessian | None, inputs: Any) -> None:
    """Compare Hessians with the inputs that they are of."""
    for values, tokens, parts in zip(both(found)[:2], both(found)[2:], inputs, strict=True):
        x = torch.cat(parts).numpy()
        assert tokens == len(x)
        expected = x.T @ x
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_they_are_those_of_the_whole_model(folder: Path, prose: Path, made: Path) -> None:
    plan = plan_for(folder, prose)
    assert len(plan.text.windows) % 5
    seen = inputs_of_the_whole_model(folder, plan)
    hessians = open_hessians(made)
    hessians.check(plan.config.geometry, plan.items)
    own, together = 0, 0
    for item in plan.items:
        name = item.spec.name
        if item.role.scope == "mtp" or item.role.info.kind not in ("linear", "router", "experts"):
            continue
        if item.role.scope == "visual":
            continue
        if item.role.info.kind != "experts":
            same(hessians.of(name), seen[item.module])
            continue
        layer = name.rpartition("experts.")[0]
        for expert in range(item.spec.shape[0]):
            inputs = seen.get(f"{name}.{expert}", ([torch.zeros(0, 1)], []))
            enough = sum(map(len, inputs[0])) >= item.spec.shape[-1] * FEW and inputs[1]
            own += bool(enough)
            together += not enough
            if enough:
                same(hessians.of(name, expert), inputs)
            elif name.endswith("gate_up_proj"):
                same(hessians.of(name, expert), seen[f"{layer}shared_expert.gate_proj"])
            else:
                raise AssertionError(f"{name}.{expert} is one that the text reaches too rarely")
    same(hessians.of("lm_head.weight"), seen["lm_head"])
    assert own >= 4
    assert together >= 4


def test_mtp_has_them(made: Path) -> None:
    """Its inputs are compared with the statistics, which are measured apart."""
    hessians = open_hessians(made)
    table = json.loads((made / "activation-stats.json").read_text())
    for name, entry in table.items():
        if name.startswith("mtp.") and ".experts." not in name:
            fit, held_out, tokens, more = both(hessians.of(name))
            assert tokens + more == entry["tokens"]
            mean = (fit.diagonal() + held_out.diagonal()) / entry["tokens"]
            np.testing.assert_allclose(mean, entry["input_channel_mean_square"], rtol=1e-4)
            assert np.abs(fit - np.diag(fit.diagonal())).max() > 0
    assert both(hessians.of("mtp.fc.weight"))[0].shape == (512, 512)


def test_a_tied_head_is_read_through_the_embedding(prose: Path, tmp_path: Path) -> None:
    folder = source(tmp_path, mtp=0)
    out = calibrate(plan_for(folder, prose), tmp_path / "out", threads=1).result.out
    hessians = open_hessians(out)
    assert hessians.of("model.language_model.embed_tokens.weight") is not None
    assert hessians.of("lm_head.weight") is None
    assert {path.name for path in (out / "hessians").iterdir()} == {
        "head.safetensors",
        *(f"layer-000{i}.safetensors" for i in range(4)),
    }


def test_the_manifest_has_their_hashes(made: Path) -> None:
    files = json.loads((made / "qwen35.json").read_text())["files"]
    paths = sorted((made / "hessians").iterdir())
    assert len(paths) == 6
    for path in paths:
        entry = files[f"hessians/{path.name}"]
        assert entry["size"] == path.stat().st_size
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_experts_too_rare_even_together_keep_plain_codes(
    folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_inputs, "OWN_TOKENS", 16)
    monkeypatch.setattr(hessian_plan, "OWN_TOKENS", 16)
    plan = plan_for(folder, prose)
    assert plan.hessians is not None
    assert plan.hessians.group == 0
    hessians = open_hessians(calibrate(plan, tmp_path / "out", threads=1).result.out)
    stem = "model.language_model.layers.0.mlp"
    assert hessians.of(f"{stem}.experts.down_proj", 0) is None
    assert hessians.of(f"{stem}.gate.weight") is not None


@pytest.mark.parametrize(
    ("seen", "all_saw", "found"),
    [
        ((160, 40), (320, 80), Matrix("mlp.experts.down_proj", 1)),
        ((159, 40), (320, 80), Matrix("mlp.experts.down_proj")),
        ((160, 0), (320, 80), Matrix("mlp.experts.down_proj")),
        ((0, 0), (320, 80), Matrix("mlp.experts.down_proj")),
        ((159, 40), (159, 80), None),
        ((159, 40), (320, 0), None),
    ],
)
def test_rarely_reached_experts_fall_back(
    seen: tuple[int, int], all_saw: tuple[int, int], found: Matrix | None
) -> None:
    """To the average of their layer, then to plain codes; 16 tokens a column are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hessian_inputs, "OWN_TOKENS", 16)
        down = PlannedInput(10, [], {1: ["one"]})
        name = "mlp.experts.down_proj"
        tokens = {Matrix(name): Tokens(*all_saw), Matrix(name, 1): Tokens(*seen)}
        made = assigned({name: down}, tokens)
    assert list(made) == ([] if found is None else [found])
    for matrix, about in made.items():
        assert about == MeasuredInput(10, *tokens[matrix], ("one",))


def test_down_projections_share_the_sum_of_all_experts(
    folder: Path, prose: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is that of the experts, each of which has its own in `made`."""
    monkeypatch.setattr(hessian_inputs, "OWN_TOKENS", 2)
    monkeypatch.setattr(hessian_plan, "OWN_TOKENS", 2)
    hessians = open_hessians(calibrate(plan_for(folder, prose), tmp_path / "out").result.out)
    apart, stack = open_hessians(made), "model.language_model.layers.1.mlp.experts.down_proj"
    fits = [both(apart.of(stack, expert))[0] for expert in range(4)]
    fit, _, tokens, _ = both(hessians.of(stack, 0))
    assert tokens == 2 * both(hessians.of("lm_head.weight"))[2]  # each token reaches two experts
    np.testing.assert_allclose(fit, sum(fits), atol=1e-5 * fit.max())


# --- memory and interruption


def test_groups_of_experts_change_nothing(
    folder: Path, prose: Path, made: Path, tmp_path: Path
) -> None:
    plan = plan_for(folder, prose)
    assert plan.hessians is not None
    one_by_one = replace(plan, hessians=replace(plan.hessians, group=1))
    out = calibrate(one_by_one, tmp_path / "out", threads=1).result.out
    assert files_in(out) == files_in(made)


def test_little_memory_is_enough(folder: Path, prose: Path, made: Path, tmp_path: Path) -> None:
    """Experts are read one by one, and windows batched otherwise."""
    free = plan_for(folder, prose)
    tight = plan_for(folder, prose, memory=free.peak_bytes - free.layer_bytes // 2)
    assert tight.sizes.wide > 0
    assert tight.peak_bytes < free.peak_bytes
    found = open_hessians(calibrate(tight, tmp_path / "out", threads=1).result.out)
    expected = open_hessians(made)
    assert found.by_weight.keys() == expected.by_weight.keys()
    for key, hessian in expected.by_weight.items():
        scale = hessian.fit.max()
        np.testing.assert_allclose(found.by_weight[key].fit, hessian.fit, atol=1e-5 * scale)
        np.testing.assert_allclose(
            found.by_weight[key].held_out, hessian.held_out, atol=1e-5 * scale
        )
    with pytest.raises(UsageError, match="too little, expected at least"):
        plan_for(folder, prose, memory=free.hessian_bytes)


class Interrupt(Silent):
    """Progress that stops the run when it has heard of a block."""

    def advance(self, nbytes: int, item: str) -> None:
        if item == "layers.1":
            raise KeyboardInterrupt


def test_an_interrupted_run_makes_the_same_files(
    folder: Path, prose: Path, made: Path, tmp_path: Path
) -> None:
    plan, out = plan_for(folder, prose), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan, out, threads=1, progress=Interrupt())
    (work_folder(out) / "hessians" / "layer-0002.safetensors").write_text("cut off")
    assert calibrate(plan, out, threads=1).resumed == 2
    assert files_in(out) == files_in(made)
    assert not work_folder(out).exists()


def test_finished_layers_without_their_files_are_not_passed_over(
    folder: Path, prose: Path, tmp_path: Path
) -> None:
    plan, out = plan_for(folder, prose), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan, out, threads=1, progress=Interrupt())
    (work_folder(out) / "hessians" / "layer-0001.safetensors").unlink()
    with pytest.raises(OutputError, match="finished layers without layer-0001.safetensors; give"):
        calibrate(plan, out, threads=1)


@pytest.mark.parametrize(
    ("how", "deaths"),
    [("experts in one group", (1, 4)), ("experts one by one", ()), ("read one by one", (0,))],
)
def test_workers_make_the_same_files(
    folder: Path,
    prose: Path,
    made: Path,
    tmp_path: Path,
    how: str,
    deaths: tuple[int, ...],
) -> None:
    """Whoever computes which part of the text, and though workers die when they have done so."""
    plan = plan_for(folder, prose)
    assert plan.hessians is not None
    if how == "experts one by one":
        plan = replace(plan, hessians=replace(plan.hessians, group=1))
    if how == "read one by one":
        plan = plan_for(folder, prose, memory=2 * plan.peak_bytes - plan.layer_bytes, workers=2)
        assert 0 < plan.sizes.wide < len(plan.text.windows)
        made = calibrate(plan, tmp_path / "one", threads=1).result.out
    pool = Here(3, deaths)
    out = calibrate(plan, tmp_path / "out", threads=1, pool=pool).result.out
    assert files_in(out) == files_in(made)
    jobs = {(job["block"], job["part"]) for job in pool.done}
    passes = {(block, part.removeprefix(block).split(".")[1]) for block, part in jobs}
    assert len(pool.done) == len(jobs) + len(deaths) * len(passes)
    assert len(passes) > len(plan.blocks)
    assert len(jobs) > 3 * len(plan.blocks)
    assert not work_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("per_expert", [False, True])
def test_workers_take_experts_however_they_are_stored(
    prose: Path, tmp_path: Path, per_expert: bool
) -> None:
    folder = source(tmp_path, moe=True, tied=False, per_expert=per_expert)
    plan = plan_for(folder, prose)
    one = calibrate(plan, tmp_path / "one", threads=1).result.out
    two = calibrate(plan, tmp_path / "two", threads=1, pool=Here(2)).result.out
    assert files_in(one) == files_in(two)


def test_one_process_goes_on_where_workers_were_interrupted(
    folder: Path, prose: Path, made: Path, tmp_path: Path
) -> None:
    plan, out = plan_for(folder, prose), tmp_path / "out"

    class Ends(Here):
        def begin(self, number: int, request: Mapping[str, Any]) -> None:
            if request["block"] == "layers.1" and request["wanted"] is not None:
                raise KeyboardInterrupt
            super().begin(number, request)

    with pytest.raises(KeyboardInterrupt):
        calibrate(plan, out, threads=1, pool=Ends(2))
    (work_folder(out) / "layers.1.1.0.grams").write_text("left over")
    assert calibrate(plan, out, threads=1).resumed == 1
    assert files_in(out) == files_in(made)


def test_a_process_makes_the_same_files(
    folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # it counts tokens as it always does
    plan = plan_for(folder, prose)
    one = calibrate(plan, tmp_path / "one", threads=1).result.out
    pool = ProcessPool(1, module=MODULE, threads=1)
    assert files_in(calibrate(plan, tmp_path / "two", pool=pool).result.out) == files_in(one)


@pytest.mark.heavy
def test_processes_make_the_same_files_when_one_is_killed(
    folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    deaths = dying(monkeypatch, tmp_path / "deaths", 2)
    plan = plan_for(folder, prose)
    one = calibrate(plan, tmp_path / "one", threads=1).result.out
    pool = ProcessPool(2, module="deadly_shares", threads=1)
    assert files_in(calibrate(plan, tmp_path / "two", pool=pool).result.out) == files_in(one)
    assert len(list(deaths.glob("death*"))) == 2


def test_the_plan_states_the_disk_space_of_parts(folder: Path, prose: Path) -> None:
    plan, shared = plan_for(folder, prose), plan_for(folder, prose, workers=2)
    assert shared.disk_bytes == plan.disk_bytes + shared.part_bytes
    assert plan.disk_bytes == plan.own_disk_bytes
    assert shared.peak_bytes == 2 * plan.peak_bytes
    assert -(-len(plan.text.windows) // plan.part) in range(2, 17)


def test_sums_are_added_in_a_file(tmp_path: Path) -> None:
    """Parts of the text one after the other, from memory or from the files of workers."""
    one, other = Matrix("one"), Matrix("other", 3)
    columns = {one: 3, other: 70}
    totals = HessianTotals(tmp_path / "totals", columns)
    x = torch.randint(-9, 9, (12, 70)).float()
    for number, rows in enumerate((x[:5], x[5:6], x[6:])):
        sums = {matrix: GramSums(torch, width, "cpu") for matrix, width in columns.items()}
        for matrix, width in columns.items():
            sums[matrix].add(rows[:, :width], held_out=matrix == other)
        if number == 1:
            del sums[one]  # the file of a worker has zeros for it
            write_triangles(tmp_path / "part", sums, columns, torch)
            totals.merge(triangles_in(tmp_path / "part", columns))
        else:
            totals.merge(triangles_of(sums))
    seen = torch.cat([x[:5, :3], x[6:, :3]])
    assert np.concatenate(list(totals.triangle(one, 0))).tolist() == upper(seen)
    assert np.concatenate(list(totals.triangle(other, 1))).tolist() == upper(x)
    assert not np.concatenate(list(totals.triangle(other, 0))).any()
    totals.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def upper(x: torch.Tensor) -> list[float]:
    """Return the upper triangle of x^T x row by row."""
    product = x.T @ x
    found: list[float] = product[tuple(torch.triu_indices(*product.shape))].tolist()
    return found


PEAK = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen35.calibration.calibration_plan import CalibrationRequest, make_plan
from qwen35.calibration.calibration_run import calibrate
from qwen35.calibration.text_windows import read_text
from qwen35.checkpoint.source import open_folder

def plan_for(folder):
    checkpoint = open_folder(Path(folder))
    text = read_text(checkpoint, [Path(sys.argv[3])], context=16)
    return make_plan(checkpoint, text, CalibrationRequest(hessian=True))

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

small, large, _, out = sys.argv[1:]
calibrate(plan_for(small), Path(out) / "warm", threads=1)
before, plan = peak(), plan_for(large)
calibrate(plan, Path(out) / "large", threads=1)
print(peak() - before, plan.peak_bytes, plan.hessian_bytes)
"""


@pytest.mark.heavy
def test_memory_is_what_the_plan_states(folder: Path, prose: Path, tmp_path: Path) -> None:
    """Four layers with 77 MB of Hessians each."""
    config = tiny_config(text_only=True, mtp=0) | {"intermediate_size": 3072}
    tensors = {
        spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16)
        for spec in expected_tensors(parse_config(config), layout_of(config))
    }
    large = write_checkpoint(tmp_path / "in", config, tensors, sidecars=sidecars())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, folder, large, prose, tmp_path],
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    taken, planned, hessians = map(int, done.stdout.split()[-3:])
    assert hessians < taken < planned * 1.15


# --- what is refused and told


def test_text_of_which_no_window_is_held_out_is_refused(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the rain in a Model, seven times; " * 2)
    with pytest.raises(UsageError, match=r"--hessian: \d chunks of 16 tokens, expected 5 at least"):
        plan_for(folder, short)


def test_a_sum_beyond_float32_is_refused(
    folder: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = GramSums.add

    def large(self: GramSums, x: Any, *, held_out: bool) -> None:
        real(self, x * 1e25, held_out=held_out)

    monkeypatch.setattr(GramSums, "add", large)
    with pytest.raises(
        InputError, match=r"layers\.0 \(layer-0000.safetensors\), .* beyond float32"
    ):
        calibrate(plan_for(folder, prose), tmp_path / "out", threads=1)


def test_the_dry_run_states_memory_and_disk_space(
    folder: Path, prose: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", str(folder), "--text", str(prose), "--output", str(tmp_path / "out")]
    command += ["--context", str(CONTEXT), "--device", "cpu", "--hessian", "--dry-run"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    parts = "layer_bytes", "batch_bytes", "hessian_bytes"
    assert told["peak_bytes"] == sum(told[part] for part in parts)
    mtp = [512, 256, 256, 256, 128, 128]  # fc, attention in and out, shared in and out, experts out
    assert told["hessian_bytes"] == sum(8 * columns**2 for columns in mtp)
    on_disk = sum(path.stat().st_size for path in (made / "hessians").iterdir())
    assert on_disk <= told["hessian_disk_bytes"] < told["disk_bytes"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "for Hessians" in shown
    assert "every fifth chunk held out" in shown
    assert list(tmp_path.iterdir()) == []
