"""The verifier on what surrounds the weights: by meaning, beside the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import ASSET
from qwen35.checkpoint.open import fetch
from qwen35.checkpoint.source import open_folder
from qwen35.cli.main import main
from qwen35.planning.bounded_child import Limits
from qwen35.planning.safetensors_files.chat_template import text_only_template
from qwen35.verification.bounded_rendering import render
from qwen35.verification.conversations import text_conversations, vision_conversations
from qwen35.verification.opening import open_artifact
from qwen35.verification.settings_comparison import SettingsComparison
from qwen35.verification.source_comparison import compare_checkpoints
from qwen35.verification.template_comparison import compare_template
from qwen35.verification.verdict import verify
from running import run
from template_styles import SIMPLE

Edit = Callable[[dict[str, Any]], object]

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
PIXELS, FRAMES = "preprocessor_config.json", "video_preprocessor_config.json"
TEMPLATE = "chat_template.jinja"


def copy(folder: Path, source: Path = ASSET) -> Path:
    """Return a copy with links to the weights."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path.resolve())
        else:
            shutil.copy(path, folder)
    (folder / "qwen35.json").unlink(missing_ok=True)
    return folder


def edit(folder: Path, name: str, change: Edit) -> Path:
    path = folder / name
    parsed = json.loads(path.read_text())
    change(parsed)
    path.write_text(json.dumps(parsed))
    return folder


def compared(folder: Path, source: Path = ASSET) -> SettingsComparison:
    artifact = open_folder(folder)
    mtp = any(weight.name.startswith("mtp.") for weight in artifact.weights)
    return compare_checkpoints(artifact, open_folder(source), mtp=mtp)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(ASSET, tmp_path_factory.mktemp("settings") / "text", "text").out


def at(*keys: str | int, value: Any) -> Edit:
    """Return an edit of one value."""

    def change(parsed: Any) -> None:
        for key in keys[:-1]:
            parsed = parsed[key]
        parsed[keys[-1]] = value

    return change


def text_key(key: str, value: Any) -> Edit:
    return at("text_config", key, value=value)


