"""The main job on the embedded checkpoint: plan, convert to NF4, verify, load, ask.

    python demo/demo.py [OUT]

Writes OUT (default demo/out). Exit code 0 if everything was right.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from qwen35.cli.main import main as qwen35
from qwen35.verify.asking import Asker, Question, is_right

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "assets" / "qwen3.5-tiny"


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


def main() -> int:
    """Run the demonstration."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo" / "out"
    nf4, text = out / "Qwen3.5-tiny-bnb-4bit", out / "Qwen3.5-text-tiny-bnb-4bit"
    command("inspect", CHECKPOINT)
    command("convert", CHECKPOINT, nf4, "--recipe", "nf4", "--overwrite")
    command("verify", nf4, "--source", CHECKPOINT)
    command("convert", nf4, text, "--recipe", "text", "--overwrite")
    command("verify", text, "--source", CHECKPOINT)
    print(f"\n{nf4.name} loaded in transformers and asked:", flush=True)
    right = ask_all(nf4)
    print("\nwritten and checked:")
    for folder in (nf4, text):
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
        print(f"  {folder.relative_to(out.parent)}  {nbytes / 1e6:.2f} MB")
    print("demo passed" if right else "demo FAILED: a question was answered wrongly")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
