"""`verify --endpoint`: a server in this process with one planted fault at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

import qwen35
from checkpoints import ASSET
from fake_server import FAULTS, Asked, FakeServer, Turn, asks, serving, when
from pages import ROOT
from qwen35.cli.main import main
from qwen35.errors import UsageError
from qwen35.verification.bounded_rendering import render

pytestmark = pytest.mark.sentences

CONTEXT = 700


def test_a_sound_server_passes() -> None:
    with serving() as fake:
        verdict = qwen35.verify(endpoint=fake.url, context=CONTEXT)
    assert verdict.findings == ()
    assert verdict.result == "passed: 11 answers right, 20 checks of the server"
    assert verdict.served is not None
    assert verdict.served.model.described == "vLLM, context 4096"


def test_progress_counts_what_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as fake:
        assert main(["verify", "--endpoint", fake.url, "--context", str(CONTEXT)]) == 0
    assert capsys.readouterr().err == "asking tiny: 30 questions\n"


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    fault = FAULTS[name]
    with serving(FakeServer(change=fault.change)) as fake:
        verdict = qwen35.verify(endpoint=fake.url, context=CONTEXT)
    assert any(fault.check == f.check and fault.words in f.message for f in verdict.findings), (
        verdict.findings
    )


# --- what is no fault


def test_a_refusal_is_a_note() -> None:
    """What a server cannot do is no finding: pictures, tools, roles, efforts."""
    cannot: dict[str, Callable[[Asked], bool]] = {
        "image": asks("left half"),
        "tools": lambda asked: "tools" in asked.body,
        "developer": lambda asked: "developer" in asked.roles,
        "effort": lambda asked: asked.effort == "low",
    }
    body = json.dumps({"detail": "not supported"}).encode()

    def change(asked: Asked, turn: Turn) -> Turn:
        unable = any(condition(asked) for condition in cannot.values())
        return replace(turn, status=400, raw=body) if unable else turn

    with serving(FakeServer(change=change)) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert verdict.findings == ()
    refused = [note for note in verdict.notes if "refuse" in note]
    assert len(refused) == 1 + 6 + 1 + 1
    assert "a picture: the server refuses it (HTTP 400 (not supported))" in refused


def test_a_server_without_our_extensions_is_asked_plainly() -> None:
    """OpenAI's own API refuses keys that it does not know; such a model reasons as it likes."""
    strange = ("chat_template_kwargs", "repetition_penalty")

    def change(asked: Asked, turn: Turn) -> Turn:
        unknown = any(name in asked.body for name in strange)
        return replace(turn, status=400, raw=b'{"error": "unknown key"}') if unknown else turn

    with serving(FakeServer(change=change, owner="someone")) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert verdict.passed
    assert len(verdict.answers) == 6
    notes = " ".join(verdict.notes)
    assert "without a penalty for repetition and without chat_template_kwargs" in notes
    assert "asked once, without reasoning" in notes


def test_ollama_is_told_to_think_by_its_own_key() -> None:
    show = {"details": {"quantization_level": "Q4_K_M"}, "capabilities": ["completion", "tools"]}
    routes: dict[str, Callable[[Any], Any]] = {
        "/api/show": lambda _: show,
        "/api/version": lambda _: {"version": "0.40.12"},
    }
    with serving(FakeServer(routes=routes, owner="library")) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert verdict.passed
    assert verdict.served is not None
    assert verdict.served.model.described == "Ollama 0.40.12, context 4096, Q4_K_M"
    assert len(verdict.answers) == 10  # it says that it takes no pictures
    bodies = [body for path, body in fake.heard if path.endswith("/chat/completions")]
    assert {body["reasoning_effort"] for body in bodies} == {"none", "low", "medium", "high"}
    assert not any("chat_template_kwargs" in body for body in bodies)


def test_a_server_that_varies_is_not_blamed_for_its_streams() -> None:
    count = iter(range(10**6))
    varies = when(asks("Summarize"), content=lambda _: f"A fox and a dog {next(count)}.")
    with serving(FakeServer(change=varies)) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert verdict.passed
    assert any("several answers at temperature 0" in note for note in verdict.notes)