def swap_tokens(parsed: dict[str, Any]) -> None:
    vocabulary = parsed["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def swap_merges(parsed: dict[str, Any]) -> None:
    merges = parsed["model"]["merges"]
    merges[5], merges[6] = merges[6], merges[5]


FAULTS: dict[str, tuple[str, Edit, str]] = {
    "rope theta": (
        CONFIG,
        lambda c: c["text_config"]["rope_parameters"].update(rope_theta=1e4),
        "rope_parameters.rope_theta is 10000.0, the source has 10000000",
    ),
    "yarn": (
        CONFIG,
        lambda c: c["text_config"]["rope_parameters"].update(rope_type="yarn", factor=4.0),
        "rope_parameters.rope_type is 'yarn', the source has 'default'",
    ),
    "a theta beside": (
        CONFIG,
        text_key("rope_theta", 1e4),
        "rope_theta is 10000.0, the source has absent",
    ),
    "rotary": (
        CONFIG,
        lambda c: c["text_config"]["rope_parameters"].update(partial_rotary_factor=1),
        "rope_parameters.partial_rotary_factor is 1, the source has 0.25",
    ),
    "sections": (
        CONFIG,
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[2, 3, 3]),
        "rope_parameters.mrope_section is [2, 3, 3], the source has [3, 3, 2]",
    ),
    "epsilon": (
        CONFIG,
        text_key("rms_norm_eps", 1e-2),
        "rms_norm_eps is 0.01, the source has 1e-06",
    ),
    "activation": (
        CONFIG,
        text_key("hidden_act", "relu"),
        "hidden_act is 'relu', the source has 'silu'",
    ),
    "gate": (
        CONFIG,
        text_key("attn_output_gate", value=False),
        "attn_output_gate is False, the source has True",
    ),
    "bias": (
        CONFIG,
        text_key("attention_bias", value=True),
        "attention_bias is True, the source has False",
    ),
    "length": (
        CONFIG,
        text_key("max_position_embeddings", 512),
        "max_position_embeddings is 512, the source has 262144",
    ),
    "layers": (
        CONFIG,
        lambda c: c["text_config"]["layer_types"].reverse(),
        "layer_types is ['full_attention', ",
    ),
    "end": (
        CONFIG,
        text_key("eos_token_id", 1),
        "text_config.eos_token_id is 1, the source has 4000",
    ),
    "tied": (
        CONFIG,
        at("tie_word_embeddings", value=False),
        "tie_word_embeddings is False, the source has True",
    ),
    "type": (CONFIG, text_key("dtype", "float16"), "dtype is 'F16', the source has 'BF16'"),
    "image token": (
        CONFIG,
        at("image_token_id", value=7),
        "image_token_id is 7, the source has 4012",
    ),
    "tower's activation": (
        CONFIG,
        at("vision_config", "hidden_act", value="gelu"),
        "vision_config.hidden_act is 'gelu', the source has 'gelu_pytorch_tanh'",
    ),
    "tower's rope": (
        CONFIG,
        at("vision_config", "rope_parameters", value={"rope_theta": 5}),
        "vision_config.rope_parameters is ",
    ),
    "ends": (
        GENERATION,
        at("eos_token_id", value=0),
        "eos_token_id is 0, the source has [4000, 4002]",
    ),
    "temperature": (
        GENERATION,
        at("temperature", value=0.1),
        "temperature is 0.1, the source has 1.0",
    ),
    "sampling": (
        GENERATION,
        at("do_sample", value=True),
        "do_sample is True, the source has False",
    ),
    "vocabulary": (TOKENIZER, swap_tokens, "2 tokens have different ids in the source: "),
    "merges": (TOKENIZER, swap_merges, "merge 5 is "),
    "a merge less": (
        TOKENIZER,
        lambda c: c["model"]["merges"].pop(),
        "3743 merges, the source has 3744",
    ),
    "added token": (
        TOKENIZER,
        at("added_tokens", 2, "content", value="<|end|>"),
        "added token 4002 is '<|end|>', the source has '<|im_end|>'",
    ),
    "special no more": (
        TOKENIZER,
        at("added_tokens", 2, "special", value=False),
        "added token 4002 is '<|im_end|>', the source has '<|im_end|>' with other flags",
    ),
    "added token gone": (
        TOKENIZER,
        lambda c: c["added_tokens"].pop(),
        "added token 4025 is absent, the source has '</think>'",
    ),
    "normalizer": (TOKENIZER, at("normalizer", value=None), "normalizer is [], the source has "),
    "byte fallback": (
        TOKENIZER,
        at("model", "byte_fallback", value=True),
        "model.byte_fallback is True, the source has False",
    ),
    "truncation": (
        TOKENIZER,
        at("truncation", value={"max_length": 4}),
        "truncation is {'max_length': 4}, the source has None",
    ),
    "end token": (
        SETTINGS,
        at("eos_token", value="<|endoftext|>"),
        "eos_token is '<|endoftext|>', the source has '<|im_end|>'",
    ),
    "begin token": (
        SETTINGS,
        at("add_bos_token", value=True),
        "add_bos_token is True, the source has False",
    ),
    "decoder": (
        SETTINGS,
        at("added_tokens_decoder", "4002", "content", value="x"),
        "added token 4002 is 'x', the source has '<|im_end|>'",
    ),
    "another class": (
        SETTINGS,
        at("tokenizer_class", value="LlamaTokenizer"),
        "tokenizer_class is 'LlamaTokenizer', the source has 'Qwen2Tokenizer'",
    ),
    "vocab.json": (
        "vocab.json",
        lambda c: c.update({"!": 1, '"': 0}),
        "2 tokens have different ids in the source: '!' has 1 here, 0 there",
    ),
    "mean": (
        PIXELS,
        at("image_mean", value=[0, 0, 0]),
        "image_mean is [0, 0, 0], the source has [0.5, 0.5, 0.5]",
    ),
    "video size": (
        FRAMES,
        at("size", "longest_edge", value=4096),
        "size is {'longest_edge': 4096, ",
    ),
    "resampling": (PIXELS, at("resample", value=0), "resample is 0, the source has 3"),
}


@pytest.mark.sentences
@pytest.mark.parametrize("fault", FAULTS)
def test_another_meaning_is_found(fault: str, tmp_path: Path) -> None:
    name, change, message = FAULTS[fault]
    found = compared(edit(copy(tmp_path / "x"), name, change)).findings
    assert found
    assert any(finding.message.startswith(message) for finding in found), found


def joint(folder: Path) -> None:
    """Move the preprocessors into one file, as transformers 5 saves them."""
    parts = {"image_processor": PIXELS, "video_processor": FRAMES}
    joined = {part: json.loads((folder / name).read_text()) for part, name in parts.items()}
    (folder / "processor_config.json").write_text(json.dumps(joined))
    for name in parts.values():
        (folder / name).unlink()


