"""`qwen35 plan` and `qwen35 convert` as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import random_tensors, tiny_config, write_checkpoint
from qwen35.cli.main import VERBS, main
from qwen35.model.roles import ROLES

Capture = pytest.CaptureFixture[str]
PLAN = ["plan", "Qwen3.5-0.8B"]


# --- plan


def test_plan_prints_data_to_stdout_only(capsys: Capture) -> None:
    assert main(PLAN) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "488 weights in, 1418 tensors out, 186 weights in NF4" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


def test_plan_as_json_holds_every_weight(capsys: Capture) -> None:
    assert main([*PLAN, "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    plan = json.loads(shown.out)
    assert len(plan["steps"]) == 488
    assert sum(step["op"] == "nf4" for step in plan["steps"]) == 186
    assert plan["model"] == "Qwen3.5-0.8B"
    assert set(plan["files"]) == {"model.safetensors", "config.json", "qwen35.json"}
    step = plan["steps"][-1]
    assert sorted(step) == [
        "dtype",
        "expert",
        "layer",
        "op",
        "outputs",
        "reason",
        "role",
        "shape",
        "storage",
        "weight",
    ]


def test_plan_says_the_same_each_time(capsys: Capture) -> None:
    outputs = set()
    for _ in range(3):
        main(PLAN)
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1


def test_plan_of_roles(capsys: Capture) -> None:
    assert main(["plan", "--roles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names[1:] == list(dict.fromkeys(path.removesuffix(".weight") for path in ROLES))
    assert any(line.startswith("linear_attn.in_proj_a ") for line in lines)
    assert main(["plan", "--roles", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(ROLES)
    assert sorted(rows[0]) == ["dtype", "kind", "meaning", "role", "shape"]


@pytest.mark.parametrize(
    ("flags", "tensors", "layers"),
    [
        (["--recipe", "text"], 335, 0),
        (["--recipe", "text-nf4"], 335 + 5 * 186, 186),
        (["--keep", "mlp"], 488 + 5 * (186 - 72), 186 - 72),
        (["--keep", "mlp.up_proj", "--keep", "self_attn"], 488 + 5 * 138, 138),
        (["--drop-mtp"], 488 - 15 + 5 * 186, 186),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags_of_plan(capsys: Capture, flags: list[str], tensors: int, layers: int) -> None:
    assert main([*PLAN, *flags]) == 0
    shown = capsys.readouterr().out
    packed = f"{layers} weights in NF4" if layers else "none packed"
    assert f"488 weights in, {tensors} tensors out, {packed}" in shown


def test_plan_of_a_folder_reads_no_weights(dense: Path, capsys: Capture) -> None:
    assert main(["plan", str(dense), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["repo"], plan["revision"]) == (None, None)
    weights = [step["weight"] for step in plan["steps"]]
    assert len(weights) == len(set(weights))
    assert plan["read_bytes"] == sum(
        path.stat().st_size for path in dense.glob("*.safetensors")
    ) - _head_bytes(dense)


def _head_bytes(folder: Path) -> int:
    """Return the bytes of all headers."""
    return sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors")
    )


def test_recipe_of_a_user_works(dense: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'format = "nf4"\ndescription = "only up"\n'
        '[[rules]]\nmatch = "mlp.up_proj"\naction = "nf4"\n'
        '[[rules]]\nmatch = "*"\naction = "plain"\n'
    )
    assert main(["plan", str(dense), "--recipe", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "mine.toml: only up" in shown
    assert "4 weights in NF4" in shown


# --- convert


def test_dry_run_of_convert_is_the_plan_and_writes_nothing(
    dense: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(dense), str(out), "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert main(["plan", str(dense)]) == 0
    assert capsys.readouterr().out == dry
    assert list(tmp_path.iterdir()) == []


def test_help_leaves_names_whole_and_tells_the_published_sizes(capsys: Capture) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        words = capsys.readouterr().out.replace(",", " ").split()
        assert not [word for word in words if word.endswith("-") and word.strip("-")]
        assert ("Qwen3.5-397B-A17B" in words) == (verb in ("inspect", "plan"))


@pytest.mark.parametrize("verb", [["convert"], ["gguf", "--types", "Q8_0"]], ids=["st", "gguf"])
def test_output_that_is_the_input_is_called_so(
    dense: Path, capsys: Capture, verb: list[str]
) -> None:
    for flag in ([], ["--overwrite"]):
        assert main([*verb, str(dense), str(dense), *flag]) == 2
        assert "output and input are the same folder" in capsys.readouterr().err
        assert main([*verb, str(dense), str(dense.parent), *flag]) == 2
        assert "overlaps the input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "M", "out", "--skip-verify"], "--skip-verify: nothing is encoded as FP8"),
        (["convert", "M", "out", "--bands", "derived"], "--bands: nothing is encoded as FP8 here"),
        (["convert", "M", "out", "--verify-samples", "1"], "--verify-samples: nothing is encoded"),
        (["convert", "M", "out", "--verify-seed", "1"], "--verify-seed: nothing is encoded"),
        (["verify", "M", "--tensor-parallel", "2"], "--tensor-parallel: there are no weights in"),
        (
            ["plan", "--roles", "--recipe", "nosuch"],
            "--roles: prints all roles",
        ),
        (["plan", "M", "--roles"], "--roles: prints all roles, regardless of MODEL"),
        (["convert", "M", "out", "--recipe", "q8-gates"], "; it is one of `qwen35 gguf`"),
        (["gguf", "M", "out", "--types", "Q8_0", "--recipe", "fp8"], "one of `qwen35 convert`"),
        (["plan", "M", "--recipe", "text_nf4"], "; did you mean text-nf4?"),
        (["plan", "M", "--recipe", "no.toml"], "recipe no.toml: cannot be read (No such file or"),
        (["run", "no.toml"], "no.toml: cannot be read (No such file or directory)"),
        (["run", "--path", "A", "m"], "--path: given with 'm', expected MODEL and OUT"),
        (["finalize", "nothere"], "nothere: has no slices; write them with"),
        (["--json"], "--json: an option without a verb before it, expected inspect, plan"),
        (["help", "convrt"], "verb 'convrt': unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_would_have_no_effect_or_is_mistaken_is_told(
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(dense) if word == "M" else word for word in arguments]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_is_a_verb_too(capsys: Capture) -> None:
    for verb in ([], ["convert"], ["run"]):
        shown = []
        for arguments in ([*verb, "--help"], ["help", *verb]):
            with pytest.raises(SystemExit) as stop:
                main(arguments)
            assert stop.value.code == 0
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1]
    assert "--path PATH ...] MODEL OUT [options]\n\n" in shown[0]


def test_rule_that_packs_what_cannot_be_is_named_with_its_recipe(
    dense: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = tmp_path / "own.toml"
    rule = '[[rules]]\nmatch = "kind:vector"\naction = "nf4"\nreason = "why not"\n'
    recipe.write_text(f'format = "nf4"\nbase = "nf4"\n{rule}')
    assert main(["plan", str(dense), "--recipe", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "recipe own.toml, rule for 'kind:vector' (why not): packs " in said
    assert 'action = "plain" before it' in said


def test_plan_folds_many_shards_and_keeps_columns(capsys: Capture) -> None:
    assert main(["plan", "Qwen3.5-397B-A17B", "--recipe", "fp8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [line for line in lines if line.startswith("model-")]
    more = next(line for line in lines if line.startswith("... ")).split()
    assert len(files) == 2
    assert int(more[1]) + 2 == int(files[1].split("-of-")[1].split(".")[0])
    rows = [line for line in lines if line.startswith("  ") and "," in line]
    assert {len(line) for line in rows} == {78}


def test_convert_tells_what_it_made(dense: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(dense), str(out), "--recipe", "text", "--threads", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{out}: ")
    assert "none packed" in shown.out
    assert shown.err.startswith("writing out: ")
    assert main(arguments) == 2
    assert "exists already; give --overwrite to replace it" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--quiet", "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    made = json.loads(shown.out)
    assert made["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert set(made["sha256"]) | {"qwen35.json"} == {path.name for path in out.iterdir()}


def test_notes_go_to_stderr_unless_quiet(tmp_path: Path, capsys: Capture) -> None:
    config = tiny_config(layers=1, mtp=1)
    tensors = {n: t for n, t in random_tensors(config).items() if not n.startswith("mtp.")}
    source = write_checkpoint(tmp_path / "source", config, tensors)
    arguments = ["convert", str(source), str(tmp_path / "out"), "--recipe", "text"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "note: config.json promises 1 multi-token-prediction layer(s)" in shown.err
    assert "promises" not in shown.out
    assert main([*arguments, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