def test_an_answer_without_a_reason_is_no_variation() -> None:
    change = when(lambda asked: not asked.streamed, finish="")
    with serving(FakeServer(change=change)) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    messages = [one.message for one in verdict.findings if one.check == "streaming"]
    assert "streamed finish_reason 'stop', expected as in one piece ''" in messages
    assert not any("several answers" in note for note in verdict.notes)


def test_reasoning_within_the_content_is_noted() -> None:
    """As vLLM and llama-cpp-python's server send it without a reasoning parser."""

    def change(asked: Asked, turn: Turn) -> Turn:
        if not asked.thinking:
            return turn
        return replace(turn, reasoning="", content=f"Let me see.</think>{turn.content}")

    with serving(FakeServer(change=change)) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert verdict.passed
    assert sum("without a reasoning parser" in note for note in verdict.notes) == 1


def test_a_server_that_dies_is_not_asked_everything() -> None:
    def die(asked: Asked, turn: Turn) -> Turn:
        return replace(turn, raw=b"<html>") if "tools" in asked.body else turn

    with serving(FakeServer(change=die)) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    lost = [finding for finding in verdict.findings if "not JSON" in finding.message]
    assert len(lost) == 4  # a streamed call, and three in a row
    assert "not asked: a tool's result" in verdict.notes


# --- templates and drafts


def _template_server(template: str, **options: Any) -> FakeServer:
    props = {
        "default_generation_settings": {"n_ctx": 2048},
        "chat_template": template,
        "modalities": {"vision": False},
        "model_path": "/models/x-Q4_K_M.gguf",
        "build_info": "b1",
    }
    return FakeServer(routes={"/props": lambda _: props}, owner="llamacpp", **options)


TEMPLATE = (ASSET / "chat_template.jinja").read_text("utf-8")


def test_the_template_of_llama_server_is_compared_with_the_sources() -> None:
    with serving(_template_server(TEMPLATE.replace("<think>", "<thinking>"))) as fake:
        verdict = qwen35.verify(endpoint=fake.url, source=ASSET)
    assert {finding.check for finding in verdict.findings} == {"template"}
    assert len(verdict.answers) == 10  # no picture: the server says that it takes none
    assert verdict.source == str(ASSET)
    with serving(_template_server(TEMPLATE)) as fake:
        assert qwen35.verify(endpoint=fake.url, source=ASSET).passed


def test_documented_efforts_and_switches_must_work() -> None:
    """A template that names levels and a switch; the server raises on one of each."""
    text = TEMPLATE + "{% if reasoning_effort == 'max' or preserve_thinking %}{% endif %}"

    def change(asked: Asked, turn: Turn) -> Turn:
        template = asked.body.get("chat_template_kwargs", {})
        raises = "preserve_thinking" in template or template.get("reasoning_effort") == "max"
        return replace(turn, status=400, raw=b'{"message": "raised"}') if raises else turn

    with serving(_template_server(text, change=change)) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    found = {(finding.check, finding.message) for finding in verdict.findings}
    assert ("effort", "reasoning_effort 'max': HTTP 400 (raised)") in found
    assert ("switches", "preserve_thinking True: HTTP 400 (raised)") in found
    assert not any("'low'" in message for _, message in found)


def test_earlier_reasoning_is_where_the_template_has_it() -> None:
    keeping = when(lambda _: True, prompt=lambda turn: turn.prompt)

    def keep(asked: Asked, turn: Turn) -> Turn:
        more = sum(len(m.get("reasoning_content", "").split()) for m in asked.messages)
        return replace(turn, prompt=(turn.prompt or 0) + more)

    expected = "by default, earlier reasoning is in the prompt, the template has it dropped"
    for change, found in ((keep, [expected]), (keeping, [])):
        with serving(_template_server(TEMPLATE, change=change)) as fake:
            verdict = qwen35.verify(endpoint=fake.url)
        assert [f.message for f in verdict.findings if f.check == "turns"] == found


