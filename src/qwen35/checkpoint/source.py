"""An opened checkpoint: its config, its weights and readers of their bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qwen35.checkpoint.header import read_header, strict_json
from qwen35.checkpoint.locations import FileLocation, LocalFolder, folder_name, stamp
from qwen35.checkpoint.mistaken import LONGEST_HEAD, not_a_checkpoint, stand_in
from qwen35.checkpoint.prefixes import ReadPrefix, family_names
from qwen35.checkpoint.sidecars import MANIFEST_NAME, SIDECARS
from qwen35.closing import Closing
from qwen35.codecs.dialect import FamilyTensors
from qwen35.codecs.foreign import ForeignPacking, foreign_packing
from qwen35.codecs.kv_cache import CACHE_ENDINGS
from qwen35.codecs.registry import dialect_of, group, is_packed, packings
from qwen35.errors import ConfigError, HeaderError, InputError, TensorError
from qwen35.model.model_config import ModelConfig, parse_config
from qwen35.model.roles import CheckpointNaming, expected_tensors
from qwen35.model.sizes import FUSED_MTP_EXPERTS, INFERRED, PUBLISHED, published_config
from qwen35.tensors import StoredTensor, Weight

if TYPE_CHECKING:
    from qwen35.checkpoint.adapter_files import Adapter

__all__ = [
    "INDEX_NAME",
    "Checkpoint",
    "FolderReader",
    "Reader",
    "check_index",
    "dangling_link",
    "is_published",
    "open_folder",
    "open_place",
    "open_published",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
"""The one file of a checkpoint without an index."""

_MAX_JSON_BYTES = 256 * 2**20
_MAX_CONFIG_BYTES = 8 * 2**20
"""For config.json, whose longest part names modules that stay as they are: 6 MB, if they are all
experts of the largest published size one by one."""
_MAX_PROBLEMS = 1000  # a hostile index may list millions of names
_MAX_NAME = 255  # NAME_MAX of Linux file systems
_SHOWN = 5
_BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
"""Ends of names of buffers that some trainers save. transformers computes them (``modeling_utils``,
``additional_unexpected_patterns``), and llama.cpp's converter skips the former."""
_CHANGED = "changed since its header was read"
_RETRY = "run again once it no longer changes"


