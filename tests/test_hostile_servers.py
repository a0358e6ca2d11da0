"""Servers that are slow, busy, wrong or strange: bounded, told in a sentence, not believed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen35
from fake_server import Asked, FakeServer, Turn, serving, when
from hasty_client import HASTY, raw_server, talking
from patience import PATIENCE
from qwen35.api.evaluate_api import evaluate_tasks
from qwen35.cli.main import main
from qwen35.errors import EndpointError, UsageError
from qwen35.evaluation.served_speed import measure_served
from qwen35.serving import server_client, started_server
from qwen35.serving.endpoint import Endpoint
from qwen35.serving.served_model import ServedModel, draft_counts, identify
from qwen35.serving.server_client import Bounds, ServerClient
from qwen35.serving.token_scores import TokenScorer
from qwen35.threads import detached_map

Capture = pytest.CaptureFixture[str]
_CHAT = "/v1/chat/completions"


# --- time


def _stalls_late(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
    time.sleep(0.3)
    connection.sendall(b"1")
    time.sleep(1.5)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_stalls_late_ends_in_time(stream: bool) -> None:
    with raw_server(_stalls_late) as url, ServerClient(Endpoint(url), HASTY) as client:
        begun = time.monotonic()
        with pytest.raises(EndpointError, match=r"no whole answer within 0.4 s"):
            list(client.events("/x", {})) if stream else client.get("/x")
        assert time.monotonic() - begun < 0.65


def test_a_server_that_is_always_busy_is_not_asked_for_ever(tmp_path: Path) -> None:
    busy: Any = (429, {"retry-after": "0"}, b"busy")
    file = tmp_path / "tasks.jsonl"
    rows = [json.dumps({"prompt": f"{n}?", "number": n}) for n in range(200)]
    file.write_text("\n".join(rows))
    with serving(FakeServer(routes={_CHAT: lambda _: busy})) as fake:
        with pytest.raises(EndpointError, match=r"answers no task \(is busy \(HTTP 429\)"):
            evaluate_tasks(file, endpoint=fake.url)
        assert len(fake.heard) < 80


def test_tasks_end_when_a_server_dies(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    rows = [json.dumps({"prompt": f"{n}?", "number": n}) for n in range(40)]
    file.write_text("\n".join(rows))
    change = when(lambda asked: int(asked.text[:-1]) > 9, status=500, raw=b"gone")
    with serving(FakeServer(change=change)) as fake:
        with pytest.raises(EndpointError, match="8 tasks in a row with none"):
            evaluate_tasks(file, endpoint=fake.url)
        assert len(fake.heard) < 35


def test_questions_end_when_a_server_dies() -> None:
    left = iter(range(3))

    def die(asked: Asked, turn: Turn) -> Turn:
        return turn if next(left, None) is not None else Turn(raw=b"<html>")

    with serving(FakeServer(change=die)) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert "not asked: the other questions" in verdict.notes
    assert "not asked: a stream" in verdict.notes
    assert len([path for path, _ in fake.heard if path == _CHAT]) <= 6


def test_results_come_in_order_and_nothing_is_begun_after_an_error() -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 5:
            raise ValueError(number)
        time.sleep(0.002)
        return 2 * number

    assert list(detached_map(call, range(5), 3)) == [0, 2, 4, 6, 8]
    with pytest.raises(ValueError, match="5"):
        list(detached_map(call, range(1000), 3))
    time.sleep(0.02)
    assert len(begun) < 40


def test_an_interrupt_ends_at_once(tmp_path: Path) -> None:
    """While a server keeps eight answers back."""
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{n}?", "number": n}) for n in range(20)))
    with serving(FakeServer(delay=20.0)) as fake:
        words = [
            sys.executable,
            "-m",
            "qwen35",
            "evaluate",
            "--tasks",
            str(file),
            "--endpoint",
            fake.url,
        ]
        process = subprocess.Popen(words, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while len(fake.heard) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=10)
        assert process.returncode == 130
        assert time.monotonic() - begun < 3
        assert told.endswith(b"interrupted\n")


# --- limits of arguments


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--endpoint", "http://a..b"], "--endpoint: 'http://a..b', expected an address"),
        (["--endpoint", f"http://{'a' * 64}.de"], "--endpoint: 'http://aaa"),
        (["--endpoint", "http://127.0.0.1:1", "--timeout", "9" * 400], "--timeout: too long"),
        (["--endpoint", "http://127.0.0.1:1", "--context", "9" * 40], "--context: out of range"),
        (["--endpoint", "http://127.0.0.1:1", "--mtp-from", "x"], "--mtp-from: is about files"),
    ],
)
def test_arguments_out_of_range(arguments: list[str], sentence: str, capsys: Capture) -> None:
    assert main(["verify", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")


def test_evaluate_has_a_timeout(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "x", "exact": "x"}')
    with serving(FakeServer(delay=3.0)) as fake:
        asked = ["evaluate", "--tasks", str(file), "--endpoint", fake.url, "--timeout", "1"]
        assert main(asked) == 2
    assert "no whole answer within 1 s" in capsys.readouterr().err
    assert main(["evaluate", "x", "--timeout", "1"]) == 2
    assert "--timeout: is for --endpoint" in capsys.readouterr().err


# --- strange answers


def test_cookies_are_not_kept() -> None:
    strange: Any = (200, {"set-cookie": "a=\xe9; Path=/"}, b"{}")
    with talking(FakeServer(routes={"/x": lambda _: strange})) as client:
        assert client.get("/x") == client.get("/x") == {}


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 5000])
def test_json_of_any_depth_is_a_sentence(depth: int) -> None:
    deep = json.loads("[" * 50 + "]" * 50)
    body = ("[" * depth + "]" * depth).encode()
    arguments = '{"trip": {"stops": ' + '{"a":' * depth + "1" + "}" * depth + '}, "seats": []}'
    call = Turn("", "", (("book_trip", arguments),), "tool_calls")
    fake = FakeServer(
        change=lambda asked, turn: call if "tools" in asked.body else turn,
        routes={"/version": lambda _: body, "/metrics": lambda _: deep},
    )
    fake.routes["/x"] = lambda _: (500, {}, body)
    with serving(fake):
        verdict = qwen35.verify(endpoint=fake.url)
        with (
            ServerClient(Endpoint(fake.url), HASTY) as client,
            pytest.raises(EndpointError, match=r"HTTP 500 \(\["),
        ):
            client.get("/x")
    assert {finding.check for finding in verdict.findings} == {"tools"}


def test_a_long_line_is_called_one() -> None:
    line = b"data: " + b"1" * (2**20 + 100)
    with (
        talking(FakeServer(routes={"/x": lambda _: line}), Bounds()) as client,
        pytest.raises(EndpointError, match="a stream with a line of more than 1048576 bytes"),
    ):
        list(client.events("/x", {}))


def test_names_forge_no_lines(tmp_path: Path, capsys: Capture) -> None:
    name = "x\nerror: forged\x1b[2J" + "y" * 5000
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"prompt": "x", "exact": "x", "id": "a\nforged"}))
    with serving(FakeServer(models=(name, "b"))) as fake:
        assert main(["verify", "--endpoint", fake.url, "--model", name]) == 0
        assert (
            main(["evaluate", "--tasks", str(file), "--endpoint", fake.url, "--model", name]) == 0
        )
        assert main(["verify", "--endpoint", fake.url, "--model", "c"]) == 2
    shown = capsys.readouterr()
    assert "\nforged" not in shown.out + shown.err
    assert "\nerror: forged" not in shown.out + shown.err
    assert max(map(len, (shown.out + shown.err).splitlines())) < 1000
    assert "\x1b[2J" not in shown.out + shown.err


# --- pictures


@pytest.mark.parametrize(
    ("status", "said", "unable"),
    [
        (500, "image input is not supported - hint: you may need to provide the mmproj", True),
        (500, "x is not a multimodal model", True),
        (400, "no", True),
        (500, "CUDA error while the image was encoded", False),
        (500, "failed to load mmproj", False),
        (500, "multimodal processor crashed", False),
    ],
)
def test_a_failure_with_a_picture_is_no_refusal(status: int, said: str, unable: bool) -> None:
    raw = json.dumps({"error": {"message": said}}).encode()
    change = when(lambda asked: "left half" in asked.text, status=status, raw=raw)
    with serving(FakeServer(change=change)) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert verdict.passed == unable
    assert any(said in note for note in verdict.notes) == unable


def test_a_failure_about_an_image_elsewhere_is_a_finding() -> None:
    raw = b'{"error": {"message": "image input is not supported"}}'
    with serving(
        FakeServer(change=when(lambda asked: "tools" in asked.body, status=500, raw=raw))
    ) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert "tools" in {finding.check for finding in verdict.findings}


# --- figures that cannot be


def _rows(*rows: dict[str, float]) -> Any:
    told = [{name: {"logprob": value} for name, value in row.items()} for row in rows]
    return {"choices": [{"prompt_logprobs": [None, *told]}]}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (({"2": -0.1, "5": -0.2}, {"3": -1.0}), "probabilities of more than 1 for token 1"),
        (({"2": -1.0}, {"3": 0.5}), "a log probability above 0 for token 2"),
        (({"2": -1e308}, {"3": -1.0}), "tells nothing about token 1"),
        (({str(n): -9.0 for n in range(2, 300)}, {"3": -1.0}), "tells 298 tokens at a position"),
    ],
)
def test_log_probabilities_that_are_none(rows: Any, found: str) -> None:
    answers = [_rows({"2": -1.0}, {"3": -1.0}), _rows(*rows)]
    fake = FakeServer(routes={"/v1/completions": lambda _: answers.pop(0)})
    with talking(fake) as client, pytest.raises(EndpointError, match=found):
        TokenScorer(client, ServedModel("x", "vllm")).scores([1, 2, 3], [0, 1])


@pytest.mark.parametrize(
    "lines",
    ["draft{} inf", "draft nan", "draft -5", "draft 5\nACC 1e999", "ACC 5"],
)
def test_counters_that_are_none(lines: str) -> None:
    text = lines.replace("draft", "vllm:spec_decode_num_draft_tokens")
    text = text.replace("ACC", "vllm:spec_decode_num_accepted_tokens")
    with talking(FakeServer(routes={"/metrics": lambda _: text.encode()})) as client:
        assert draft_counts(client) is None


def test_an_acceptance_above_one_is_not_told() -> None:
    count = iter(range(1, 100))

    def metrics(_: Any) -> bytes:
        number = next(count)
        names = {"draft": 10 * number, "accepted": 30 * number}
        lines = [f"vllm:spec_decode_num_{n}_tokens_total {v}" for n, v in names.items()]
        return "\n".join(lines).encode()

    with serving(FakeServer(routes={"/metrics": metrics})) as fake:
        verdict = qwen35.verify(endpoint=fake.url)
    assert verdict.served is not None
    assert verdict.served.acceptance is None
    assert not any("drafted" in note for note in verdict.notes)


def _counting(prompt: int, completion: int, texts: list[str]) -> Callable[[Any], bytes]:
    events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    events.append({"choices": [], "usage": usage})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n"
    return lambda _: body.encode()


def test_a_speed_is_measured_or_refused() -> None:
    counting = _counting(500, 32, ["a", "b"])

    def kept_back(body: Any) -> bytes:
        time.sleep(0.02)
        return counting(body)

    fake = FakeServer(routes={_CHAT: kept_back})
    with talking(fake, Bounds()) as client:
        [alone, _] = measure_served(client, ServedModel("x"))
        assert 0 < alone.generation < 3e5  # all comes at once: by the whole time
        assert all(0 < value < 1 for value in alone.first)
        fake.routes[_CHAT] = _counting(500, 10**12, ["a"])
        with pytest.raises(EndpointError, match="counts 1500 tokens of 3 prompts, and 30000000"):
            measure_served(client, ServedModel("x"))
        fake.routes[_CHAT] = _counting(500, 32, [])
        with pytest.raises(EndpointError, match="generates nothing"):
            measure_served(client, ServedModel("x"))


def test_a_list_of_long_names_is_searched_quickly() -> None:
    names = tuple("a" * 3000 + str(n) for n in range(1500))
    with talking(FakeServer(models=names), Bounds()) as client:
        begun = time.monotonic()
        with pytest.raises(UsageError, match="not served"):
            identify(client, "b" * 3000)
        assert time.monotonic() - begun < 5


# --- servers that are started


def _command(url: str, *more: str) -> str:
    port = url.rpartition(":")[2]
    program = Path(__file__).parent / "starting_server.py"
    return " ".join([sys.executable, f"'{program}'", port, *more])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_a_server_is_started_and_ended(tmp_path: Path, capsys: Capture) -> None:
    url = f"http://127.0.0.1:{_free_port()}"
    children = tmp_path / "children"
    command = _command(url, str(children))
    assert main(["verify", "--endpoint", url, "--serve", command]) == 0
    assert "passed: 11 answers right" in capsys.readouterr().out
    [child] = children.read_text().split()
    ends = time.monotonic() + PATIENCE
    while _lives(child):  # for an instant after it was killed
        assert time.monotonic() < ends
        time.sleep(0.01)


def _lives(process: str) -> bool:
    """Whether a process runs, and does not wait for whoever adopted it."""
    try:
        return Path("/proc", process, "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("/nowhere/server -x", "--serve: /nowhere/server cannot be started (No such file"),
        ("'a", "--serve: not a command (No closing quotation)"),
        (" ", "--serve: an empty command"),
        (f"{sys.executable} -c 'print(5); raise SystemExit(3)'", "URL: the server that --serve "
         "starts ends with exit code 3 (5)"),
        ("true", "URL: the server that --serve starts ends with exit code 0; it must stay in the"),
        ("bash -c 'yes much | head -c 3000000; echo end; kill -9 $$'", "URL: the server that "
         "--serve starts is ended by SIGKILL (end)"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_start(command: str, sentence: str, capsys: Capture) -> None:
    url = f"http://127.0.0.1:{_free_port()}"
    assert main(["verify", "--endpoint", url, "--serve", command]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence.replace('URL', url)}")


def test_serve_needs_an_address_of_its_own(capsys: Capture) -> None:
    with serving() as fake:
        assert main(["verify", "--endpoint", fake.url, "--serve", "true"]) == 2
        assert f"--serve: something answers at {fake.url} already" in capsys.readouterr().err
    assert main(["verify", "x", "--serve", "true"]) == 2
    assert "--serve: is for --endpoint" in capsys.readouterr().err
    assert main(["evaluate", "x", "--serve", "true"]) == 2
    assert "--serve: given 1 times, for 0 --endpoint" in capsys.readouterr().err
    assert main(["evaluate", "x", "--dry-run", "--serve", "true"]) == 2
    assert "--serve: is not for --dry-run" in capsys.readouterr().err


DIED = "the server that --serve starts ends with exit code 7 (no memory is left)"


def test_a_server_that_dies_when_asked_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    """What it wrote last says why; what was lost with it is no answer."""
    monkeypatch.setattr(server_client, "Bounds", lambda seconds: Bounds(seconds, pause=0.01))
    url = f"http://127.0.0.1:{_free_port()}"
    given = ["--endpoint", url, "--serve", _command(url, str(tmp_path / "children"), "Translate")]
    assert main(["verify", *given]) == 1
    shown = capsys.readouterr().out
    assert f"error: the server: {DIED} [request]" in shown
    assert "Translate to French: 'The sky is blue.'" in shown
    file = tmp_path / "tasks.jsonl"
    rows = [{"prompt": text, "exact": "Paris"} for text in ("What is the capital of France?",
                                                            "Translate this.")]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    assert main(["evaluate", "--tasks", str(file), *given]) == 2
    after = capsys.readouterr()
    assert f"error: {url}: {DIED}" in after.err
    assert "share" not in after.out


def test_a_wait_for_a_server_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(started_server, "FIRST_WORD", 0.2)
    monkeypatch.setattr(started_server, "START_SECONDS", 0.5)
    url = f"http://127.0.0.1:{_free_port()}"
    command = f"{sys.executable} -uc 'import time; print(\"reading\"); time.sleep(60)'"
    assert main(["verify", "--endpoint", url, "--serve", command]) == 2
    [note, *_, error] = capsys.readouterr().err.splitlines()
    found = "the server that --serve starts does not answer"
    assert note.startswith(f"note: {url}: {found} yet, after 0 s")
    assert error == f"error: {url}: {found} within 0.5 s (reading); is this its address?"


def _always(answer: Any) -> Callable[[Any], Any]:
    return lambda _: answer


def test_a_gateway_before_a_server_that_loads_is_waited_for() -> None:
    for status, there in ((502, False), (503, False), (504, False), (401, True), (404, True)):
        with serving(FakeServer(routes={"/v1/models": _always((status, {}, b""))})) as fake:
            assert started_server.answers(Endpoint(fake.url)) is there
