"""`qwen35 ui` without a browser: what it offers, runs and shows, and whom it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import qwen35
from patience import PATIENCE
from qwen35.api.plan_api import types_that_fit
from qwen35.cli.console import Console
from qwen35.cli.main import main, parser_of
from qwen35.errors import InputError, Qwen35Error, UsageError, extra_hint
from qwen35.ui import jobs as jobs_module
from qwen35.ui.actions import ACTIONS, STARTED, Field
from qwen35.ui.jobs import Job, Jobs
from qwen35.ui.previews import preview, shown_command

pytest.importorskip("uvicorn", reason="the extra ui is not installed")
testclient = pytest.importorskip("starlette.testclient", reason="the extra ui is not installed")
web_module = pytest.importorskip("qwen35.ui.web_app", reason="the extra ui is not installed")

TOKEN, PORT = "t" * 32, 8735
HOME = f"http://127.0.0.1:{PORT}"
SCHEMA = Path(__file__).parent.parent / "docs" / "schemas" / "ui.json"
Capture = pytest.CaptureFixture[str]


# --- what is offered


def example(field: Field) -> Any:
    """Return a value that the field's command takes."""
    special: dict[str, Any] = {
        "types": ["Q8_0", "Q4_K_M"],
        "mtp": "drop",
        "depth": "numbers",
        "memory": "8GB",
        "fit": "6GB",
        "loss": "0.02",
    }
    kinds: dict[str, Any] = {"flag": True, "number": "12", "list": ["a b", "it's"], "text": "x y"}
    return special.get(field.name, kinds[field.kind])