@dataclass(frozen=True)
class Checkpoint:
    """Everything the headers of a checkpoint say.

    Args:
        name: the name the user gave it.
        config: the validated config.json.
        weights: all weights, in file order.
        layout: how its tensors are named and grouped.
        sidecars: size in bytes of each sidecar, by name.
        place: where its files are; None for a published size.
        root: the folder; None if only headers are available (a published size, the Hub).
        revision: commit of the Hub repository, if any.
        repo: the Hub repository, if any.
        file_sizes: size in bytes of each safetensors file.
        stamps: size and modification time of each local file used.
        problems: problems with the index or the packing; empty unless opened leniently.
        foreign: how another tool packed the weights, which cannot be read; also a problem.
        others: files and folders beside it that are no part of it; folders end with a slash.
        dangling: entries that cannot be read (links that lead nowhere, pipes), with what they are.
        buffers: stored tensors that are no weights, and that loaders compute from the config.
        prefix: what stands before its text tensors, if that is not the family's own.
        unread: safetensors files beside `SINGLE_NAME`, which no index lists.
        cache_scales: scales of a KV cache (`qwen35.codecs.kv_cache`), which are no weights either.
        adapters: what changes its weights when they are read (`qwen35.checkpoint.adapted`).
        donor: the checkpoint whose MTP layer it has, if that is another one
            (`qwen35.checkpoint.grafted`).
        within: the files of the folder that it consists of, if others there are of other models.
        label: what the model is called, if not as its repository or its folder.
        read_as: notes on how its files were read.
        rounded: weights that adapters change as a codec holds them, with the codec's name.
        dialect: the loader whose names its files have (`qwen35.codecs.dialect`), if not the
            family's own.
        in_files: its tensors as its files have them; empty if they are the parts of weights.
    """

    name: str
    config: ModelConfig
    weights: tuple[Weight, ...]
    layout: CheckpointNaming
    sidecars: Mapping[str, int]
    place: FileLocation | None = None
    root: Path | None = None
    repo: str | None = None
    revision: str | None = None
    file_sizes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    problems: tuple[InputError, ...] = ()
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    foreign: ForeignPacking | None = None
    others: tuple[str, ...] = ()
    dangling: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    buffers: tuple[str, ...] = ()
    prefix: ReadPrefix | None = None
    unread: tuple[str, ...] = ()
    cache_scales: tuple[StoredTensor, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    donor: Checkpoint | None = None
    within: tuple[str, ...] = ()
    label: str = ""
    read_as: tuple[str, ...] = ()
    rounded: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    dialect: str = ""
    in_files: tuple[StoredTensor, ...] = ()

    @property
    def notes(self) -> Iterator[str]:
        """How its files were read, where that needs saying; what is not sure about a size."""
        if self.place is None and self.name in INFERRED:
            yield INFERRED[self.name]
        if self.unread:
            names = ", ".join(self.unread[:_SHOWN])
            more = f" and {len(self.unread) - _SHOWN} more" if len(self.unread) > _SHOWN else ""
            yield (
                f"without {INDEX_NAME}, only {SINGLE_NAME} is read, as by transformers: not "
                f"{names}{more}"
            )
        if self.prefix is not None:
            yield self.prefix.note
        yield from self.read_as

    @property
    def title(self) -> str:
        """What the model is called: the name of its repository or of its folder."""
        if self.label:
            return self.label
        if self.repo:
            return self.repo.rpartition("/")[2]
        return folder_name(self.root) if self.root else self.name

    @property
    def nbytes(self) -> int:
        """Size of the tensor data in bytes."""
        if self.in_files:
            return sum(stored.spec.nbytes for stored in self.in_files)
        scales = sum(scale.spec.nbytes for scale in self.cache_scales)
        return sum(weight.nbytes for weight in self.weights) + scales

    def path_of(self, file: str) -> str:
        """Return the path of one of its files, or what stands for it without a folder."""
        return str(self.root.absolute() / file) if self.root else f"/{self.name}/{file}"

    def folder(self) -> Path:
        """Return the folder that holds the files.

        Raises:
            InputError: only headers are available.
        """
        if self.root is None:
            raise InputError(
                self.name, "no weights here, only its description", hint="give a folder or a Hub id"
            )
        return self.root

    def location(self) -> Path:
        """Return its folder, or its first file where others in the folder are of other models.

        Raises:
            InputError: only headers are available.
        """
        return self.folder() / self.within[0] if self.within else self.folder()

    def donor_location(self) -> Path | None:
        """Return the folder of the checkpoint that its MTP layer is of; None if it is its own."""
        return self.donor.location() if self.donor is not None else None


def open_published(name: str) -> Checkpoint:
    """Describe a published size (`qwen35.model.sizes.PUBLISHED`) without reading files."""
    config = parse_config(published_config(name))
    layout = CheckpointNaming.published(config)
    if name in FUSED_MTP_EXPERTS:
        layout = replace(layout, per_expert=frozenset())
    tensors = {}
    position = 0
    for spec in expected_tensors(config, layout):
        tensors[spec.name] = StoredTensor(spec, SINGLE_NAME, position)
        position += spec.nbytes
    return Checkpoint(name, config, group(tensors)[0], layout, MappingProxyType({}))


def is_published(name: str) -> bool:
    """Return whether `name` is a published size rather than a location."""
    return name in PUBLISHED


def open_folder(
    root: Path, *, name: str = "", repo: str = "", revision: str = "", only: str = ""
) -> Checkpoint:
    """Read the headers of the checkpoint in the folder `root`.

    Args:
        root: the folder.
        name: the name the user gave it.
        repo: the Hub repository that `root` is a snapshot of.
        revision: the snapshot's commit.
        only: read only the files that hold tensors whose names begin so, if the index names any.

    Raises:
        InputError: not a readable Qwen3.5 checkpoint.
    """
    origin: dict[str, Any] = {"name": name or str(root), "repo": repo, "revision": revision}
    return open_place(LocalFolder(root), root=root, only=only, **origin)


def open_place(
    place: FileLocation,
    *,
    name: str,
    root: Path | None = None,
    repo: str = "",
    revision: str = "",
    lenient: bool = False,
    only: str = "",
) -> Checkpoint:
    """Read the headers of the checkpoint at `place`; arguments as for `open_folder`.

    With `lenient`, problems with the index or the packing go into the result.

    Raises:
        InputError: not a readable Qwen3.5 checkpoint.
    """
    other = not_a_checkpoint(place)
    if other is not None:
        raise other
    sizes = place.sizes()
    raw = read_json(place, "config.json")
    known = None if _may_be_translated(raw) else parse_config(raw)
    read = _read_headers(place, only)
    shards = read.shards
    dialect = dialect_of(read.tensors, read.formats)
    if dialect is None:
        config = known or parse_config(raw)
        tensors, prefix = family_names(read.tensors, vision=config.architecture.vision)
        named = FamilyTensors(tensors, {})
    else:
        config, prefix = parse_config(dialect.family_config(raw)), None
        named = dialect.family_tensors(read.tensors, config)
        tensors = named.tensors
    buffers = tuple(name for name in tensors if name.endswith(_BUFFERS))
    if buffers:
        tensors = {name: tensors[name] for name in tensors if not name.endswith(_BUFFERS)}
    scales = tuple(tensors[name] for name in tensors if name.endswith(CACHE_ENDINGS))
    if scales:
        tensors = {name: tensors[name] for name in tensors if not name.endswith(CACHE_ENDINGS)}
    weights, packing = group(tensors, named.held)
    formats = read.formats - {dialect.name} if dialect else read.formats
    foreign = _foreign(config, tensors, weights, formats)
    # companions of other weights may be in files that are not read
    packing = [problem for problem in packing if problem.subject.startswith(only)]
    problems = [*read.problems, *named.problems, *packing]
    named_it = packing or named.problems
    if foreign is not None and not (foreign.tensor and named_it):
        problems = [_unreadable(foreign, config)]
    if problems and not lenient:
        raise problems[0]
    sidecars = {row.name for row in SIDECARS}
    stamps = place.stamps() if isinstance(place, LocalFolder) else {}
    # Other files in the folder may change during a run.
    used = {"config.json", INDEX_NAME, *shards, *sidecars} & stamps.keys()
    return Checkpoint(
        name=name,
        config=config,
        weights=weights,
        layout=CheckpointNaming.of(tensors),
        sidecars=MappingProxyType({n: size for n, size in sorted(sizes.items()) if n in sidecars}),
        place=place,
        root=root,
        repo=repo or None,
        revision=revision or None,
        file_sizes=MappingProxyType({shard: sizes[shard] for shard in shards}),
        problems=tuple(problems),
        stamps=MappingProxyType({name: stamps[name] for name in sorted(used)}),
        foreign=foreign,
        others=_others(place, {"config.json", INDEX_NAME, MANIFEST_NAME, *shards, *sidecars}),
        dangling=MappingProxyType(dict(place.dangling())),
        buffers=buffers,
        prefix=prefix,
        unread=() if read.indexed else _unread(sizes, shards),
        cache_scales=scales,
        dialect=dialect.name if dialect else "",
        in_files=tuple(read.tensors.values()) if dialect else (),
        read_as=tuple(named.notes),
    )


def _may_be_translated(raw: object) -> bool:
    """Return whether config.json may be one that only a dialect has: nested, without a tower."""
    if not isinstance(raw, dict) or raw.get("vision_config"):
        return False
    return isinstance(raw.get("text_config"), dict)


def _unread(sizes: Mapping[str, int], shards: Sequence[str]) -> tuple[str, ...]:
    """Return the safetensors files that are not read."""
    return tuple(sorted(n for n in sizes if n.endswith(".safetensors") and n not in shards))


def _foreign(
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    weights: Sequence[Weight],
    formats: Set[str],
) -> ForeignPacking | None:
    held = {part.spec.name for weight in weights if is_packed(weight) for part in weight.parts}
    strange = (stored.spec for name, stored in tensors.items() if name not in held)
    return foreign_packing(config.raw, strange, formats, ours=bool(held))


def _unreadable(foreign: ForeignPacking, config: ModelConfig) -> TensorError:
    if foreign.tensor:
        return TensorError(
            foreign.tensor,
            f"no part of a weight of {foreign.label} that can be read",
            expected="all of its tensors, with their shapes and dtypes",
            hint="download the checkpoint again, or start from the unquantized one",
        )
    subject = "config.json" if config.quantization else "the weights"
    codecs = packings("safetensors").values()
    names = (codec.title or codec.dialect.upper() or codec.label for codec in codecs)
    readable = dict.fromkeys(names)
    return TensorError(
        subject,
        f"weights packed as {foreign.label}",
        expected=" or ".join(["unquantized ones", *readable]),
        hint=foreign.hint,
    )


def _others(place: FileLocation, known: Set[str]) -> tuple[str, ...]:
    """Return files and folders that are no part of a checkpoint; hidden ones are not counted."""
    files = [name for name in place.sizes() if name not in known]
    names = [*files, *(f"{name}/" for name in place.folders())]
    names += [name for name in place.dangling() if name not in known]
    return tuple(sorted(name for name in names if not name.startswith(".")))


def read_json(place: FileLocation, name: str) -> Any:
    """Read a JSON file of a checkpoint.

    Raises:
        InputError: it is missing, too large or not valid JSON.
    """
    size = place.sizes().get(name)
    if size is None:
        raise _gone(place, name) or ConfigError(
            str(place), f"no {name} in it", hint="is this a checkpoint?"
        )
    most = _MAX_CONFIG_BYTES if name == "config.json" else _MAX_JSON_BYTES
    if size > most:  # before reading it into memory
        raise ConfigError(name, f"{size} bytes", expected=f"at most {most}")
    kind = HeaderError if name == INDEX_NAME else ConfigError
    content = place.read(name, 0, size)
    known = stand_in(name, content[:LONGEST_HEAD], kind)
    if known is not None:
        raise known
    return strict_json(content, name, kind)


def _gone(place: FileLocation, name: str) -> InputError | None:
    """Return the error for a file that is only a link which leads nowhere, or None."""
    if name not in place.dangling():
        return None
    return dangling_link(name, place.dangling()[name])


def dangling_link(name: str, what: str) -> InputError:
    """Return the error for an entry that is no file: interrupted downloads leave such links."""
    return InputError(name, what, hint="download the file again")


@dataclass(frozen=True)
class _Headers:
    """What the headers of all files say together.

    Args:
        shards: the files.
        tensors: their tensors by name, in file order.
        formats: values of ``format`` in their metadata.
        indexed: whether an index lists the files.
        problems: contradictions between files and index.
    """

    shards: Sequence[str]
    tensors: Mapping[str, StoredTensor]
    formats: Set[str]
    indexed: bool
    problems: Sequence[InputError]


def _read_headers(place: FileLocation, only: str) -> _Headers:
    """Read the headers, one at a time: those of the largest models take 100 MB together."""
    shards, weight_map = _shards(place, only)
    tensors: dict[str, StoredTensor] = {}
    formats = set()
    problems: list[InputError] = []
    for shard in shards:
        header = read_header(place, shard)
        formats.add(header.metadata.get("format", ""))
        for name, (spec, begin, _) in header.tensors.items():
            if name in tensors:
                found = f"in two files, {tensors[name].file} and {shard}"
                problems.append(HeaderError(name, found))
            tensors[name] = StoredTensor(spec, shard, begin)
    if weight_map is not None:
        problems += islice(_map_problems(tensors, weight_map), _MAX_PROBLEMS)
    return _Headers(shards, tensors, formats, weight_map is not None, problems)


def _shards(place: FileLocation, only: str) -> tuple[list[str], dict[str, str] | None]:
    """Return the shard files, and their weight map if there is an index."""
    sizes = place.sizes()
    if INDEX_NAME in sizes:
        weight_map = check_index(read_json(place, INDEX_NAME))
        needed = {shard for name, shard in weight_map.items() if name.startswith(only)}
        needed = needed or set(weight_map.values())
        weight_map = {name: shard for name, shard in weight_map.items() if shard in needed}
        shards = sorted(needed)
        for shard in shards:
            if shard not in sizes:
                raise _gone(place, shard) or InputError(
                    shard, f"listed in {INDEX_NAME} but missing", hint="download it again"
                )
        return shards, weight_map
    for link, target in place.dangling().items():
        if link == INDEX_NAME or (link.endswith(".safetensors") and SINGLE_NAME not in sizes):
            raise dangling_link(link, target)
    found = sorted(name for name in sizes if name.endswith(".safetensors"))
    if not found:
        raise InputError(str(place), "no safetensors file in it")
    if SINGLE_NAME in found:  # transformers looks for it first
        return [SINGLE_NAME], None
    if len(found) > 1:
        raise InputError(
            str(place),
            f"{len(found)} safetensors files but no {INDEX_NAME}",
            hint="the index says which belong to the model: download it too",
        )
    return found, None


def check_index(parsed: object) -> dict[str, str]:
    """Return the weight map of a parsed index file.

    Raises:
        HeaderError: it is malformed, or a shard name points outside the folder.
    """
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(INDEX_NAME, "no weight_map in it")
    # The index is untrusted: refuse path separators of any platform, NUL and other file types.
    for shard in {str(value) for value in weight_map.values()}:
        path = PurePosixPath(shard)
        if (
            len(shard) > _MAX_NAME
            or path.name != shard
            or "\\" in shard
            or "\0" in shard
            or path.suffix != ".safetensors"
        ):
            raise HeaderError(
                INDEX_NAME,
                f"shard name {shard[:80]!r}",
                expected="a .safetensors file in the same folder",
            )
    shards: dict[str, str] = {}  # one string for each file, not for each tensor
    return {name: shards.setdefault(shard, shard) for name, shard in weight_map.items()}


def _map_problems(
    tensors: Mapping[str, StoredTensor], weight_map: Mapping[str, str]
) -> Iterator[TensorError]:
    if weight_map == {name: stored.file for name, stored in tensors.items()}:
        return
    for name, shard in weight_map.items():
        if name not in tensors:
            yield TensorError(name, f"listed in {INDEX_NAME} but not in {shard}")
        elif tensors[name].file != shard:
            yield TensorError(name, f"in {tensors[name].file}", expected=f"{shard} by {INDEX_NAME}")
    for name, stored in tensors.items():
        if name not in weight_map:
            yield TensorError(name, f"in {stored.file} but not in {INDEX_NAME}")


class FolderReader(Closing):
    """Reads byte ranges of the files in a folder; safe to share between threads.

    Files are read with ``pread`` rather than mapped: memory stays bounded, and a file truncated
    during a read raises an error instead of SIGBUS.

    Args:
        root: the folder.
        stamps: expected size and modification time per file; a file that differs is refused.
    """

    def __init__(self, root: Path, stamps: Mapping[str, tuple[int, int]] | None = None) -> None:
        self._root = root
        self._stamps = stamps or {}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files; a later read reopens them."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _descriptor(self, file: str) -> int:
        with self._lock:  # two threads opening the same file would leak a descriptor
            if file not in self._files:
                try:
                    self._files[file] = os.open(self._root / file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise InputError(file, f"cannot be read ({error.strerror})") from error
            return self._files[file]

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `tensor`, starting at `offset`.

        Raises:
            TensorError: the file is too short or cannot be read.
        """
        descriptor = self._descriptor(tensor.file)
        position, done = tensor.begin + offset, 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], position + done)
            except OSError as error:
                raise TensorError(
                    tensor.spec.name, f"cannot read {tensor.file} ({error.strerror})"
                ) from error
            if count == 0:
                raise TensorError(
                    tensor.spec.name,
                    f"{tensor.file} ends within it: it {_CHANGED}",
                    hint=_RETRY,
                )
            done += count
        # Compare after the read, so that a change during it is noticed too.
        if self._stamps and stamp(os.fstat(descriptor)) != self._stamps[tensor.file]:
            raise TensorError(tensor.spec.name, f"{tensor.file} {_CHANGED}", hint=_RETRY)

    def read(self, tensor: StoredTensor) -> bytearray:
        """Return all bytes of a (small) tensor."""
        data = bytearray(tensor.spec.nbytes)
        self.read_into(tensor, 0, memoryview(data))
        return data


class Reader(FolderReader):
    """Reads byte ranges of a checkpoint, of its adapters and of the donor of its MTP layer.

    The latter name their files by path (`Adapter.located`). Files changed since their headers were
    read are refused.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.folder(), checkpoint.stamps)
        self._adapters = {adapter.path: adapter for adapter in checkpoint.adapters}
        donor = checkpoint.donor
        stamps = {donor.path_of(n): s for n, s in donor.stamps.items()} if donor else {}
        self._donor = FolderReader(donor.folder(), stamps) if donor else None
        self._donated = stamps.keys()

    def close(self) -> None:
        """Close the files; a later read reopens them."""
        super().close()
        if self._donor is not None:
            self._donor.close()

    def read_into(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `tensor`, starting at `offset`."""
        adapter = self._adapters.get(tensor.file)
        if adapter is not None:
            adapter.read_into(tensor, offset, buffer)
        elif self._donor is not None and tensor.file in self._donated:
            self._donor.read_into(tensor, offset, buffer)
        else:
            super().read_into(tensor, offset, buffer)
