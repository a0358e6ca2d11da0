"""Recognize what is mistaken for a checkpoint: placeholder files and folders of something else."""

from __future__ import annotations

from collections.abc import Iterator

from qwen35.checkpoint.locations import FileLocation
from qwen35.errors import InputError

__all__ = ["LONGEST_HEAD", "not_a_checkpoint", "stand_in"]

LONGEST_HEAD = 64
"""Bytes from the start of a file that `stand_in` needs."""

_STAND_INS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com/spec/v",
        "a Git LFS pointer, not the file itself",
        "fetch it: `git lfs pull`, or download the file from the Hub",
    ),
    (
        b"version https://hawser.github.com/spec/v",
        "a Git LFS pointer, not the file itself",
        "fetch it: `git lfs pull`",
    ),
    (b"<!DOCTYPE", "a web page, not the file itself", "download the file again"),
    (b"<!doctype", "a web page, not the file itself", "download the file again"),
    (b"<html", "a web page, not the file itself", "download the file again"),
    (b"<?xml", "an XML answer of a server, not the file itself", "download the file again"),
    (b"Entry not found", "an error message of the Hub, not the file itself", "check its address"),
    (
        b"Invalid username or password",
        "an error message of the Hub, not the file itself",
        "download it with a token",
    ),
)
"""First bytes of placeholders, what each is, and what to do about it."""

_CONTAINERS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "an archive of torch.save, not safetensors", "save it with safetensors"),
    (b"\x80\x02\x8a\nl\xfc", "a pickle of PyTorch, not safetensors", "save it with safetensors"),
    (b"GGUF", "a GGUF file, not safetensors", "give it the ending .gguf"),
)
"""First bytes of other formats of weights."""

_PICKLE = (
    "pickles can run code, so none is read here: load it where you trust it, and save it with "
    "transformers' save_pretrained, which writes safetensors"
)
_WEIGHTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"), "PyTorch's pickles", _PICKLE),
    ((".distcp",), "a sharded training state (.distcp)", "save the model with save_pretrained"),
    ((".gguf",), "GGUF files", "start from the safetensors checkpoint that they were made from"),
    ((".npz",), "MLX's arrays", "start from the original checkpoint"),
    ((".h5", ".msgpack"), "weights of TensorFlow or Flax", "start from the original checkpoint"),
    ((".onnx",), "an ONNX model", "start from the original checkpoint"),
)
"""Endings of weights in other formats, with what they are and the way on."""

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def stand_in(
    name: str, head: bytes, error: type[InputError] = InputError, *, weights: bool = False
) -> InputError | None:
    """Return an error if a file is a placeholder, such as a Git LFS pointer, or of another format.

    Args:
        name: its name.
        head: its first `LONGEST_HEAD` bytes, or all if it is shorter.
        error: the class of the error.
        weights: whether the file should contain weights.
    """
    for start, found, hint in (*_STAND_INS, *(_CONTAINERS if weights else ())):
        if head.startswith(start):
            return error(name, found, hint=hint)
    return None


def not_a_checkpoint(place: FileLocation) -> InputError | None:
    """Return what a folder is that holds no weights of a whole model in safetensors files.

    None if it holds some, or nothing that is recognized.
    """
    sizes = place.sizes()
    whole = [name for name in sizes if name.endswith(".safetensors") and name not in _ADAPTER]
    if whole:
        return None
    if any(name in sizes for name in _ADAPTER):
        return InputError(
            str(place),
            "an adapter (LoRA), not a whole model",
            hint="merge it into its base model: qwen35 merge BASE ADAPTER OUT",
        )
    for endings, found, hint in _WEIGHTS:
        names = sorted(name for name in sizes if name.endswith(endings) and _holds_weights(name))
        if names:
            return InputError(str(place), f"{found} ({names[0]}), no safetensors file", hint=hint)
    inner = next(_inner_checkpoints(place), None)
    if inner is not None:
        return InputError(str(place), "no safetensors file in it", hint=f"is it {inner}?")
    return None


def _holds_weights(name: str) -> bool:
    """Return whether a file may hold weights: trainers leave other pickles beside them."""
    others = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "random_states")
    return not name.startswith(others)


def _inner_checkpoints(place: FileLocation) -> Iterator[str]:
    """Yield subfolders the user may mean: a Hub cache snapshot, a trainer's checkpoints."""
    folders = place.folders()
    if "snapshots" in folders:
        yield "a folder below snapshots/"
    steps = [n for n in folders if n.startswith("checkpoint-") and n[11:].isdecimal()]
    yield from sorted(steps, key=lambda name: -int(name[11:]))
