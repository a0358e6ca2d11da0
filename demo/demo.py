"""All paths on the embedded checkpoint, through their gates: make, verify, measure, document.

    python demo/demo.py

Writes demo/out, what demo/run.toml says; what is there already and up to date is left alone. Then
asks the NF4 artifact every question that the checkpoint was made for, and ends with the report.
Exit code 0 if everything was right.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from qwen35.cli.main import main as qwen35
from qwen35.verification.asking_transformers import Asker, Question, is_right

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "assets" / "qwen3.5-tiny"
RUN = ROOT / "demo" / "run.toml"
OUT = ROOT / "demo" / "out"
ASKED = OUT / "Qwen3.5-tiny-bnb-4bit"


def command(*arguments: str | Path) -> None:
    """Run a qwen35 command as a user would, and stop if it fails."""
    words = [str(argument) for argument in arguments]
    shown = [word.removeprefix(f"{ROOT}/") for word in words]
    print(f"\n$ qwen35 {shlex.join(shown)}", flush=True)
    code = qwen35(words)
    if code:
        sys.exit(code)


def ask_all(folder: Path) -> bool:
    """Ask the artifact the checkpoint's questions without thinking; print and judge the answers."""
    rows = json.loads((CHECKPOINT / "questions.json").read_text())
    asker = Asker(folder)
    right = asked = 0
    for row in rows:
        if row["thinking"]:
            continue
        question = Question.from_json(row)
        said = asker.ask(question).strip()
        ok = is_right(question, said)
        asked += 1
        right += ok
        picture = f" [{question.image.left}|{question.image.right}]" if question.image else ""
        if row["trained"] or not ok:
            print(f"  {'ok   ' if ok else 'WRONG'} {question.prompt}{picture} -> {said!r}")
    print(f"{right} of {asked} questions answered rightly, in 4 bits")
    return right == asked


def show_made() -> None:
    """Print every artifact with its size and what its manifest says of its verification."""
    print("\nwritten and checked:")
    for folder in sorted(OUT.glob("*/qwen35.json")):
        nbytes = sum(path.stat().st_size for path in folder.parent.iterdir())
        verified = json.loads(folder.read_text())["verified"]
        answers = len(verified["answers"])
        found = "nothing found" if verified["passed"] else f"{len(verified['findings'])} findings"
        line = f"{found} by {verified['depth']}, {answers} answers"
        print(f"  {folder.parent.name:<28} {nbytes / 1e6:>6.2f} MB  {line}")


def show_report() -> None:
    """Print what was measured, a line for each candidate."""
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
    command("run", RUN, "--quiet")  # nothing is done twice
    print(f"\n{ASKED.name} loaded in transformers and asked:", flush=True)
    right = ask_all(ASKED)
    show_made()
    show_report()
    print("demo passed" if right else "demo FAILED: a question was answered wrongly")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
