"""A .safetensors file written tensor by tensor, and continued after a kill.

The format puts the header first, but offsets are known last: room for the header is kept (its size follows from names
and worst-case shapes), the data are appended as they come, and the header goes in at the end, padded with spaces as the
format allows. Until then the file starts with a header length of 0, which every reader refuses.

A journal beside it holds one line a mark: where the data end, the CRC-32 of the bytes since the last mark, the tensors
among them and the caller's record. A run that was killed continues behind the last mark whose bytes are all there.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from loraforge.storage.header import DTYPES, SIZES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_BLOCK = 1 << 22
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's line of the header: dtype in the format's words, shape, bytes start..stop of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_space(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> int:
    """Bytes to keep for the header of these tensors: enough however the shapes turn out below the given ones.

    Args:
        tensors: Key -> dtype and largest shape.
        metadata: Metadata at its longest.
    """
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
    entries = {key: Entry(_NAMES[dtype], tuple(shape), total, total) for key, (dtype, shape) in tensors.items()}
    return len(_header(entries, metadata))


class TensorStream:
    """Writes one .safetensors file in the order in which tensors come, holding one tensor at a time.

    The bytes depend on the tensors, their order, `reserve` and the metadata only: a continued file equals one that was
    never interrupted. Nothing is flushed to the disk here; the folder that publishes the file does that once.

    Attributes:
        path: The file.
        records: The caller's records of the marks that were found, in order; empty for a new file.
        entries: Key -> where it lies, of everything written so far.
    """

    def __init__(self, path: Path, reserve: int, journal: Path | None = None) -> None:
        """Starts the file, or continues it where `journal` holds marks of the same kind of file.

        Args:
            path: The file to write.
            reserve: Bytes kept for the header, from `header_space`.
            journal: Where marks are written; None for a file that cannot be continued.

        Raises:
            OSError: The disk refuses.
        """
        self.path = path
        self.records: list[Any] = []
        self.entries: dict[str, Entry] = {}
        self._reserve, self._end, self._crc, self._new = reserve, 0, 0, list[str]()
        kept = self._continue(journal) if journal is not None and journal.exists() and path.exists() else 0
        # Unbuffered: what is written is with the system at once, and closing has nothing left to fail on.
        self._file: FileIO = path.open("r+b" if kept else "w+b", buffering=0)
        self._journal: FileIO | None = None
        try:
            self._file.truncate(self._origin + self._end)
            self._file.seek(self._origin + self._end)
            if journal is not None:
                self._journal = journal.open("r+b" if kept else "w+b", buffering=0)
                self._journal.truncate(kept)
                self._journal.seek(kept)
                if not kept:
                    self._write_line({"version": _VERSION, "reserve": reserve})
        except OSError:
            self._release()
            raise

    @property
    def _origin(self) -> int:
        """Where the data start in the file."""
        return _LENGTH.size + self._reserve

    def append(self, key: str, tensor: Tensor) -> None:
        """Writes a tensor behind the others, in its own dtype.

        Raises:
            OSError: The disk refuses.
            ValueError: The key was written before.
        """
        if key in self.entries:
            raise ValueError(f"{key!r} is written already")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            _write(self._file, block)
            self._crc = zlib.crc32(block, self._crc)
        stop = self._end + len(data)
        self.entries[key] = Entry(_NAMES[tensor.dtype], tuple(tensor.shape), self._end, stop)
        self._new.append(key)
        self._end = stop

    def mark(self, record: Any = None) -> None:
        """Notes that everything so far belongs to the file, with the caller's JSON-ready record.

        Raises:
            OSError: The disk refuses.
        """
        tensors = [[key, self.entries[key].dtype, self.entries[key].shape] for key in self._new]
        self._write_line({"offset": self._end, "crc": self._crc, "tensors": tensors, "record": record})
        self._crc, self._new = 0, []

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Writes the header: the file is whole now.

        Raises:
            OSError: The disk refuses.
            ValueError: The header is larger than the room that was kept.
        """
        try:
            header = _header(self.entries, metadata)
            if len(header) > self._reserve:
                raise ValueError(f"{self.path}: header of {len(header)} bytes, {self._reserve} were kept")
            self._file.seek(0)
            _write(self._file, memoryview(_LENGTH.pack(self._reserve) + header.ljust(self._reserve)))
        finally:
            self._release()

    def __enter__(self) -> TensorStream:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets go of the files; without `close` the file stays one that no reader accepts."""
        self._release()

    def _release(self) -> None:
        for handle in (self._file, self._journal):
            if handle is not None:
                handle.close()

    def _write_line(self, line: Mapping[str, Any]) -> None:
        if self._journal is not None:
            _write(self._journal, memoryview(json.dumps(line, separators=(",", ":")).encode() + b"\n"))

    def _continue(self, journal: Path) -> int:
        """Takes over the marks whose bytes are all there; returns how many bytes of the journal they take."""
        lines = _lines(journal)
        first = next(lines, None)
        if first is None or (first[0].get("version"), first[0].get("reserve")) != (_VERSION, self._reserve):
            return 0
        kept = first[1]
        with self.path.open("rb") as data:
            data.seek(self._origin)
            for line, end in lines:
                if _crc(data, line["offset"] - self._end) != line["crc"]:
                    break
                for key, dtype, shape in line["tensors"]:
                    stop = self._end + math.prod(shape) * SIZES[dtype]
                    self.entries[key] = Entry(dtype, tuple(shape), self._end, stop)
                    self._end = stop
                self.records.append(line["record"])
                kept = end
        return kept


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a small .safetensors file at once.

    Raises:
        OSError: The disk refuses.
    """
    metadata = {"format": "pt", **(metadata or {})}
    space = header_space({key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}, metadata)
    with TensorStream(path, space) as stream:
        for key, tensor in tensors.items():
            stream.append(key, tensor)
        stream.close(metadata)


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str] | None) -> bytes:
    """The header as bytes, padded with spaces to the alignment."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, entry in entries.items():
        content[key] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.start, entry.stop]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)


def _lines(journal: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines of a journal with the place where each ends; stops at the first that is cut off or no object."""
    end = 0
    for raw in journal.read_bytes().splitlines(keepends=True):
        end += len(raw)
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            line = None
        if not isinstance(line, dict):
            return
        yield line, end


def _write(file: FileIO, data: memoryview) -> None:
    """Writes all of `data`; the system may take less than it is given."""
    while data:
        data = data[file.write(data) :]


def _crc(data: IO[bytes], count: int) -> int | None:
    """CRC-32 of the next `count` bytes; None where the file ends before."""
    crc = 0
    while count > 0:
        block = data.read(min(count, _BLOCK))
        if not block:
            return None
        crc, count = zlib.crc32(block, crc), count - len(block)
    return crc