def resaved(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    for kind in (AutoConfig, GenerationConfig, AutoTokenizer):
        kind.from_pretrained(ASSET).save_pretrained(folder)


def by_tokenizers(folder: Path) -> None:
    from tokenizers import Tokenizer

    Tokenizer.from_file(str(ASSET / TOKENIZER)).save(str(folder / TOKENIZER), pretty=False)


def older_tokenizer(parsed: dict[str, Any]) -> None:
    """As older libraries wrote it: merges are strings, and some keys are missing."""
    parsed["model"]["merges"] = [" ".join(pair) for pair in parsed["model"]["merges"]]
    for key in ("byte_fallback", "ignore_merges", "unk_token"):
        del parsed["model"][key]
    parsed["model"]["continuing_subword_prefix"] = ""


def older_rope(parsed: dict[str, Any]) -> None:
    text = parsed["text_config"]
    rope = text.pop("rope_parameters")
    text |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
    text["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}


def without_slow_files(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


SAME: dict[str, Callable[[Path], object]] = {
    "transformers": resaved,
    "tokenizers": by_tokenizers,
    "older tokenizer": lambda f: edit(f, TOKENIZER, older_tokenizer),
    "rope scaling": lambda f: edit(f, CONFIG, older_rope),
    "defaults": lambda f: edit(f, GENERATION, lambda c: c.update(temperature=1.0, top_k=50)),
    "order": lambda f: edit(f, GENERATION, lambda c: c["eos_token_id"].reverse()),
    "joint": joint,
    "pixels": lambda f: edit(f, PIXELS, at("min_pixels", value=4096)),
    "no slow files": without_slow_files,
    "template in the settings": lambda f: edit(
        f, SETTINGS, at("chat_template", value=(f / TEMPLATE).read_text())
    ),
    "no numbers": lambda f: edit(f, CONFIG, lambda c: c["text_config"].update(use_cache=False)),
}


@pytest.mark.parametrize("way", SAME)
def test_the_same_meaning_in_other_words_passes(way: str, tmp_path: Path) -> None:
    folder = copy(tmp_path / "x")
    SAME[way](folder)
    result = compared(folder)
    assert (result.findings, result.notes, result.skipped) == ([], [], [])


def test_what_transformers_writes_for_settings_that_were_missing(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, folder = copy(tmp_path / "source"), copy(tmp_path / "x")
    edit(source, SETTINGS, lambda c: [c.pop(key) for key in ("unk_token", "model_max_length")])
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    written = json.loads((folder / SETTINGS).read_text())
    assert written["unk_token"] == "<|endoftext|>"
    assert written["model_max_length"] > 10**29
    assert compared(folder, source).findings == []
    edit(folder, SETTINGS, lambda c: c.update(unk_token="<|im_end|>", model_max_length=512))
    messages = [one.message for one in compared(folder, source).findings]
    assert [message.split()[0] for message in messages] == ["unk_token", "model_max_length"]


def test_text_only_outputs_pass(text: Path, tmp_path: Path) -> None:
    assert compared(text).findings == []
    broken = edit(copy(tmp_path / "x", text), CONFIG, at("rms_norm_eps", value=0.5))
    (finding,) = compared(broken).findings
    assert finding.message == "rms_norm_eps is 0.5, the source has 1e-06"


@pytest.mark.sentences
def test_templates_are_compared_by_what_they_write(text: Path, tmp_path: Path) -> None:
    broken = copy(tmp_path / "x", text)
    template = (broken / TEMPLATE).read_text()
    (broken / TEMPLATE).write_text(template.replace("'user'", "'system'", 1))
    found = compared(broken).findings
    assert {finding.check for finding in found} == {"template"}
    assert "conversations differ from the source's" in found[-1].message
    (broken / TEMPLATE).write_text("{# another text #}" + template)
    result = compared(broken)
    assert result.findings == []
    assert result.notes == [
        f"{TEMPLATE}: differs from the source's, but writes the same prompts for "
        f"{len(text_conversations())} conversations"
    ]
    (broken / TEMPLATE).unlink()
    (finding,) = compared(broken).findings
    assert finding.message == "no chat template 'default', the source has one"


def test_templates_that_files_state_differently_are_compared_file_by_file(tmp_path: Path) -> None:
    other = at("chat_template", value=[{"name": "default", "template": "{{ messages[0] }}"}])
    source = edit(copy(tmp_path / "source"), SETTINGS, other)
    out = run(source, tmp_path / "out", "text").out
    assert compared(out, source).findings == []
    edit(out, SETTINGS, at("chat_template", value="{{ messages }}"))
    assert {finding.subject for finding in compared(out, source).findings} == {SETTINGS}
    edit(out, SETTINGS, other)
    (out / TEMPLATE).unlink()  # loaders now take the other one
    assert {finding.subject for finding in compared(out, source).findings} == {SETTINGS}


def test_folders_of_templates_and_programs_are_not_silently_passed(tmp_path: Path) -> None:
    folder = copy(tmp_path / "x")
    (folder / "additional_chat_templates").mkdir()
    assert any("takes by name" in told for told in compared(folder).skipped)
    (folder / "custom_generate").mkdir()
    findings = verify(open_artifact(str(folder))).findings
    assert [finding.subject for finding in findings] == ["custom_generate/"]


def test_a_processor_of_another_family_is_a_finding(tmp_path: Path) -> None:
    folder = edit(
        copy(tmp_path / "x"), PIXELS, at("image_processor_type", value="CLIPImageProcessor")
    )
    (finding,) = compared(folder).findings
    assert finding.message.startswith("image_processor_type is 'CLIPImageProcessor'")
    edit(folder, PIXELS, at("image_processor_type", value="Qwen3VLImageProcessorFast"))
    assert compared(folder).findings == []


@pytest.mark.sentences
def test_a_template_that_never_ends_is_a_finding(text: Path, tmp_path: Path) -> None:
    broken = copy(tmp_path / "x", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen35.verification.bounded_rendering.LIMITS", Limits(1, 2**29))
        loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        (broken / TEMPLATE).write_text(loop)
        (finding,) = verify(open_artifact(str(broken))).findings
        assert compared(broken).findings == []  # one fault is told once
        result = SettingsComparison()
        compare_template(TEMPLATE, SIMPLE, loop, {}, vision=False, told=True, result=result)
    assert "takes too long or too much memory" in finding.message
    (finding,) = result.findings
    assert "not be compared: takes too long or too much memory" in finding.message


def test_conversations_reach_every_branch_of_the_template() -> None:
    """Each statement's removal changes a prompt, but for what no conversation can tell."""
    template = (ASSET / TEMPLATE).read_text()
    told = list((text_conversations() | vision_conversations()).values())
    words = ["system", "user", "assistant", "tool", "</think>", "<think>", "image", "video"]
    edits = [template.replace(f"'{word}'", f"'{word}?'") for word in words]
    edits.append(template.replace("is false", "is true"))
    edits.append(template.replace("add_generation_prompt", "not add_generation_prompt"))
    sound, *others = render([template, *edits], told)
    assert all(other != sound for other in others)
    changed = text_only_template(template, TEMPLATE)
    (same,) = render([changed], list(text_conversations().values()))
    failed = [one.failed for one in same]
    assert [one.text for one in same if not one.failed] == [
        one.text for one, bad in zip(sound, failed, strict=False) if not bad
    ]


@pytest.mark.parametrize("name", [GENERATION, TOKENIZER, SETTINGS, PIXELS, "vocab.json"])
@pytest.mark.parametrize("content", ["[]", "3", '"x"', "{", "null", "\xff", "{}"])
def test_a_damaged_file_is_a_finding(name: str, content: str, tmp_path: Path) -> None:
    broken = copy(tmp_path / "x")
    (broken / name).write_text(content, encoding="latin-1")
    assert compared(broken).findings


@pytest.mark.sentences
@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.pt",
        "modeling_qwen.py",
        "adapter_model.bin",
        "adapter_config.json",
    ],
)
def test_files_that_should_not_be_there(name: str, tmp_path: Path) -> None:
    folder = copy(tmp_path / "x")
    (folder / name).write_text("{}")
    (finding,) = verify(open_artifact(str(folder))).findings
    assert (finding.check, finding.subject) == ("files", name)


@pytest.mark.sentences
@pytest.mark.parametrize("name", [CONFIG, SETTINGS, PIXELS])
def test_code_from_elsewhere(name: str, tmp_path: Path) -> None:
    folder = edit(copy(tmp_path / "x"), name, at("auto_map", value={"AutoModel": "a/b--c.D"}))
    (finding,) = verify(open_artifact(str(folder))).findings
    assert (finding.check, finding.subject) == ("files", name)


def test_what_training_leaves_is_a_note(tmp_path: Path) -> None:
    folder = copy(tmp_path / "x")
    (folder / "training_args.bin").write_bytes(b"x")
    verdict = verify(open_artifact(str(folder)))
    assert (verdict.findings, len(verdict.notes)) == ((), 1)


@pytest.mark.sentences
def test_a_side_car_that_came_later(text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text, tmp_path / "x"))
    (folder / "added_tokens.json").write_text('{"x": 5}')
    (finding,) = verify(open_artifact(str(folder))).findings
    assert finding.message == "not listed in qwen35.json"
    (folder / "qwen35.json").unlink()
    found = verify(open_artifact(str(folder)), source=fetch(str(ASSET)), depth="numbers").findings
    assert [f.message for f in found] == ["added token 5 is 'x', the source has no such token"]


def test_a_verdict_names_its_depth(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(text), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["result"] == "passed: headers only, weights not read; --depth numbers reads them"
    assert said["source"] is None
    assert said["not_compared"] == [
        "without --source nothing tells whether weights, config, tokenizer and template are the "
        "original's"
    ]
    assert main(["verify", str(text), "--source", str(ASSET), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "not compared" not in out
    compared = "weights and settings compared with the source; not loaded, --depth behaviour does"
    assert out.endswith(f"passed: {compared}\n")
