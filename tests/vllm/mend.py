"""Make vLLM's environment importable beside the CPU build of torch; run once, in it.

PyPI has torchvision, torchaudio and torchcodec for CUDA only. Their compiled parts do not load
here. The last two are not needed; torchvision is imported, and fails on two operators that nothing
here calls, so they are declared first.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

MARK = "# operators declared for a build that does not load"
DECLARED = f"""{MARK}
import torch as _torch

for _name in ("nms", "qnms"):
    _torch.library.define(
        f"torchvision::{{_name}}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
"""


def main() -> int:
    """Mend what is broken; nothing where torchvision works."""
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            return 0
        init = Path(spec.origin)
        text = init.read_text()
        if MARK not in text:
            init.write_text(DECLARED + text)
        pip = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes"]
        subprocess.run([*pip, "torchaudio", "torchcodec"], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