@pytest.mark.parametrize("right", [True, False])
def test_the_prompts_of_vllm_are_compared_with_the_sources(right: bool) -> None:
    """`/tokenize` takes a conversation, `/detokenize` its tokens: together they show the prompt."""
    last: list[dict[str, Any]] = []

    def tokenize(body: Any) -> Any:
        last.append(body)
        return {"tokens": [1, 2, 3]}

    def detokenize(body: Any) -> Any:
        assert body == {"model": "tiny", "tokens": [1, 2, 3]}
        given = last[-1]
        variables = {**given, **given["chat_template_kwargs"]}
        prompt = render([TEMPLATE], [variables])[0][0].text
        return {"prompt": prompt if right else prompt.replace("assistant\n", "assistant:\n")}

    routes: dict[str, Callable[[Any], Any]] = {"/tokenize": tokenize, "/detokenize": detokenize}
    with serving(FakeServer(routes=routes)) as fake:
        verdict = qwen35.verify(endpoint=fake.url, source=ASSET)
    assert verdict.passed == right
    assert len(last) == (12 if right else 1)
    if not right:
        assert verdict.findings[0].check == "template"
        assert "question: the server writes '>assistant:" in verdict.findings[0].message


@pytest.mark.parametrize("name", ["vllm", "llamacpp"])
@pytest.mark.parametrize(("accepted", "words"), [(0, "none accepted"), (30, "")])
def test_drafts_that_are_never_accepted_are_found(name: str, accepted: int, words: str) -> None:
    count = iter(range(1, 10))

    def metrics(_: Any) -> bytes:
        times = next(count)
        return (
            "# TYPE x counter\n"
            f'{name}:spec_decode_num_draft_tokens_total{{engine="0"}} {60.0 * times}\n'
            f"{name}:spec_decode_num_accepted_tokens_total {accepted * times}\n"
            f"{name}:spec_decode_num_accepted_tokens_per_pos_total 7\n"
        ).encode()

    with serving(FakeServer(routes={"/metrics": metrics})) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert [f.check for f in verdict.findings] == (["speculation"] if words else [])
    assert all(words in finding.message for finding in verdict.findings)
    assert verdict.to_json()["served"]["acceptance"] == accepted / 60


# --- the command


def test_the_command_prints_and_exits_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as fake:
        assert main(["verify", "--endpoint", f"{fake.url}/v1/", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        schema = json.loads((ROOT / "docs" / "schemas" / "verify.json").read_text("utf-8"))
        jsonschema.validate(told, schema)
        assert (told["kind"], told["served"]["url"]) == ("served", fake.url)
        assert main(["verify", "--endpoint", fake.url]) == 0
    shown = capsys.readouterr().out
    assert f"tiny at {fake.url}: vLLM, context 4096" in shown
    assert shown.endswith("passed: 11 answers right, 19 checks of the server\n")
    with serving(FakeServer(change=FAULTS["a wrong answer"].change)) as fake:
        assert main(["verify", "--endpoint", fake.url, "--quiet"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "MODEL: missing; name an artifact, or a server with --endpoint"),
        (("x", "--endpoint", "URL"), "MODEL: is about files, not about a server; leave it out"),
        (("--endpoint", "URL", "--engine", "vllm"), "--engine: is about files, not about a server"),
        (("--endpoint", "URL", "--depth", "numbers"), "--depth: is about files"),
        (("x", "--model", "y"), "--model: is for --endpoint; give that, or leave it out"),
        (("x", "--timeout", "3"), "--timeout: is for --endpoint"),
        (
            ("--endpoint", "URL", "--model", "tin"),
            "--model tin: not served, expected tiny; did you",
        ),
        (("--endpoint", "URL", "--context", "9999"), "--context 9999: the server has 4096 tokens"),
        (("--endpoint", "ftp://x"), "--endpoint: 'ftp://x', expected an address such as http://"),
        (("--endpoint", "http://u:sesame@x/"), "--endpoint: an address with a user, a query or a"),
        (("--endpoint", "//u:sesame@x:99999/"), "--endpoint: 'x:99999/', expected an address"),
        (
            ("--endpoint", "URL", "--api-key-env", "NOWHERE"),
            "--api-key-env: no variable of that name",
        ),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as fake:
        assert main(["verify", *(fake.url if a == "URL" else a for a in arguments)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {sentence}")
    assert shown.count("\n") == 1
    assert "sesame" not in shown


def test_several_models_need_a_name() -> None:
    with serving(FakeServer(models=("a", "b\x1b[2J"))) as fake:
        with pytest.raises(UsageError, match=r"--model: missing, expected one of a, b\\x1b\[2J"):
            qwen35.verify(endpoint=fake.url)
        assert qwen35.verify(endpoint=fake.url, served_model="b\x1b[2J").passed
