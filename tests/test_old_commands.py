"""The commands of the toolkit before: their flags, defaults and lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import ASSET
from hub_client import REPO, World
from parsers import defaults
from qwen35.cli.old import front_doors
from qwen35.cli.old.old_convert import add_arguments as convert_arguments
from qwen35.cli.old.old_strip import add_arguments as strip_arguments
from qwen35.cli.old.old_upload import add_arguments as upload_arguments
from running import changed, load_all, read_config, run

pytestmark = pytest.mark.sentences


def test_flags_and_defaults_are_the_documented_ones() -> None:
    assert defaults(convert_arguments) == {
        "model": "unsloth/Qwen3.5-0.8B",
        "output": Path("./Qwen3.5-0.8B-bnb-4bit"),
        "low_vram": False,
        "verbose": False,
        "hf_token": None,
        "overwrite": False,
    }
    assert defaults(strip_arguments) == {
        "model": None,
        "output": None,
        "mode": "bnb",
        "hf_token": None,
        "overwrite": False,
    }
    upload = defaults(upload_arguments)
    documented = ("folder", "repo", "mode", "files", "message", "private", "hf_token")
    assert {name: upload[name] for name in documented} == {
        "folder": Path("./Qwen3.5-0.8B-bnb-4bit"),
        "repo": None,
        "mode": None,
        "files": [],
        "message": None,
        "private": False,
        "hf_token": None,
    }


def test_convert_prints_its_stages_in_order(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert front_doors.convert(["--model", str(dense), "--output", str(out), "--low-vram"]) == 0
    text = capsys.readouterr().out
    stages = [
        "GPU : none used",
        "[before load]",
        "✅ Headers read",
        "⏳ Restoring quantized skip layers to full precision …",
        "   0 layers restored",
        "⏳ Replacing linear layers with BNB Linear4bit …",
        "   31 layers replaced",
        "⏳ Quantizing to nf4 on the CPU",
        "✅ Model quantized; no GPU was used.",
        "[after quantize]",
        "💾 Saving to",
        f"✅ Done. Saved to: {out}",
    ]
    positions = [text.index(stage) for stage in stages]
    assert positions == sorted(positions)
    assert "skipped" not in text
    assert run(dense, tmp_path / "new").hashes["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "new" / "model.safetensors"
    ).read_bytes()


def test_convert_restores_what_should_not_be_quantized(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp8 = run(dense, tmp_path / "fp8", "fp8").out
    out = tmp_path / "out"
    assert front_doors.convert(["--model", str(fp8), "--output", str(out), "--verbose"]) == 0
    text = capsys.readouterr().out
    assert "   └── restored     mtp.layers.0.mlp.up_proj\n" in text
    assert "   7 layers restored\n" in text
    assert "weights are FP8 in the source and are quantized again" in text


def test_convert_saves_nothing_when_a_weight_is_not_finite(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = list(load_all(dense))[-1]
    source = changed(dense, tmp_path / "in", {name: load_all(dense)[name] * float("nan")})
    assert front_doors.convert(["--model", str(source), "--output", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().out
    assert "⏳ Quantizing to nf4" in text
    assert "Model quantized" not in text
    assert "Saving" not in text


def test_verbose_prints_skipped_roots_and_replaced_layers(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert front_doors.convert(["--model", str(dense), "--output", str(out), "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    skipped = [line.split()[-1] for line in lines if "└── skipped" in line]
    assert skipped[:3] == ["model.visual", "model.language_model.embed_tokens", "lm_head"]
    replaced = [line.split()[-1] for line in lines if "└── replaced" in line]
    assert len(replaced) == 31
    assert "model.language_model.layers.3.self_attn.q_proj" in replaced


def test_convert_refuses_in_a_sentence(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        front_doors.convert(["--model", str(tmp_path / "x"), "--output", str(tmp_path / "out")])
        == 2
    )
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    assert front_doors.convert(["--model", str(dense), "--output", str(tmp_path / "taken")]) == 2
    assert "exists already" in capsys.readouterr().err
    text = run(dense, tmp_path / "text", "text").out
    assert front_doors.convert(["--model", str(text), "--output", str(tmp_path / "out")]) == 2
    assert "a text-only checkpoint" in capsys.readouterr().err


def test_strip_prints_what_it_dropped_and_checked(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nf4 = run(dense, tmp_path / "nf4").out
    out = tmp_path / "out"
    assert front_doors.strip(["--model", str(nf4), "--output", str(out)]) == 0
    text = capsys.readouterr().out
    visual = sum(name.startswith("model.visual.") for name in load_all(nf4))
    for line in (
        "Mode: bnb",
        f"dropped {visual} visual keys",
        "Config rebuilt",
        "architectures: ['Qwen3_5ForCausalLM']",
        "vision_config: absent",
        "quantization_config: present",
        "visual keys in shards: 0",
        "Quantized layers: 31 / 32 linear",
        "inference: skipped, the source has no tokenizer.json",
        f"Done. Saved to: {out}",
    ):
        assert line in text
    skip = read_config(out)["quantization_config"]["llm_int8_skip_modules"]
    assert "model.visual" not in skip
    assert "lm_head" in skip


def test_strip_of_a_bf16_checkpoint(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert front_doors.strip(["--model", str(dense), "--output", str(out), "--mode", "f16"]) == 0
    text = capsys.readouterr().out
    assert "quantization_config: absent" in text
    assert "Quantized layers" not in text


@pytest.mark.parametrize(("mode", "hint"), [("bnb", "--mode f16"), ("f16", "--mode bnb")])
def test_strip_refuses_the_other_kind_of_checkpoint(
    mode: str, hint: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old one wrote an unloadable folder and said Done."""
    source = dense if mode == "bnb" else run(dense, tmp_path / "nf4").out
    out = tmp_path / "out"
    assert front_doors.strip(["--model", str(source), "--output", str(out), "--mode", mode]) == 2
    assert hint in capsys.readouterr().err
    assert not out.exists()