@pytest.mark.parametrize("name", ACTIONS)
def test_every_field_is_an_argument_of_its_command(name: str) -> None:
    action = ACTIONS[name]
    given = {field.name: example(field) for field in action.fields}
    verb, *words = shlex.split(shown_command(action.arguments(action.values(given))))[1:]
    parsed = vars(parser_of(verb).parse_args(words))
    for field in action.fields:
        value, expected = parsed[field.name], given[field.name]
        if field.name in ("memory", "fit"):
            assert value in (8 * 10**9, 6 * 10**9)
        elif field.name == "mmproj":
            assert value == "F16"
        elif field.joined:
            assert value == ",".join(expected)
        elif field.kind in ("list", "flag"):
            assert value == expected
        else:
            assert str(value) == expected


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("model", 7, "MODEL: is of type int, expected a text"),
        ("model", None, "MODEL: is of type NoneType, expected a text"),
        ("model", ["a"], "MODEL: is of type list, expected a text"),
        ("model", "--help", "MODEL: '--help' begins like an option; write ./--help for a file of"),
        ("model", " -x", "MODEL: '-x' begins like an option"),
        ("model", "a\0b", "MODEL: holds control characters; type it again"),
        ("model", "a\nb", "MODEL: holds control characters"),
        ("model", "\ud800", "MODEL: holds control characters"),
        ("model", "x" * 5000, "MODEL: 5000 characters, expected at most 4096"),
        ("keep", "self_attn", "--keep: is of type str, expected a list of texts"),
        ("keep", [["a"]], "--keep: holds list, expected texts"),
        ("keep", ["a"] * 65, "--keep: 65 values, expected at most 64"),
        ("keep", ["--out"], "--keep: '--out' begins like an option"),
        ("overwrite", "true", "--overwrite: is of type str, expected true or false"),
        ("overwrite", 1, "--overwrite: is of type int, expected true or false"),
        ("threads", "two", "--threads: 'two', expected a positive number"),
        ("threads", "²", "--threads: '²', expected a positive number"),
        ("threads", "9" * 10, "--threads: '9999999999', expected a positive number"),
        ("threads", "0", "--threads: '0', expected a positive number"),
        ("model", "\u202egpj.exe", "MODEL: holds control characters"),
        ("model", "a\u2028b", "MODEL: holds control characters"),
        ("threads", True, "--threads: is of type bool, expected a text"),
        ("hf_token", "x", "convert: 'hf_token' is unknown, expected model, out, recipe, keep"),
    ],
)
def test_values_from_a_browser_may_be_anything(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        ACTIONS["convert"].values({name: value})


@pytest.mark.parametrize("given", [None, [], "x", 1, {1: 2}])
def test_values_are_an_object_of_names(given: Any) -> None:
    with pytest.raises(UsageError, match="values: are of type|convert: '1' is unknown"):
        ACTIONS["convert"].values(given)


@pytest.mark.parametrize("name", [None, 3, ["convert"], "rm", "__class__", "fit"])
def test_only_what_is_offered_is_started(name: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="action: .* is unknown, expected convert, gguf, verify"):
        asyncio.run(Jobs(tmp_path).start(name, {}))


def test_a_command_is_quoted_as_a_shell_reads_it() -> None:
    odd = ["$(rm -rf x)", "it's", "a b", "*", "~", "`x`", "é", ";", "&&", "#", "$HOME"]
    values = {"base": odd[0], "candidates": odd[1:], "text": "t.txt"}
    command = preview("evaluate", values)["command"]
    assert shlex.split(command) == ["qwen35", "evaluate", *odd, "--text", "t.txt"]
    done = subprocess.run(
        ["/bin/sh", "-c", command.replace("qwen35", "printf '%s\\n'", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["evaluate", *odd, "--text", "t.txt"]


def test_what_is_missing_has_a_name_in_the_command() -> None:
    assert preview("convert", {"recipe": "fp8"}) == {
        "command": "qwen35 convert MODEL OUT --recipe fp8",
        "plan_command": "qwen35 plan MODEL --recipe fp8",
        "error": "MODEL: not given; fill in model",
    }
    assert preview("publish", {"folder": "o"})["command"] == (
        "qwen35 publish o REPO --dry-run --save DIFFERENCE"
    )


# --- plans


@pytest.mark.parametrize(
    ("action", "values", "keywords"),
    [
        ("convert", {"recipe": "nf4"}, {"recipe": "nf4"}),
        ("convert", {"recipe": "text", "keep": []}, {"recipe": "text"}),
        ("convert", {"mtp": "drop", "out": "o"}, {"mtp": "drop"}),
        ("gguf", {"types": ["Q4_K_M"], "overwrite": True}, {"types": ["Q4_K_M"]}),
    ],
)
def test_a_plan_is_that_of_the_api(action: str, values: Any, keywords: Any) -> None:
    shown = preview(action, {"model": "Qwen3.5-0.8B", **values})
    planned = qwen35.plan("Qwen3.5-0.8B", **keywords)
    assert shown["plan"]["files"] == [[name, f"{size:,}"] for name, size in planned.all_sizes()]
    assert planned.digest in shown["plan"]["text"]
    assert shown["plan"]["notes"] == list(planned.notes)
    by_op = sum(nbytes for _, nbytes, _ in shown["plan"]["shares"])
    assert by_op == sum(step.nbytes for step in planned.steps)


def test_a_plan_obeys_the_machine() -> None:
    model = {"model": "Qwen3.5-0.8B"}
    figures = preview("convert", {**model, "threads": "1"})["plan"]["figures"]
    assert figures[-1][1].endswith("of memory, 1 threads")
    assert preview("convert", {**model, "memory": "1MB"})["error"].startswith("--memory 1.00 MB: ")
    assert preview("convert", {**model, "memory": "x"})["error"].startswith("--memory: 'x', exp")


def test_the_types_that_fit_are_those_of_the_api() -> None:
    given = {"model": "Qwen3.5-9B", "fit": "6GB", "context": "8192"}
    shown = preview("fit", given)
    found = types_that_fit("Qwen3.5-9B", "6GB", context=8192)
    assert [row[0] for row in shown["fit"]["rows"]] == [row.type for row in found.types]
    assert shown["command"] == "qwen35 plan Qwen3.5-9B --fit 6GB --context 8192"


@pytest.mark.parametrize("values", [{"model": "no/such/place"}, {"recipe": "nf5"}, {"keep": ["x"]}])
def test_errors_are_the_sentences_of_the_api(values: dict[str, Any]) -> None:
    given = {"model": "Qwen3.5-0.8B", **values}
    with pytest.raises(Qwen35Error) as error:
        qwen35.plan(**given)
    assert preview("convert", given)["error"] == str(error.value)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(36, "File name too long", "x" * 99), f"{'x' * 77}...: File name too long"),
        (PermissionError(13, "Permission denied", "a\x1b"), "a\\x1b: Permission denied"),
        (OSError(), "a file: OSError"),
        (MemoryError(), "memory: not enough for this plan"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise error

    monkeypatch.setattr(qwen35, "plan", refused)
    assert preview("convert", {"model": "Qwen3.5-9B"})["error"] == sentence


# --- who may use it


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    app = web_module.web_app(Jobs(tmp_path, [sys.executable, "-c", "print(1)"]), TOKEN, PORT)
    with testclient.TestClient(app, base_url=HOME, raise_server_exceptions=False) as one:
        one.headers["authorization"] = f"Bearer {TOKEN}"
        yield one


REFUSED = {
    "no token": {"authorization": ""},
    "a wrong token": {"authorization": f"Bearer {TOKEN[:-1]}x"},
    "a part of the token": {"authorization": f"Bearer {TOKEN[:-1]}"},
    "odd bytes": {"authorization": b"Bearer \xff\xfe"},
    "a foreign name": {"host": "evil.example"},
    "a foreign name, our port": {"host": f"evil.example:{PORT}"},
    "a name that begins like ours": {"host": f"127.0.0.1.evil.example:{PORT}"},
    "no port": {"host": "127.0.0.1"},
    "another port": {"host": "127.0.0.1:80"},
    "a foreign origin": {"origin": "http://evil.example"},
    "an origin of another port": {"origin": "http://127.0.0.1:8000"},
    "an origin that begins like ours": {"origin": f"{HOME}.evil.example"},
    "no origin, of a sandbox": {"origin": "null"},
    "another scheme": {"origin": f"https://127.0.0.1:{PORT}"},
    "another name of ours": {"origin": f"http://localhost:{PORT}"},
    "another site": {"sec-fetch-site": "cross-site"},
    "another port's page": {"sec-fetch-site": "same-site"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_strangers_are_refused(kind: str, client: Any) -> None:
    asked = {"json": {"action": "verify", "values": {"model": "x"}}}
    for path in ("/preview", "/jobs", "/report", "/nothing"):
        reply = client.post(path, headers=REFUSED[kind], **asked)
        assert reply.status_code == 403, path
        assert re.fullmatch(r"(Host|Origin|Sec-Fetch-Site|token): .+", reply.json()["error"])
    assert client.get("/events", headers=REFUSED[kind]).status_code == 403


def test_our_own_page_is_answered(client: Any) -> None:
    asked = {"json": {"action": "verify", "values": {"model": "x"}}}
    own = {"origin": HOME, "sec-fetch-site": "same-origin"}
    assert client.post("/preview", headers=own, **asked).json() == {"command": "qwen35 verify x"}
    local = {"host": f"localhost:{PORT}", "origin": f"http://localhost:{PORT}"}
    assert client.post("/preview", headers=local, **asked).status_code == 200


def test_the_page_needs_the_token_in_its_address(client: Any) -> None:
    for query in ("", "?token=", "?token=x", "?token=%ff", f"?token={TOKEN}x", f"?x={TOKEN}"):
        assert client.get(f"/{query}").status_code == 403, query
    assert client.get(f"/?token={TOKEN}", headers={"authorization": ""}).status_code == 200
    # but not for anything else: addresses are kept in histories
    no_header = {"authorization": ""}
    assert client.get(f"/events?token={TOKEN}", headers=no_header).status_code == 403


def test_the_page_runs_its_own_script_alone_and_loads_nothing(client: Any) -> None:
    reply = client.get(f"/?token={TOKEN}")
    html, policy = reply.text, reply.headers["content-security-policy"]
    for part in ("script", "style"):
        (held,) = re.findall(rf"<{part}>(.*?)</{part}>", html, re.DOTALL)
        assert f"{part}-src 'sha256-{b64encode(sha256(held.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; frame-anc")
    assert "unsafe" not in policy
    assert TOKEN not in html
    outside = re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="([^"#]+)"', outside) == ["data:,"]
    assert not re.search(r"\son\w+=|style=|https?://|@import|url\(", html.replace("onclose", ""))
    assert len(html) < 60_000


def test_models_are_offered_as_far_as_one_may_look(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "it.gguf").touch()
    real = os.stat

    def stat(path: Any, *given: Any, **named: Any) -> os.stat_result:
        if "private" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *given, **named)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.chdir(tmp_path)
    reply = client.get(f"/?token={TOKEN}")
    assert '<option value="it.gguf">' in reply.text


def test_every_answer_is_closed_to_others(client: Any) -> None:
    for reply in (client.get("/"), client.get("/nothing"), client.get(f"/?token={TOKEN}")):
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
        assert "access-control-allow-origin" not in reply.headers


# --- odd requests


@pytest.mark.parametrize(
    ("body", "kind", "status", "sentence"),
    [
        (b"x" * (2**16 + 1), "application/json", 413, "the body: more than 65536 bytes"),
        (b"[" * 60_000, "application/json", 400, "the body: not JSON"),
        (b"9" * 60_000, "application/json", 400, "the body: not JSON"),
        (b"\xff\xfe", "application/json", 400, "the body: not JSON"),
        (b"", "application/json", 400, "the body: not JSON"),
        (b"[]", "application/json", 400, "the body: of type list, expected an object"),
        (b"null", "application/json", 400, "the body: of type NoneType, expected an object"),
        (b"NaN", "application/json", 400, "the body: of type float, expected an object"),
        (b"{}", "text/plain", 415, "the body: not application/json"),
        (b"action=verify", "application/x-www-form-urlencoded", 415, "the body: not application/"),
        (b"{}", "application/json", 422, "action: 'None' is unknown"),
        (b'{"action": {}}', "application/json", 422, "action: '{}' is unknown"),
        (b'{"action": "verify"}', "application/json", 422, "values: are of type NoneType"),
    ],
)
def test_odd_bodies(body: bytes, kind: str, status: int, sentence: str, client: Any) -> None:
    for path in ("/preview", "/jobs"):
        reply = client.post(path, content=body, headers={"content-type": kind})
        assert (reply.status_code, reply.json()["error"][: len(sentence)]) == (status, sentence)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/static/../ui.js",
        "/pages/..%2f..%2fetc%2fpasswd",
        "/pages/",
        "/pages/x",
        "//etc/passwd",
        "/jobs/1/../../x",
        "/%00",
        "/ui.html.jinja",
    ],
)
def test_there_are_no_files(path: str, client: Any) -> None:
    reply = client.get(path)
    assert reply.status_code in (404, 405)
    assert "error" in reply.json()


def test_jobs_that_do_not_exist(client: Any) -> None:
    for number in ("7", "9" * 40):
        for what in ("cancel", "apply"):
            reply = client.post(f"/jobs/{number}/{what}", json={})
            assert reply.status_code == 422
            assert reply.json()["error"].startswith(f"job {number}: unknown")
    for number in ("-1", "9" * 5000, "²", "1.5"):
        assert client.post(f"/jobs/{number}/cancel", json={}).status_code == 404
    assert client.post("/jobs/1/explode", json={}).status_code == 404


def test_a_bug_is_told_here_and_there(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(web_module, "preview", broken)
    reply = client.post("/preview", json={})
    assert reply.status_code == 500
    assert reply.json()["error"].startswith("ZeroDivisionError: a bug; the terminal of qwen35 ui")


# --- reports


def test_a_report_is_read_in_a_sandbox(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "report_page", lambda values: f"<p>{values['reports'][0]}")
    pages = [
        client.post("/report", json={"values": {"reports": [str(i)]}}).json()["page"]
        for i in range(10)
    ]
    assert len(set(pages)) == 10
    assert all(re.fullmatch(r"/pages/[\w-]{32}", page) for page in pages)
    reply = client.get(pages[-1], headers={"authorization": ""})  # a frame sends no header
    assert reply.text == "<p>9"
    policy = reply.headers["content-security-policy"]
    assert policy == "sandbox allow-scripts; frame-ancestors 'self'"
    assert client.get(pages[-1], headers={"host": "evil.example"}).status_code == 403
    assert [client.get(page).status_code for page in pages] == [404, 404, *[200] * 8]


def test_reports_that_are_none(client: Any, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(InputError) as error:
        qwen35.report(tmp_path)
    for values, sentence in (
        ({"reports": [str(tmp_path)]}, str(error.value)),
        ({}, "REPORT: not given; fill in reports"),
        ({"reports": ["x"], "loss": "much"}, "--loss: 'much', expected a number of nats such as"),
        ({"reports": ["x"], "loss": "nan"}, "--loss: nan, expected a positive number of nats"),
    ):
        reply = client.post("/report", json={"values": values})
        assert reply.status_code == 422
        assert reply.json()["error"].startswith(sentence)


# --- jobs

VERIFY: dict[str, Any] = {"model": "x"}


def with_jobs(program: str, work: Callable[[Jobs], Awaitable[None]]) -> None:
    """Run `work` with jobs that run a Python program."""

    async def whole() -> None:
        jobs = Jobs(Path("saved"), [sys.executable, "-S", "-c", program])
        try:
            await asyncio.wait_for(work(jobs), PATIENCE)
        finally:
            await jobs.close()

    asyncio.run(whole())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def finished(job: Job) -> None:
    await until(lambda: not job.running)


def ended(program: str, name: str = "verify", values: Any = None) -> Job:
    """Run one job to its end."""
    found: list[Job] = []

    async def work(jobs: Jobs) -> None:
        found.append(await jobs.start(name, values or VERIFY))
        await until(lambda: not found[0].running)

    with_jobs(program, work)
    return found[0]


def test_a_job_is_the_command_that_is_shown() -> None:
    values = {"model": "it's", "source": "$(a) b", "depth": "numbers"}
    job = ended("import sys, shlex; print(shlex.join(['qwen35', *sys.argv[1:]]))", values=values)
    assert job.state == "done"
    assert list(job.lines) == [job.to_json()["command"]]
    assert job.to_json()["command"] == preview("verify", values)["command"]


def test_a_job_runs_qwen35(tmp_path: Path) -> None:
    async def work() -> Job:
        jobs = Jobs(tmp_path)
        job = await jobs.start("verify", {"model": str(tmp_path / "no such")})
        await until(lambda: not job.running)
        await jobs.close()
        return job

    job = asyncio.run(work())
    assert job.state == "refused"
    with pytest.raises(Qwen35Error) as error:
        qwen35.verify(tmp_path / "no such")
    assert list(job.lines) == [f"error: {error.value}"]


@pytest.mark.parametrize(
    ("program", "state", "said"),
    [
        ("", "done", []),
        ("raise SystemExit(1)", "findings", []),
        ("import sys; print('error: x', file=sys.stderr); sys.exit(2)", "refused", ["error: x"]),
        ("raise SystemExit(3)", "failed", ["ended with code 3"]),
        ("import os; os.kill(os.getpid(), 9)", "failed", ["killed by signal 9"]),
        ("import os; os.write(1, b'\\xff\\x1b[2J\\nlast')", "done", ["\ufffd\\x1b[2J", "last"]),
        ("import os; os.write(1, b' 1%\\r 99%\\rall\\r\\n\\r\\r')", "done", ["all"]),
    ],
)
def test_how_a_job_ends(program: str, state: str, said: list[str]) -> None:
    job = ended(program)
    assert (job.state, list(job.lines)) == (state, said)


def test_what_a_job_says_is_kept_within_bounds() -> None:
    job = ended("print('\\n'.join(map(str, range(9999))))\nprint('y' * 10**6, end='')")
    assert list(job.lines)[:2] == ["9700", "9701"]
    assert len(job.lines) == 300
    assert len(job.lines[-1]) <= 1000


def test_progress_is_what_the_console_prints(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_HEARTBEAT", "0")
    progress = Console().progress("chunks")
    progress.begin("writing a: 50%, b", 200)
    progress.advance(50, "layer 3, about 7 s left, x")
    job = Job(1, "convert", {}, [])
    for line in capsys.readouterr().err.splitlines():
        job.read(line)
    assert list(job.lines) == ["writing a: 50%, b: 200 chunks"]
    assert job.progress is not None
    assert job.progress == {"title": "writing a: 50%, b", "share": 25, "left": None}
    progress.advance(50, "layer 4")
    job.read(capsys.readouterr().err.rstrip())
    assert (job.progress["share"], job.progress["left"]) == (50, 0)


@pytest.mark.parametrize("given", ["", "x", "-1", "1e3", "9" * 9])
def test_an_odd_heartbeat_is_ten_seconds(
    given: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN35_HEARTBEAT", given)
    progress = Console().progress()
    progress.begin("x", 2)
    progress.advance(1, "y")
    assert capsys.readouterr().err == "x: 2 B to read\n"


TIDY = """
import signal, sys, time
def end(*_):
    print("tidied", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Whether there is no such process, or only what nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def test_a_job_that_is_cancelled_while_it_starts_ends() -> None:
    async def work(jobs: Jobs) -> None:
        starting = asyncio.ensure_future(jobs.start("verify", VERIFY))
        await asyncio.sleep(0)  # until its process is asked for
        await jobs.cancel(1)
        job = await starting
        await until(lambda: not job.running)
        assert job.state == "cancelled"

    with_jobs("import time; time.sleep(600)", work)


def test_a_job_that_cannot_start_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: object, **__: object) -> None:
        "\udc80".encode()  # as in a locale that lacks a letter

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refused)

    async def work(jobs: Jobs) -> None:
        for _ in range(5):
            job = await jobs.start("verify", VERIFY)
            assert job.state == "failed"
            assert job.lines[0].startswith("not started: 'utf-8' codec can't encode")

    with_jobs("", work)


def test_a_job_imports_nothing_from_where_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "qwen35", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hostile')")
    monkeypatch.setenv("PYTHONPATH", str(Path(qwen35.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)

    async def work() -> Job:
        jobs = Jobs(tmp_path)
        job = await jobs.start("verify", {"model": "no such"})
        await until(lambda: not job.running)
        await jobs.close()
        return job

    assert asyncio.run(work()).lines[0].startswith("error: no such: ")


def test_a_cancelled_job_tidies_up() -> None:
    async def work(jobs: Jobs) -> None:
        job = await jobs.start("verify", VERIFY)
        await until(lambda: job.lines)
        await jobs.cancel(job.number)
        await jobs.cancel(job.number)
        assert job.to_json()["state"] == "cancelling"
        await until(lambda: not job.running)
        assert (job.state, list(job.lines)) == ("cancelled", ["ready", "tidied"])

    with_jobs(TIDY, work)


def test_a_job_that_does_not_end_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs_module, "GRACE_SECONDS", 0.2)

    async def work(jobs: Jobs) -> None:
        job = await jobs.start("verify", VERIFY)
        await until(lambda: job.lines)
        await jobs.cancel(job.number)
        await until(lambda: not job.running)
        assert job.state == "cancelled"
        await until(lambda: gone(int(job.lines[0])))

    with_jobs(STUBBORN, work)


def test_as_many_jobs_as_there_is_room_for() -> None:
    async def work(jobs: Jobs) -> None:
        made = [await jobs.start("verify", VERIFY) for _ in range(4)]
        with pytest.raises(UsageError, match="jobs: 4 are running, the most at a time; wait for"):
            await jobs.start("verify", VERIFY)
        await jobs.cancel(made[0].number)
        await until(lambda: not made[0].running)
        assert (await jobs.start("verify", VERIFY)).number == 5

    with_jobs("import time; time.sleep(600)", work)


def test_old_jobs_are_forgotten() -> None:
    async def work(jobs: Jobs) -> None:
        stream = jobs.states()
        for _ in range(24):
            job = await jobs.start("verify", VERIFY)
            await finished(job)
        assert (await anext(stream))["numbers"] == list(range(5, 25))

    with_jobs("", work)


def test_two_tabs_see_the_same() -> None:
    async def work(jobs: Jobs) -> None:
        tabs = [jobs.states(), jobs.states()]
        assert [await anext(tab) for tab in tabs] == [{"numbers": [], "jobs": []}] * 2
        job = await jobs.start("verify", VERIFY)
        await until(lambda: not job.running)
        first, second = [await anext(tab) for tab in tabs]
        assert first == second == {"numbers": [1], "jobs": [job.to_json()]}
        other = await jobs.start("verify", VERIFY)
        await until(lambda: not other.running)
        assert [seen["number"] for seen in (await anext(tabs[0]))["jobs"]] == [2]

    with_jobs("print(1)", work)


def test_streams_end_with_the_server() -> None:
    async def work(jobs: Jobs) -> None:
        stream = jobs.states()
        await anext(stream)
        await jobs.close()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with pytest.raises(UsageError, match="jobs: "):
            await jobs.start("verify", VERIFY)

    with_jobs("", work)


# --- publishing

PUBLISH = {"folder": "out", "repo": "me/x", "private": True}


def test_publishing_is_a_dry_run_that_is_confirmed() -> None:
    async def work(jobs: Jobs) -> None:
        dry = await jobs.start("publish", PUBLISH)
        with pytest.raises(UsageError, match="job 1: no finished dry run; run it first"):
            await jobs.apply(dry.number)
        await until(lambda: not dry.running)
        words = ["publish", "out", "me/x", "--private"]
        *begun, saved = dry.arguments
        assert begun == [*words, "--dry-run", "--save"]
        assert Path(saved).parent == Path("saved")
        assert dry.to_json()["apply"] == shown_command([*words, "--apply", saved])
        real = await jobs.apply(dry.number)
        assert list(real.arguments) == [*words, "--apply", saved]
        with pytest.raises(UsageError, match="job 1: no finished dry run"):
            await jobs.apply(dry.number)  # once
        with pytest.raises(UsageError, match="job 2: no finished dry run"):
            await jobs.apply(real.number)

    with_jobs("import time; time.sleep(0.2)", work)


def test_what_found_no_room_can_be_confirmed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(jobs: Jobs) -> None:
        dry = await jobs.start("publish", PUBLISH)
        await until(lambda: not dry.running)
        monkeypatch.setattr(jobs_module, "MOST_RUNNING", 0)
        with pytest.raises(UsageError, match="jobs: 0 are running, the most at a time"):
            await jobs.apply(dry.number)
        assert "--apply" in dry.to_json()["apply"]
        monkeypatch.setattr(jobs_module, "MOST_RUNNING", 4)
        assert (await jobs.apply(dry.number)).number == 2

    with_jobs("", work)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_dry_run_that_found_something_is_not_applied(code: int) -> None:
    async def work(jobs: Jobs) -> None:
        dry = await jobs.start("publish", PUBLISH)
        await until(lambda: not dry.running)
        assert dry.to_json()["apply"] == ""
        with pytest.raises(UsageError, match="no finished dry run"):
            await jobs.apply(dry.number)

    with_jobs(f"raise SystemExit({code})", work)


def test_nothing_else_publishes(client: Any) -> None:
    for name in ("apply", "save", "mode", "dry_run", "delete"):
        values = {**PUBLISH, name: "x"}
        reply = client.post("/jobs", json={"action": "publish", "values": values})
        assert reply.json()["error"].startswith(f"publish: '{name}' is unknown"), name
    assert "publish" in STARTED


# --- the server

SERVER = """
import sys
from functools import partial
from qwen35.cli.main import tune_process
from qwen35.ui import jobs
from qwen35.ui.web_server import serve_page

tune_process()
job = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
jobs.Jobs = partial(jobs.Jobs, program=[sys.executable, "-S", "-c", job])
serve_page(0, lambda address: print(address, flush=True))
"""


def ask(address: str, path: str, value: Any = None) -> Any:
    from urllib.request import ProxyHandler, Request, build_opener

    base, token = address.split("/?token=")
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    data = None if value is None else json.dumps(value).encode()
    request = Request(base + path, data, headers)
    return build_opener(ProxyHandler({})).open(request, timeout=PATIENCE)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(qwen35.__file__).parents[1])}


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_a_server_that_is_stopped_takes_its_jobs_along(number: str) -> None:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        ask(address, "/jobs", {"action": "verify", "values": VERIFY})
        pid = 0
        with ask(address, "/events") as events:
            while not pid:
                event = json.loads(events.readline().removeprefix(b"data: ").strip() or b"{}")
                said = [line for job in event.get("jobs", []) for line in job["lines"]]
                pid = int(said[0]) if said else 0
            assert not gone(pid)
            server.send_signal(signal.Signals[number])
            server.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while not gone(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert gone(pid)


def test_the_command_prints_the_address_and_ends_by_a_signal() -> None:
    from jsonschema import Draft202012Validator

    with subprocess.Popen(
        [sys.executable, "-m", "qwen35", "ui", "--no-browser", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        value = ""
        while not value.rstrip().endswith("}"):
            value += server.stdout.readline()
        printed = json.loads(value)
        schema = json.loads(SCHEMA.read_text())
        assert list(Draft202012Validator(schema).iter_errors(printed)) == []
        with ask(printed["address"], "/?token=" + printed["address"].partition("=")[2]) as page:
            assert b"<title>qwen35</title>" in page.read()
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 143
        assert server.stderr.read() == "interrupted by SIGTERM\n"


def test_ports(capsys: Capture) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["ui", "--port", str(port), "--no-browser"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --port {port}: address already in use; choose another")
    for odd in ("x", "-1", "65536", "²", "8e3"):
        assert main(["ui", f"--port={odd}"]) == 2
        assert f"--port: '{odd}', expected a number below 65536" in capsys.readouterr().err


def test_without_its_libraries_it_says_what_to_install(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["ui"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: qwen35 ui: needs uvicorn; {extra_hint('ui')}\n"


@pytest.mark.parametrize(
    ("words", "screen", "opened"),
    [([], "DISPLAY", 1), ([], "WAYLAND_DISPLAY", 1), ([], "", 0), (["--no-browser"], "DISPLAY", 0)],
)
def test_a_browser_is_opened_where_there_is_a_screen(
    words: list[str],
    screen: str,
    opened: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    found: list[str] = []
    monkeypatch.setattr("qwen35.cli.ui_command.serve_page", lambda port, ready: ready("http://x"))
    monkeypatch.setattr("webbrowser.open", found.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if screen:
        monkeypatch.setenv(screen, ":0")
    assert main(["ui", *words]) == 0
    assert found == ["http://x"] * opened
    assert capsys.readouterr().out == "http://x\n"
