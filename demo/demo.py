"""Run all paths on the embedded checkpoint: make, check, ask, measure.

    python demo/demo.py

Writes the artifacts of demo/run.toml to demo/out and keeps up-to-date ones, asks the NF4 artifact
every question that the checkpoint was trained for, and measures what the formats cost. Exit code 0
if nothing is found and every answer is right. It needs no llama.cpp.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qwen35
from qwen35.display import size
from qwen35.errors import Qwen35Error
from qwen35.progress import Progress
from qwen35.table import table_lines

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = Path("assets") / "qwen3.5-tiny"
DEMO = Path("demo")
OUT = DEMO / "out"
ASKED = OUT / "Qwen3.5-tiny-bnb-4bit"
MEASURED = [
    OUT / f"Qwen3.5-{name}" for name in ("text-tiny-bnb-4bit", "tiny-FP8", "text-tiny-GGUF")
]
SHOWN = (0, 1, 2, 36)
"""Questions to show: others are asked too."""


def short(text: str) -> str:
    """Return a text without the folder that all this happens in."""
    return text.replace(f"{ROOT}/", "")


class Bar:
    """One bar on a terminal for the whole demonstration: something always moves."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20)
        self.live = RichProgress(
            *columns,
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self.live.add_task("starting", total=None)

    def begin(self, title: str, total: int) -> None:
        """Show what begins; 0: nobody knows how much it is."""
        self.live.reset(self._task, description=short(title)[:50], total=total or None)

    def advance(self, amount: int, item: str) -> None:
        """Move the bar."""
        del item
        self.live.advance(self._task, amount)

    def end(self) -> None:
        """Keep turning until something else begins."""


class Lines:
    """A line for all that begins, where there is no terminal."""

    def begin(self, title: str, total: int) -> None:
        """Print it."""
        del total
        print(f"  {short(title)} ...", file=sys.stderr, flush=True)

    def advance(self, amount: int, item: str) -> None:
        """Print nothing."""

    def end(self) -> None:
        """Print nothing."""


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Yield what shows progress on stderr."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    bar = Bar()
    with bar.live:
        yield bar


def chapter(title: str, *command: object) -> None:
    """Print what comes next, and the command that does it."""
    line = f"$ qwen35 {shlex.join(map(str, command))}"
    wrapped = textwrap.wrap(line, 96, break_long_words=False, break_on_hyphens=False)
    print(f"\n{title}", " \\\n    ".join(wrapped), sep="\n", flush=True)


def make(progress: Progress) -> bool:
    """Write all artifacts, and compare every number and copied byte with the source."""
    run = DEMO / "run.toml"
    chapter("Five models from one read of the checkpoint, each checked against it:", "run", run)
    result = qwen35.run(run, progress=progress)
    for step in result.to_json()["steps"]:
        for reason in step["reasons"] if step["state"] in ("closed", "stopped") else ():
            print(f"  {step['step']}: {reason}")
    for path in sorted(OUT.glob("*/qwen35.json")):
        nbytes = sum(file.stat().st_size for file in path.parent.iterdir())
        verdict = json.loads(path.read_text())["verified"]
        found = "nothing found" if verdict["passed"] else f"{len(verdict['findings'])} findings"
        print(f"  {path.parent.name:<28} {size(nbytes):>9}   every number compared: {found}")
    return result.passed


def ask(progress: Progress) -> bool:
    """Ask the checkpoint's questions, without thinking; print and check the answers."""
    # not before the first line is printed: their libraries take long where they are new
    from qwen35.verification.asking_transformers import Asker
    from qwen35.verification.questions import Question, is_right

    title = "Does it still answer, in 4 bits? The command asks some questions, the demo all:"
    chapter(title, "verify", ASKED, "--depth=behaviour")
    rows = json.loads((CHECKPOINT / "questions.json").read_text())
    rows = [row for row in rows if not row["thinking"]]
    progress.begin("loading PyTorch and the NF4 model", 0)
    asker, right = Asker(ASKED), 0
    asker.torch.set_num_threads(1)  # matrices this small are faster so
    questions = [Question.from_json(row) for row in rows]
    asker.prompts.expect(questions)
    progress.begin(f"asking {len(rows)} questions", len(rows))
    for number, question in enumerate(questions):
        answer = asker.ask(question).strip()
        ok = is_right(question, answer)
        right += ok
        if number in SHOWN or not ok:
            image = question.image
            picture = f"(a picture: {image.left}, {image.right}) " if image else ""
            print(f"  {picture}{question.prompt} -> {answer!r}{'' if ok else ' WRONG'}", flush=True)
        progress.advance(1, question.prompt)
    print(f"  {right} of {len(rows)} questions answered correctly")
    return right == len(rows)


def measure(progress: Progress) -> None:
    """Measure all formats layer by layer, GGUF files as llama.cpp rounds inputs; print a table."""
    text, report = CHECKPOINT / "eval.txt", OUT / "report"
    shown = "--streamed", "--simulate", "llama.cpp", "--chunks", 2, "--text", text
    title = "What does it cost? Divergence from the checkpoint on unseen text:"
    chapter(title, "evaluate", CHECKPOINT, *MEASURED, *shown, "--report", report)
    measured = qwen35.evaluate(
        CHECKPOINT,
        MEASURED,
        text=text,
        chunks=2,
        streamed=True,
        simulate="llama.cpp",
        report=report,
        overwrite=True,
        progress=progress,
    ).to_json()
    rounded = {row["name"]: row for row in measured["simulations"]}
    headings = "", "weights", "mean KLD", "as engines run it", "same top token"
    rows = [row_of(row, rounded) for row in measured["candidates"]]
    print("\n".join(table_lines(headings, sorted(rows, key=lambda row: row[2]))))
    print(f"report: {(ROOT / report / 'report.html').as_uri()}")


def row_of(row: dict[str, Any], rounded: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Return the figures of one file; engines that round inputs have figures of their own."""
    engine = rounded.get(f"{row['name']} (inputs quantized)", row)["figures"]
    kld, top = row["figures"]["kld"]["value"], engine["same_top"]["value"]
    cells = f"{kld:.6f}", f"{engine['kld']['value']:.6f}", f"{top:.1%}"
    return (row["name"], size(row["bytes"]), *cells)


def main() -> int:
    """Run the demonstration."""
    started = time.monotonic()
    title = f"{CHECKPOINT}: a Qwen3.5 of 7.4 million weights, trained, with vision and reasoning"
    print(title, flush=True)
    try:
        with shown_progress() as progress:
            passed = make(progress) and ask(progress)
            measure(progress)
    except Qwen35Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"demo {'passed' if passed else 'FAILED'} in {time.monotonic() - started:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    os.chdir(ROOT)  # so that commands are shown as one types them there
    code = main()
    sys.stdout.flush()
    os._exit(code)  # nothing is left to do, and taking PyTorch apart takes seconds
