"""The header of a .safetensors file, read with distrust.

A file is eight bytes of header length (little endian), the header (a JSON object: key -> dtype, shape, data_offsets),
and the data. Every tensor must lie inside of the data, right behind the one before it, and take as many bytes as its
shape and dtype say. Nothing is allocated by what a header claims.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraforge.errors import LoraforgeError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SIZES: Mapping[str, int] = {name: dtype.itemsize for name, dtype in DTYPES.items()}
FLOATING = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
STORED = frozenset(DTYPES.values())

# What the format's own readers accept at most.
MAX_HEADER = 100_000_000
_LENGTH = struct.Struct("<Q")
_LARGEST = 1 << 63
_LFS = b"version https://git-lfs"
_PATH_TRICK = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[A-Za-z]:[/\\]")


@dataclass(frozen=True, slots=True)
class Header:
    """What a .safetensors file says of itself.

    Attributes:
        shapes: Key -> shape, in the order of the data.
        dtypes: Key -> dtype.
        metadata: The free text of `__metadata__`.
        places: Key -> first byte and number of bytes in the file.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    metadata: dict[str, str]
    places: dict[str, tuple[int, int]]


def read_header(path: Path, allowed: Iterable[torch.dtype] = FLOATING) -> Header:
    """Reads and checks a header.

    Args:
        path: The file.
        allowed: Dtypes that the caller can use.

    Raises:
        LoraforgeError: No regular file, damaged, lying about its data, or a tensor of another dtype.
    """
    size = check_regular(path)
    try:
        with path.open("rb") as handle:
            start = handle.read(_LENGTH.size)
            length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
            if not 2 <= length <= min(size - _LENGTH.size, MAX_HEADER):
                raise damaged(path, f"a header of {length} bytes")
            text = handle.read(length)
    except OSError as error:
        raise damaged(path, error) from error
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"a header that is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not text.startswith(b"{"):
        raise damaged(path, "a header that is not a JSON object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "metadata that are not text")
    return _checked(path, content, metadata, (_LENGTH.size + length, size), frozenset(allowed))


def check_regular(path: Path) -> int:
    """The size of a regular file; a folder, pipe or device is never opened.

    Raises:
        LoraforgeError: It is missing, something else than a file, or stands for a file that was not fetched.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise LoraforgeError("The file of weights cannot be read", where=path, got=error) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise LoraforgeError("The file of weights is no regular file", where=path, got=kind, expected="a file")
    try:
        with path.open("rb") as handle:
            pointer = handle.read(len(_LFS)) == _LFS
    except OSError as error:
        raise damaged(path, error) from error
    if pointer:
        raise damaged(path, "a git-lfs pointer, not the file itself")
    return found.st_size


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuses tensor names that could act as something else than names when printed, logged or used in a path.

    Raises:
        LoraforgeError: Control characters, unpaired surrogates, an empty name, or steps of a path.
    """
    for name in names:
        odd = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
        if not name or odd or _PATH_TRICK.search(name):
            raise LoraforgeError(
                "The file of weights holds a tensor name that is not acceptable",
                where=path,
                got=ascii(name)[:200],
                expected="names without control characters and without steps of a path",
                hint="do not trust this file",
            )


def damaged(path: Path, reason: object) -> LoraforgeError:
    """The error for a file that cannot be read as tensors."""
    size = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    return LoraforgeError(
        "The file of weights is damaged or incomplete",
        where=path,
        got=f"{ascii_line(reason)} ({size})",
        expected="a whole .safetensors or .bin file",
        hint="download or copy it again (a git-lfs pointer of about 130 bytes is not the file itself)",
    )


def dtype_error(path: Path, key: str, dtype: str, allowed: Iterable[torch.dtype]) -> LoraforgeError:
    """The error for a tensor of a dtype that the caller cannot use."""
    names = sorted(str(one).removeprefix("torch.") for one in allowed)
    return LoraforgeError(
        "A tensor has an unsupported dtype", where=f"{path}: {key}", got=dtype, expected=", ".join(names)
    )


def ascii_line(reason: object) -> str:
    """A foreign message as one short line that prints nowhere as anything but text."""
    return "".join(c if c.isprintable() else " " for c in str(reason).strip())[:200]


def _checked(
    path: Path,
    content: dict[str, Any],
    metadata: dict[str, str],
    span: tuple[int, int],
    allowed: frozenset[torch.dtype],
) -> Header:
    """The header with every entry checked against the bytes of data that are there, from `span[0]` to `span[1]`."""
    check_names(path, content)
    header = Header({}, {}, metadata, {})
    places: list[tuple[int, int, str]] = []
    for key, entry in content.items():
        dtype, shape, start, stop = _entry(path, key, entry)
        if dtype not in DTYPES or DTYPES[dtype] not in allowed:
            raise dtype_error(path, key, ascii_line(dtype), allowed)
        if stop - start != math.prod(shape) * SIZES[dtype]:
            raise damaged(path, f"{key}: {stop - start} bytes for {dtype} of shape {list(shape)}")
        header.dtypes[key], header.shapes[key] = DTYPES[dtype], shape
        header.places[key] = (span[0] + start, stop - start)
        places.append((start, stop, key))
    end = 0
    for start, stop, key in sorted(places):
        if start != end:
            raise damaged(path, f"{key}: bytes {start} to {stop}, where {end} is the next free one")
        end = stop
    if end != span[1] - span[0]:
        raise damaged(path, f"{span[1] - span[0]} bytes of data, {end} are described")
    return header


def _entry(path: Path, key: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape and place of one entry, each of the right kind."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{key}: not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise damaged(path, f"{key}: {entry}")
    # Zeros aside: a shape like [0, 2^62, 2^62] takes no bytes, but its strides overflow.
    if len(shape) > 64 or math.prod(size for size in shape if size) >= _LARGEST or not offsets[0] <= offsets[1]:
        raise damaged(path, f"{key}: {entry}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < _LARGEST for one in value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key comes twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} comes twice")
        found[name] = value
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")