def test_strip_of_the_embedded_checkpoint_answers_in_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert front_doors.strip(["--model", str(ASSET), "--output", str(out), "--mode", "f16"]) == 0
    found = re.search(r"inference: .* -> '(.*)' \(ok\)", capsys.readouterr().out)
    assert found is not None
    assert "Paris" in found[1]


def test_strip_fails_when_the_answer_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from checkpoints import random_tensors, write_checkpoint

    config = read_config(ASSET)
    sidecars = {
        name: (ASSET / name).read_text()
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    source = write_checkpoint(tmp_path / "in", config, random_tensors(config), sidecars=sidecars)
    out = tmp_path / "out"
    assert front_doors.strip(["--model", str(source), "--output", str(out), "--mode", "f16"]) == 1
    assert "FAILED, expected 'Paris'" in capsys.readouterr().out


def test_inspect_prints_shards_prefixes_and_sizes(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert front_doors.inspect([str(dense)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 shard(s)"
    assert any(line.startswith("model.language_model ") for line in lines)
    assert any(line.startswith("model.visual ") for line in lines)
    assert any(line.startswith("total ") for line in lines)


def test_upload_goes_through_its_modes(world: World) -> None:
    def upload(*arguments: object) -> tuple[int, str]:
        words = ("--local", world.folder, "--repo", REPO, *arguments)
        done = world.client.run(*words, entry="qwen35.cli.old.front_doors:upload")
        return done.code, done.out + done.err

    code, text = upload("--mode", "check")
    assert (code, world.hub.repos) == (0, {})
    assert "5 to upload / 0 to delete / 0 unchanged" in text
    assert upload("--private")[0] == 0
    assert world.repo.private
    (world.folder / "notes.md").write_text("new")
    (world.folder / "config.json").write_text("{}")
    assert upload("--mode", "files", "--files", "notes.md")[0] == 0
    (world.folder / "onnx" / "graph.txt").unlink()
    code, text = upload("--mode", "diff")
    assert code == 0
    assert "1 to upload / 0 to delete / 3 unchanged / 2 kept" in text
    assert upload("--mode", "diff", "--delete", "--message", "Clean")[0] == 0
    assert "onnx/graph.txt" not in world.repo.files
    titles = ["initial commit", "Upload model", "Update files", "Push changed files", "Clean"]
    assert world.repo.titles == titles
    world.repo.put({"notes.md": b"theirs"})
    code, text = upload("--mode", "fetch")
    assert "1 to download / 0 to remove / 3 unchanged" in text
    assert (world.folder / "notes.md").read_text() == "new"
    assert upload("--mode", "pull")[0] == 0
    assert (world.folder / "notes.md").read_text() == "theirs"


def test_upload_needs_a_repository_of_yours(world: World) -> None:
    """The old one's default was its author's."""
    done = world.client.run("--local", world.folder, entry="qwen35.cli.old.front_doors:upload")
    assert (done.code, "--repo" in done.err) == (2, True)


def test_commands_are_installed_under_their_names() -> None:
    for name in ("qwen35", "qwen35-convert", "qwen35-strip", "qwen35-inspect", "qwen35-upload"):
        program = Path(sys.executable).parent / name
        done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"usage: {name}")
