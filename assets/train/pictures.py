"""Two-coloured pictures, and the patches a Qwen3.5 vision tower reads from them.

`patches` does with numpy what the Qwen image processor does with PIL (rescale, normalise, repeat
the frame, group by merge blocks), so training needs no torchvision; `train.py` compares the two
before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen35.verification.asking_transformers import COLORS

PATCH = 16
MERGE = 2
FRAMES = 2


@dataclass(frozen=True)
class Picture:
    """A picture whose left half has one colour and whose right half another; size is (w, h).

    A colour is a name in `COLORS`, or `#rrggbb`.
    """

    left: str
    right: str
    size: tuple[int, int]
    jitter: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        width, height = self.size
        return 1, height // PATCH, width // PATCH

    @property
    def tokens(self) -> int:
        """Placeholders the picture takes in the prompt."""
        _, rows, columns = self.grid
        return rows * columns // MERGE**2


def rgb(color: str) -> tuple[int, int, int]:
    """The red, green and blue of a colour."""
    if color.startswith("#"):
        red, green, blue = bytes.fromhex(color[1:])
        return red, green, blue
    return COLORS[color]


def draw(picture: Picture) -> npt.NDArray[np.uint8]:
    """Pixels [height, width, 3]; `jitter` seeds a small shift of each colour (0: none)."""
    width, height = picture.size
    shifts = np.zeros((2, 3), dtype=np.int64)
    if picture.jitter:
        shifts = np.random.default_rng(picture.jitter).integers(-16, 17, size=(2, 3))
    pixels = np.empty((height, width, 3), dtype=np.int64)
    pixels[:, : width // 2] = np.array(rgb(picture.left)) + shifts[0]
    pixels[:, width // 2 :] = np.array(rgb(picture.right)) + shifts[1]
    return pixels.clip(0, 255).astype(np.uint8)


def patches(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[height, width, 3] uint8 -> [patches, 3 * 2 * 16 * 16] float32 in merge-block order."""
    height, width, channels = pixels.shape
    side = PATCH * MERGE
    if height % side or width % side:
        raise ValueError(f"picture of {width}x{height}: both sides must be multiples of {side}")
    scaled = (pixels.astype(np.float32) / 255.0 - 0.5) / 0.5
    blocks = scaled.transpose(2, 0, 1).reshape(
        channels, height // side, MERGE, PATCH, width // side, MERGE, PATCH
    )
    ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)
    frames = np.repeat(ordered[:, :, :, :, :, None], FRAMES, axis=5)
    return np.ascontiguousarray(frames.reshape(-1, channels * FRAMES * PATCH * PATCH))
