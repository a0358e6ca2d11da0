"""Run all paths on the embedded checkpoint: make, verify, measure, document.

    python demo/demo.py

Writes the artifacts of demo/run.toml to demo/out and keeps up-to-date ones. Then asks the NF4
artifact every question that the checkpoint was trained for, and prints the report. Exit code 0 if
every answer is right.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from qwen35.cli.main import main as qwen35
from qwen35.verification.asking_transformers import Asker
from qwen35.verification.questions import Question, is_right

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "assets" / "qwen3.5-tiny"
RUN = ROOT / "demo" / "run.toml"
OUT = ROOT / "demo" / "out"
NF4 = OUT / "Qwen3.5-tiny-bnb-4bit"


def command(*arguments: str | Path) -> None:
    """Run a qwen35 command as a user would, and stop if it fails."""
    words = [str(argument) for argument in arguments]
    shown = [word.removeprefix(f"{ROOT}/") for word in words]
    print(f"\n$ qwen35 {shlex.join(shown)}", flush=True)
    code = qwen35(words)
    if code:
        sys.exit(code)


def ask_all(folder: Path) -> bool:
    """Ask the checkpoint's questions, without thinking; print and check the answers."""
    rows = json.loads((CHECKPOINT / "questions.json").read_text())
    asker = Asker(folder)
    right = count = 0
    for row in rows:
        if row["thinking"]:
            continue
        question = Question.from_json(row)
        answer = asker.ask(question).strip()
        ok = is_right(question, answer)
        count += 1
        right += ok
        picture = f" [{question.image.left}|{question.image.right}]" if question.image else ""
        if row["trained"] or not ok:
            print(f"  {'ok   ' if ok else 'WRONG'} {question.prompt}{picture} -> {answer!r}")
    print(f"{right} of {count} questions answered correctly, in 4 bits")
    return right == count


def show_artifacts() -> None:
    """Print every artifact with its size and the verdict in its manifest."""
    print("\nwritten and checked:")
    for folder in sorted(OUT.glob("*/qwen35.json")):
        nbytes = sum(path.stat().st_size for path in folder.parent.iterdir())
        verified = json.loads(folder.read_text())["verified"]
        answers = len(verified["answers"])
        found = "nothing found" if verified["passed"] else f"{len(verified['findings'])} findings"
        line = f"{found} by {verified['depth']}, {answers} answers"
        print(f"  {folder.parent.name:<28} {nbytes / 1e6:>6.2f} MB  {line}")


def show_report() -> None:
    """Print the measurements, one line per candidate."""
    report = json.loads((OUT / "report" / "report.json").read_text())
    print(f"\n{'measured against bf16':<28} {'mean KLD':>10} {'PPL':>9} {'same top p':>11}")
    for row in report["candidates"]:
        figures = row["figures"]
        kld, ppl, top = (figures[key]["value"] for key in ("kld", "perplexity", "same_top"))
        print(f"{row['name']:<28} {kld:>10.6f} {ppl:>9.3f} {100 * top:>9.2f} %")
    print(f"report: {OUT.relative_to(ROOT)}/report/report.html")


def main() -> int:
    """Run the demonstration."""
    command("inspect", CHECKPOINT)
    command("run", RUN, "--dry-run")
    command("run", RUN)
    command("run", RUN, "--quiet")  # everything is up to date
    print(f"\n{NF4.name} loaded in transformers and asked:", flush=True)
    right = ask_all(NF4)
    show_artifacts()
    show_report()
    print("demo passed" if right else "demo FAILED: a wrong answer")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
